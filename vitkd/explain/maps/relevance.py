"""Which tokens speak for a class: attention weighted by its gradient.

Shapes: B images, H heads, T tokens, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.recording import Recording
from vitkd.explain.maps.rollout import weighted_by_gradient
from vitkd.models.output import at_least_float32


def attention_gradients(recording: Recording, target: Tensor) -> tuple[Tensor, ...]:
    """Per block [B, H, T, T]: image b's logit of class target[b] by the weights of image b.

    The recording keeps its graph, so that another target can be asked for.

    Args:
        target: [B] class indices.

    Raises:
        ConfigError: a class that does not exist, or a recording made without gradients.
    """
    count, classes = recording.logits.shape
    assert target.shape == (count,), f"{[*target.shape]} classes for {count} images"
    check_classes(target, classes)
    if not recording.logits.requires_grad:
        raise ConfigError("the recording has no gradients: record outside torch.no_grad")
    # An image's weights reach its own logits only, so one backward pass serves the whole batch.
    chosen = recording.logits.gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, recording.weights, retain_graph=True)


def check_classes(target: Tensor, classes: int) -> None:
    """Raise ConfigError unless all of `target` lie in 0 to classes − 1."""
    for wrong in target[(target < 0) | (target >= classes)][:1].tolist():
        raise ConfigError(f"class {wrong}: the model has classes 0 to {classes - 1}")


def relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Class-specific relevance R [B, T, T] (Chefer et al. 2021, equations 5 and 6, for self-attention).

    R = I, then per block R ← R + mean_h((∇A ⊙ A)⁺) R.

    Args:
        weights: per block [B, H, T, T].
        gradients: the class's logit by `weights`, as `attention_gradients` gives it.
    """
    first = at_least_float32(weights[0])
    r = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).repeat(len(first), 1, 1)
    for a, gradient in zip(weights, gradients, strict=True):
        r = r + weighted_by_gradient(a, gradient) @ r
    return r


def attention_grad_cam(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) with the last block's heads as its channels [B, T, T].

    Each head weighs as much as the mean of its gradient; the weighted mean's positive part is returned.
    """
    a, gradient = at_least_float32(weights[-1]), at_least_float32(gradients[-1])
    return (gradient.mean((-2, -1), keepdim=True) * a).mean(1).clamp_min(0)
