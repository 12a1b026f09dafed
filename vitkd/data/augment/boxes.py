"""Random boxes within an image, drawn as torchvision draws those it crops and those it erases.

Each attempt draws an area and an aspect ratio, and the first box that fits into the image is taken. All
attempts are computed at once, so that nothing waits for the device.

Shapes: B batch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.data.hashing import uniform, uniform_int

ATTEMPTS = 10
# Of crops, width / height; 1 over the largest is the smallest.
_MAX_RATIO = 4 / 3


class Boxes(NamedTuple):
    """A part of each image, in pixels, inside the image.

    Args:
        top, left: [B] int64, the first row and column.
        height, width: [B] int64, at least 1.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def draw_boxes(bits: Tensor, area: list[float], height: int, width: int) -> Boxes:
    """The boxes of torchvision's RandomResizedCrop, as a function of random bits.

    Where none of the attempts fits it is the central one.

    Args:
        bits: [attempts, 4, B] int64: 64 random bits each for area, aspect ratio, top and left.
        area: (smallest, largest) share of the image's area.
        height, width: of the images, in pixels.
    """
    box_height, box_width = draw_sizes(bits, area, [1 / _MAX_RATIO, _MAX_RATIO], height * width)
    fits = (box_height > 0) & (box_height <= height) & (box_width > 0) & (box_width <= width)
    drawn, found = first_that_fits(bits, box_height, box_width, fits, height, width)
    central = central_box(height, width)
    return Boxes(*(torch.where(found, *pair) for pair in zip(drawn, central, strict=True)))


def draw_sizes(bits: Tensor, area: list[float], ratio: list[float], pixels: int) -> tuple[Tensor, Tensor]:
    """The sides of boxes, each [attempts, B] int64; `ratio` is the second by the first. Some may not fit.

    Args:
        bits: [attempts, 4, B] int64, of which the first two of the 4 are used.
        area: (smallest, largest) share of the image's area.
        ratio: (smallest, largest) aspect ratio; its logarithm is distributed evenly.
        pixels: of the image.
    """
    share = area[0] + (area[1] - area[0]) * uniform(bits[:, 0])
    low, high = (math.log(each) / 2 for each in ratio)
    root_ratio = torch.exp((2 * uniform(bits[:, 1]) - 1) * ((high - low) / 2) + (high + low) / 2)
    side = torch.sqrt(share * pixels)
    return (side / root_ratio).round().long(), (side * root_ratio).round().long()


def first_that_fits(
    bits: Tensor, box_height: Tensor, box_width: Tensor, fits: Tensor, height: int, width: int
) -> tuple[Boxes, Tensor]:
    """Of each image's boxes the first that fits, at a random place, and whether any does, [B] bool.

    Args:
        bits: [attempts, 4, B] int64, of which the last two of the 4 are used.
        box_height, box_width, fits: [attempts, B].
        height, width: of the images.
    """
    attempts = len(bits)
    first = torch.where(fits, torch.arange(attempts, device=bits.device)[:, None], attempts).amin(0)
    chosen = first.clamp_max(attempts - 1)[None]
    # Meaningless for boxes that do not fit, which are not chosen.
    top = uniform_int(bits[:, 2], height - box_height + 1)
    left = uniform_int(bits[:, 3], width - box_width + 1)
    drawn = (values.gather(0, chosen)[0] for values in (top, left, box_height, box_width))
    return Boxes(*drawn), first < attempts


def central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, box height, box width): the largest central box with an aspect ratio of 3/4 to 4/3."""
    box_height = min(height, round(width * _MAX_RATIO))
    box_width = min(width, round(height * _MAX_RATIO))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
