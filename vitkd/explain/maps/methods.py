"""Every way to ask a model where it looks, with one signature.

Two are other packages' methods, to check these against; they need `pip install 'vitkd[explain]'`.

Shapes: B images, C channels, T tokens (prefix + h·w), h × w patches; W windows of N tokens each.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from vitkd.errors import ConfigError, from_extra, suggest
from vitkd.explain.maps.attention import fuse, token_map
from vitkd.explain.maps.flow import (
    attention_grad_cam,
    attention_gradients,
    check_classes,
    gradient_rollout,
    relevance,
    rollout,
    windowed_grad_cam,
    windowed_gradient_rollout,
    windowed_relevance,
    windowed_rollout,
)
from vitkd.explain.maps.recording import Recording, evaluating, layout, logits_of, record
from vitkd.explain.maps.windows import received
from vitkd.models.output import at_least_float32

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


def _of_attention(of_tokens: Callable[..., Tensor], of_windows: Callable[..., Tensor]) -> Method:
    """A method that reads the attention weights alone, whatever the class.

    Args:
        of_tokens: per block weights [B, H, T, T] → a matrix [B, T, T].
        of_windows: per block weights [B, H, W·N, N], and windows → maps [B, h, w].
    """

    @torch.no_grad()
    def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        recording = record(model, images)
        if recording.windows:
            return of_windows(recording.weights, recording.windows).float()
        return class_rows(of_tokens(recording.weights), recording)

    return explain


def _of_gradients(of_tokens: Callable[..., Tensor], of_windows: Callable[..., Tensor]) -> Method:
    """As `_of_attention`, of a method that reads the class's gradients by the weights too."""

    def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            recording = record(model, images.detach().clone())
            gradients = attention_gradients(recording, target)
        with torch.no_grad():
            if recording.windows:
                return of_windows(recording.weights, gradients, recording.windows).float()
            return class_rows(of_tokens(recording.weights, gradients), recording)

    return explain


def class_rows(matrix: Tensor, recording: Recording) -> Tensor:
    """The mean row of the tokens that the classifier reads, of [..., T, T]: float32 maps [..., h, w]."""
    wide = at_least_float32(matrix)
    return token_map(wide, recording.grid, recording.prefix, recording.readers).float()


def _integrated_gradients(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Averaged over each patch's pixels."""
    pixels = integrated_gradients(model, images, target)
    return adaptive_avg_pool2d(pixels[:, None], layout(model, images).grid).squeeze(1).float()


def _random(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Uniform noise, the same at every call: the baseline."""
    noise = torch.rand(len(images), *layout(model, images).grid, generator=torch.Generator().manual_seed(0))
    return noise.to(images.device)


def pytorch_grad_cam(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """pytorch-grad-cam's GradCAM of the tokens that enter the last attention, as maps [B, h, w] in 0..1.

    Args:
        images: [B, C, H, W], normalised.
        target: [B] class indices.

    Raises:
        ConfigError: grad-cam is not installed, or the model's patches cannot be laid out.
    """
    package = from_extra("pytorch_grad_cam", "explain")
    targets = from_extra("pytorch_grad_cam.utils.model_targets", "explain")
    place = layout(model, images)
    with _explaining(model, images, target) as (logits, images):
        cam = package.GradCAM(
            model=logits,
            target_layers=[_last_norm(model)],
            reshape_transform=lambda tokens: tokens[:, place.prefix :].mT.unflatten(-1, place.grid),
        )
        # It would enlarge the maps to the image's size.
        cam.get_target_width_height = lambda _images: place.grid[::-1]
        try:
            maps = cam(images, [targets.ClassifierOutputTarget(each) for each in target.tolist()])
        finally:
            cam.activations_and_grads.release()
    return torch.from_numpy(maps).float().to(images.device)


def integrated_gradients(
    model: nn.Module, images: Tensor, target: Tensor, *, baseline: Tensor | float = 0.0, steps: int = 50
) -> Tensor:
    """captum's IntegratedGradients (Sundararajan et al. 2017), summed over channels [B, H, W].

    An image's attributions sum to what its class's logit gains from the baseline to the image.

    Args:
        images: [B, C, H, W], normalised.
        target: [B] class indices.
        baseline: the image where the path begins, normalised too; 0 is the mean colour.
        steps: points on the path.

    Raises:
        ConfigError: captum is not installed.
    """
    captum = from_extra("captum.attr", "explain")
    with _explaining(model, images, target) as (logits, images):
        attributions = captum.IntegratedGradients(logits).attribute(
            images, baseline, target=target, n_steps=steps, internal_batch_size=len(images)
        )
    return attributions.detach().sum(1)


class _Logits(nn.Module):
    """The model, returning its logits alone; ConfigError if it lacks a class of `target`."""

    def __init__(self, model: nn.Module, target: Tensor) -> None:
        super().__init__()
        self.model, self.target = model, target

    def forward(self, images: Tensor) -> Tensor:
        logits = logits_of(self.model, images)
        check_classes(self.target, logits.shape[-1])
        return logits


def _last_norm(model: nn.Module) -> nn.Module:
    """The norm before the last attention: after it only the tokens that are read would get a gradient."""
    blocks: Any = getattr(getattr(model, "network", model), "blocks", None)
    if blocks is None:
        raise ConfigError(
            f"methods=pytorch_grad_cam: {type(model).__name__} has no `blocks` over one grid of tokens; "
            "methods=grad_cam and relevance go through windows and patch merging"
        )
    last = blocks[-1]
    for owner, name in ((last, "norm1"), (last, "norm_out"), (getattr(last, "attention", None), "norm")):
        if isinstance(norm := getattr(owner, name, None), nn.Module):
            return norm
    raise ConfigError(f"{type(model).__name__}: Grad-CAM knows no norm in its last block")


@contextmanager
def _explaining(model: nn.Module, images: Tensor, target: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model that returns logits, and images that need gradients; the parameters' gradients are restored."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield _Logits(model, target), images.detach().clone().requires_grad_()
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


METHODS: dict[str, Method] = {
    "attention": _of_attention(
        lambda weights: fuse(weights[-1]), lambda weights, windows: received(fuse(weights[-1]), windows)
    ),
    "rollout": _of_attention(rollout, windowed_rollout),
    "gradient_rollout": _of_gradients(gradient_rollout, windowed_gradient_rollout),
    "relevance": _of_gradients(relevance, windowed_relevance),
    "grad_cam": _of_gradients(attention_grad_cam, windowed_grad_cam),
    "pytorch_grad_cam": pytorch_grad_cam,
    "integrated_gradients": _integrated_gradients,
    "random": _random,
}
EXTRAS = {"pytorch_grad_cam": "pytorch_grad_cam", "integrated_gradients": "captum.attr"}
"""those that need the extra `explain`, and which of its modules"""
CLASS_SPECIFIC = {"gradient_rollout", "relevance", "grad_cam", "pytorch_grad_cam", "integrated_gradients"}
"""those whose maps depend on the class"""
