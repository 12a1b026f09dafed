"""Which learning rate and weight decay each parameter has."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from vitkd.models import Model
from vitkd.models.base import is_matrix
from vitkd.optim.optimizers import Optimizer


class Place(NamedTuple):
    """What a parameter has of its optimiser's settings."""

    lr_scale: float
    """the share of the learning rate"""
    decays: bool
    """whether weight decay applies to it"""


def places(settings: Optimizer, model: Model, beside: nn.Module | None = None) -> list[Place]:
    """The place of each parameter of `model`, then of what is trained `beside` it, in their own orders.

    lr_scale = layer_decay^(layers above), as BEiT and timm have it; what is trained beside has no layers.
    """
    above = {} if settings.layer_decay == 1 else model.layers_above()
    still = set() if settings.decay_all else model.undecayed()
    own = [
        Place(settings.layer_decay ** above.get(name, 0), name not in still)
        for name, _ in model.named_parameters()
    ]
    others = () if beside is None else beside.named_parameters()
    return own + [Place(1.0, settings.decay_all or is_matrix(name, each)) for name, each in others]


def grouped(
    settings: Optimizer, parameters: Iterable[nn.Parameter], theirs: Iterable[Place]
) -> list[dict[str, Any]]:
    """The parameters that are trained, as groups for PyTorch; those of one place are one group."""
    groups: dict[Place, list[nn.Parameter]] = {}
    for parameter, place in zip(parameters, theirs, strict=True):
        if parameter.requires_grad:
            groups.setdefault(place, []).append(parameter)
    return [
        {
            "params": members,
            "lr": settings.lr * place.lr_scale,
            "weight_decay": settings.weight_decay if place.decays else 0.0,
            **place._asdict(),
        }
        for place, members in groups.items()
    ]
