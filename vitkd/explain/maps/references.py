"""Methods of other packages, to check ours against: Grad-CAM of tokens, integrated gradients of pixels.

They need `pip install 'vitkd[explain]'`.

Shapes: B images, C channels, T tokens (prefix + h·w), h × w patches, D embed_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError
from vitkd.explain.maps.flow import check_classes
from vitkd.explain.maps.hooks import from_extra
from vitkd.explain.maps.recording import evaluating, layout, logits_of

EXTRA = "explain"


def grad_cam(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """pytorch-grad-cam's GradCAM of the tokens that enter the last attention, as maps [B, h, w] in 0..1.

    Args:
        images: [B, C, H, W], normalised.
        target: [B] class indices.

    Raises:
        ConfigError: grad-cam is not installed, or the model's patches cannot be laid out.
    """
    package = from_extra("pytorch_grad_cam", EXTRA)
    targets = from_extra("pytorch_grad_cam.utils.model_targets", EXTRA)
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
    captum = from_extra("captum.attr", EXTRA)
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
    last: Any = model.blocks[-1]  # type: ignore[index]
    norm = getattr(last, "norm1", None) or getattr(getattr(last, "attention", None), "norm", None)
    if not isinstance(norm, nn.Module):
        raise ConfigError(f"{type(model).__name__}: its last block has no `norm1` for Grad-CAM to read")
    return norm


@contextmanager
def _explaining(model: nn.Module, images: Tensor, target: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model that returns logits, and images that need gradients; the parameters' gradients are restored."""
    parameters = [*model.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield _Logits(model, target), images.detach().clone().requires_grad_()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
