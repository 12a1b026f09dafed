"""Every way to ask a model where it looks, with one signature.

Shapes: B images, C channels, T tokens (prefix + h·w), h × w patches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vitkd.errors import ConfigError, suggest
from vitkd.explain.maps import references
from vitkd.explain.maps.attention import fuse, token_map
from vitkd.explain.maps.flow import (
    attention_grad_cam,
    attention_gradients,
    gradient_rollout,
    relevance,
    rollout,
)
from vitkd.explain.maps.recording import Recording, layout, record

Method = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, normalised images [B, C, H, W], classes [B]) → float32 maps [B, h, w], higher = more relevant."""


def explain_by(name: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """The maps by `METHODS[name]` of images [B, C, H, W] and classes [B]: float32 [B, h, w].

    Works under `torch.no_grad` and `torch.inference_mode` too. The maps are in the method's own scale.

    Raises ConfigError if there is no such method or class, an optional package is absent, or the model's
    maps cannot be recorded.
    """
    if name not in METHODS:
        raise ConfigError(f"method={name}: {suggest(name, METHODS)}")
    return METHODS[name](model, images, target)


def _of_attention(combine: Callable[[Sequence[Tensor]], Tensor]) -> Method:
    """A method that reads the attention weights alone, whatever the class."""

    @torch.no_grad()
    def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        recording = record(model, images)
        return _read(combine(recording.weights), recording)

    return explain


def _of_gradients(combine: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]) -> Method:
    """A method that reads the attention weights and the class's gradient by them."""

    def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            recording = record(model, images.detach().clone())
            gradients = attention_gradients(recording, target)
        with torch.no_grad():
            return _read(combine(recording.weights, gradients), recording)

    return explain


def _read(matrix: Tensor, recording: Recording) -> Tensor:
    """What the classifier reads from the patches: the mean row of the tokens that it reads."""
    return token_map(matrix, recording.grid, recording.prefix, recording.readers).float()


def _integrated_gradients(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Averaged over each patch's pixels."""
    pixels = references.integrated_gradients(model, images, target)
    return adaptive_avg_pool2d(pixels[:, None], layout(model, images).grid).squeeze(1).float()


def _random(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Uniform noise, the same at every call: the baseline."""
    noise = torch.rand(len(images), *layout(model, images).grid, generator=torch.Generator().manual_seed(0))
    return noise.to(images.device)


METHODS: dict[str, Method] = {
    "attention": _of_attention(lambda weights: fuse(weights[-1])),
    "rollout": _of_attention(rollout),
    "gradient_rollout": _of_gradients(gradient_rollout),
    "relevance": _of_gradients(relevance),
    "grad_cam": _of_gradients(attention_grad_cam),
    "pytorch_grad_cam": references.grad_cam,
    "integrated_gradients": _integrated_gradients,
    "random": _random,
}
CLASS_SPECIFIC = {"gradient_rollout", "relevance", "grad_cam", "pytorch_grad_cam", "integrated_gradients"}
"""those whose maps depend on the class"""
