"""Several models of one shape as one model whose parameters carry a leading axis S, and back."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from vitkd.models import Model


def stack(models: Sequence[Model]) -> Model:
    """A model of which student s computes what `models[s]` does; its weights are copies.

    Every layer of `vitkd.models` takes the leading axis. What keeps statistics of a whole batch, as batch
    normalisation does, would mix students and cannot be stacked.
    """
    first = models[0]
    assert all(model.config == first.config for model in models), "students of one shape"
    stacked = deepcopy(first)
    for name, _ in first.named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = torch.stack([model.get_parameter(name).detach() for model in models])
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))
    return stacked


def unstack(stacked: Model, weights: Mapping[str, Tensor], student: int) -> Model:
    """Student `student` of `weights`, the state of `stacked`, as a model of its own on the CPU."""
    model = stacked.config.architecture()
    model.load_state_dict({name: values[student].to("cpu", copy=True) for name, values in weights.items()})
    return model


def per_student_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm [S] over all of each student's entries of `tensors`, each [S, …]."""
    norms = [torch.linalg.vector_norm(tensor.flatten(1), dim=1) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def along(values: Tensor, like: Tensor) -> Tensor:
    """[S] reshaped to [S, 1, …, 1], so that it broadcasts against `like` [S, …]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
