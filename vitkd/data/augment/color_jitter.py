"""Random brightness, contrast, saturation and hue, as torchvision's ColorJitter changes them.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.data.augment.base import Augmentation, where_needed
from vitkd.data.augment.operations import Operation, enhance
from vitkd.data.hashing import random_bits, uniform
from vitkd.data.levels import rounded, rounded_down
from vitkd.errors import check


@dataclass
class ColorJitter(Augmentation):
    """Each image's own random factors, applied in a random order.

    Args:
        brightness, contrast, saturation: factors lie from 1 − this, but at least 0, to 1 + this.
        hue: the greatest turn of the colour circle, either way; 0.5 is half of it.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            check(self, name, 0 <= getattr(self, name) < math.inf, "must be a finite number, 0 or more")
        check(self, "hue", 0 <= self.hue <= 0.5, "must lie in [0, 0.5]")

    def apply(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        order, amounts = random_bits(key, index, 8).view(2, 4, -1)
        order, amounts = order.argsort(0), self.amounts(uniform(amounts))
        pixels = rounded(pixels)
        for which, amount in zip(order, amounts.gather(0, order), strict=True):
            is_hue = which == 3
            operation = torch.where(is_hue, Operation.IDENTITY, Operation.BRIGHTNESS + which)
            pixels = where_needed(enhance, ~is_hue, pixels, operation, amount)
            if self.hue:
                pixels = where_needed(turn_hue, is_hue, pixels, torch.where(is_hue, amount, 0))
        return pixels

    def amounts(self, uniform: Tensor) -> Tensor:
        """By how much factors exceed 1, and the turn of the hue: [4, B], of numbers in [0, 1)."""
        ranges = [(max(-x, -1), x) for x in (self.brightness, self.contrast, self.saturation)]
        ranges.append((-self.hue, self.hue))
        return torch.stack([low + (high - low) * u for (low, high), u in zip(ranges, uniform, strict=True)])


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV, as torchvision's `adjust_hue`; grey images have none.

    Args:
        pixels: [B, C, H, W] uint8.
        turn: [B], 1 for the whole circle.

    Returns:
        [B, C, H, W] uint8.
    """
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.to(torch.float32).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red = (red == value).to(torch.float32)
    is_green = (green == value).to(torch.float32) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    # In sixths of the circle from red on; any where there is no chroma.
    offset = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = offset / chroma.clamp_min(1) + 2 * is_green + 4 * is_blue + 6 * turn[:, None, None]
    turned = [value - chroma * lack(hue + start) for start in (5, 3, 1)]
    # Torchvision scales to 0..255.999 and rounds down.
    return rounded_down(torch.stack(turned, dim=1) * (255.999 / 255))


def lack(hue: Tensor) -> Tensor:
    """By how many chromas a channel is below the brightest: 0, 1 or, on a slope, in between.

    `hue` is in sixths of the circle from where the channel has the first of two sixths of slope.
    """
    sixths = hue - 6 * (hue / 6).floor()
    return torch.minimum(sixths, 4 - sixths).clamp_(0, 1)
