"""What timm's code says of a model before any of its weights has memory."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models import group_parameters
from timm.models.tnt import PixelEmbed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitkd.errors import ConfigError
from vitkd.models.base import count_parameters
from vitkd.models.output import AttentionLayout
from vitkd.models.timm.architectures import encoder_of
from vitkd.models.timm.create import check_options, created


class Facts(NamedTuple):
    """What a model is, and which images it was trained to see."""

    architecture: str
    """its class in timm"""
    layouts: Mapping[str, tuple[AttentionLayout, ...]]
    """by part: of each block's attention; none if that cannot be read"""
    size: tuple[int, int]
    """of its images, in pixels from top to bottom and from left to right"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    parameters: int
    drops: bool
    """whether training draws random numbers"""
    normalises_batches: bool
    has_distillation_token: bool


@lru_cache(maxsize=32)
def facts_of(name: str, num_classes: int, options: str) -> Facts:
    """The facts of `timm.create_model(name, …)` with JSON `options`; ConfigError if it cannot be built."""
    settings = json.loads(options)
    with torch.device("meta"):
        check_options(name, settings)
        network = created(name, num_classes, settings).eval()
    cfg: dict[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    size = size_of(network, cfg)
    check_patches(network, size)
    encoder, modules = encoder_of(network), [*network.modules()]
    layouts = {part: each.layouts() for part, each in encoder.parts.items()} if encoder is not None else {}
    check_answer(name, network, (cfg["input_size"][0], *size), num_classes)
    return Facts(
        type(network).__name__,
        layouts,
        size,
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cfg["interpolation"],
        count_parameters(network),
        drops=any(getattr(each, "p", 0) or getattr(each, "drop_prob", 0) for each in modules),
        normalises_batches=any(isinstance(each, _BatchNorm) for each in modules),
        has_distillation_token=encoder is not None and hasattr(network, "head_dist"),
    )


def layers_of(network: Any) -> dict[str, int]:
    """Each parameter's name → the number of its layer, as timm counts them for layer-wise learning rates."""
    layers: dict[str, int] = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    return layers


def size_of(network: nn.Module, cfg: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the images that a network takes."""
    height, width = getattr(embedding_of(network), "img_size", None) or cfg["input_size"][-2:]
    return height, width


def embedding_of(network: nn.Module) -> nn.Module | None:
    """The layer that cuts images into patches, if there is one."""
    return getattr(network, "patch_embed", getattr(network, "pixel_embed", None))


def check_patches(network: nn.Module, size: tuple[int, int]) -> None:
    """ConfigError if the patches of a network leave out a rest of images of this size."""
    embed = embedding_of(network)
    if not isinstance(embed, PatchEmbed | PixelEmbed) or getattr(embed, "dynamic_img_pad", False):
        return
    patches: Any = embed.patch_size
    for pixels, patch in zip(size, patches, strict=True):
        if pixels % patch:
            below, above = pixels - pixels % patch, pixels + -pixels % patch
            fits = f"{below} or {above}" if below else str(above)
            raise ConfigError(f"img_size={pixels}: patch_size={patch} does not divide it; choose {fits}")


def check_answer(name: str, network: nn.Module, image: tuple[int, int, int], num_classes: int) -> None:
    """ConfigError unless the network, which has no memory, answers an image [C, H, W] with logits."""
    try:
        logits = network(torch.empty(1, *image, device="meta"))
    except Exception as error:
        raise ConfigError(f"name={name}: does not take images of {image[1]}×{image[2]} pixels") from error
    if getattr(logits, "shape", None) != (1, num_classes):
        raise ConfigError(f"name={name}: does not answer with one logit a class; choose a classifier")
