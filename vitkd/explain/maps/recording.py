"""One forward pass of a model, with everything that explanations read of it.

Shapes: B images, C channels, H heads, T tokens (prefix + h·w), h × w patches, D embed_dim, K classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkd.explain.maps.hooks import check_size, layout_of_timm, trace_by_hooks
from vitkd.models import Model
from vitkd.models.base import Trace


class Layout(NamedTuple):
    """Where the patches stand among a model's tokens."""

    prefix: int
    """tokens before the patches: class token, distillation token, registers"""
    grid: tuple[int, int]
    """h rows of w patches"""
    readers: Sequence[int] = (0,)
    """the tokens that the classifier reads: the class token; that and the distillation token, where the
    prediction is the mean of two heads; or the patches, where it pools these"""
    sees_itself: bool = True
    """whether a token may attend to itself; in locality attention it may not"""


class Recording(NamedTuple):
    """What a forward pass computed; in the autograd graph unless recorded under `torch.no_grad`."""

    logits: Tensor
    """[B, K]"""
    weights: tuple[Tensor, ...]
    """per block: the softmax's [B, H, T, T] that multiplied the values"""
    tokens: tuple[Tensor, ...]
    """per block: [B, T, D] after it"""
    prefix: int
    grid: tuple[int, int]
    readers: Sequence[int] = (0,)
    sees_itself: bool = True


def record(model: nn.Module, images: Tensor) -> Recording:
    """Classify normalised images [B, C, H, W] in eval mode and keep every block's weights and tokens.

    Takes vitkd's models with attention maps and timm's VisionTransformer with its relatives. The model is
    left as it was: its mode, its hooks and its fused attention, after an error too.

    Raises ConfigError if the attention maps cannot be recorded, naming the cause.
    """
    place = layout(model, images)
    if torch.is_grad_enabled() and not images.requires_grad:
        # Else nothing of a frozen teacher would be in the graph.
        images = images.detach().requires_grad_()
    with evaluating(model):
        if isinstance(model, Model):
            trace = model.trace(images)
        else:
            trace = Trace(*trace_by_hooks(model, images, place.prefix, place.grid))
    return Recording(*trace, **place._asdict())


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """[B, K], whether the model returns the logits alone or among its outputs."""
    output = model(images)
    return getattr(output, "logits", output)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards every module is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_maps(model: nn.Module) -> bool:
    """Whether attention maps of the whole image can be asked for; a model that is not vitkd's is tried."""
    return not isinstance(model, Model) or {each.windows for each in model.attention} == {1}


def layout(model: nn.Module, images: Tensor) -> Layout:
    """Where `model` puts the patches of images [B, C, H, W].

    Raises ConfigError if it has none that could be laid out, or takes images of another size.
    """
    if isinstance(model, Model) and has_maps(model):
        c = model.config
        check_size(images.shape[-3:], (c.channels, c.image_size, c.image_size))
        return own_layout(model)
    return Layout(*layout_of_timm(model, images))


def own_layout(model: Model) -> Layout:
    """The layout of a vitkd model that has attention maps."""
    first = model.attention[0]
    sees_itself = first.mask is None or bool(first.mask.diagonal().all())
    return Layout(first.prefix, first.grid, first.readers, sees_itself)


def who_reads(place: Layout | Recording) -> str:
    """The tokens that the classifier reads, in words for a caption."""
    if place.readers[0] >= place.prefix:
        return "patches"
    return "class token" if len(place.readers) == 1 else "class and distillation tokens"
