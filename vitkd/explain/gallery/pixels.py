"""Pixels: of a picture file, as a model takes them, and as a figure shows them.

Shapes: B images, C channels, H × W pixels, g patches along one side.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vitkd.errors import ConfigError
from vitkd.models import Model

log = logging.getLogger("vitkd")


class Format(NamedTuple):
    """The images that a model takes."""

    size: int
    """pixels a side"""
    channels: int
    mean: Sequence[float]
    std: Sequence[float]


def format_of(model: nn.Module) -> Format:
    """What a model takes, as far as it says so."""
    if isinstance(model, Model):
        channels = model.config.channels
        log.warning("warning: the model does not say how images are normalised; 0.5 ± 0.5 is assumed")
        return Format(model.config.image_size, channels, [0.5] * channels, [0.5] * channels)
    stated: Mapping[str, Any] = getattr(model, "pretrained_cfg", {})
    channels, _, size = stated.get("input_size", (3, 224, 224))
    return Format(size, channels, stated.get("mean", [0.5] * channels), stated.get("std", [0.5] * channels))


def read_picture(path: Path, size: int, channels: int) -> Tensor:
    """A picture's middle square as [C, size, size] in 0..1; ConfigError if it cannot be read."""
    try:
        with Image.open(path) as file:
            turned = ImageOps.exif_transpose(file).convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"image={path}: cannot be read as a picture ({type(error).__name__})") from error
    fitted = ImageOps.fit(turned, (size, size), Image.Resampling.BILINEAR)
    array = np.asarray(fitted, np.float32) / 255
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels [..., C, H, W] in 0..1 as a model takes them; `mean` and `std` hold one value a channel."""
    shift, scale = (pixels.new_tensor(each)[:, None, None] for each in (mean, std))
    return (pixels - shift) / scale


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels in 0..1 of normalised images [B, C, H, W]; `mean` and `std` hold one value a channel."""
    shift, scale = (images.new_tensor(each)[:, None, None] for each in (mean, std))
    return (images * scale + shift).clamp(0, 1)


def upsample(maps: Tensor, size: int) -> Tensor:
    """Maps [B, g, g] interpolated bilinearly to [B, size, size] pixels."""
    resized = interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)
    return resized.squeeze(1)
