"""The levels of pixels, 0 to 255, and what they become for a model."""

import torch
from torch import Tensor

LEVELS = 256


def rounded(pixels: Tensor) -> Tensor:
    """Pixels in 0..255 as uint8; those that have fractions, as resized ones, are rounded."""
    return pixels if pixels.dtype == torch.uint8 else pixels.round().to(torch.uint8)


def rounded_down(levels: Tensor) -> Tensor:
    """Levels in 0..255 as uint8; by way of int16, which takes a CPU a third of the time."""
    return levels.to(torch.int16).to(torch.uint8)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, C, H, W] in 0..255 → (pixels / 255 − mean) / std as float32; mean and std are [C]."""
    scale = 1 / (255 * std)
    return pixels.to(torch.float32).mul(scale[:, None, None]).sub_((mean / std)[:, None, None])
