"""Crops and flips.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data.hashing import uniform, uniform_int

# Torchvision's RandomResizedCrop: width / height is between 3/4 and 4/3; up to ten boxes are drawn.
_MAX_RATIO = 4 / 3
ATTEMPTS = 10


def padded_crop(pixels: Tensor, down: Tensor, right: Tensor, flipped: Tensor) -> Tensor:
    """Crop a window of the image's size, moved relative to the image, then flip it; in one gather.

    Args:
        pixels: [B, C, H, W].
        down, right: [B] int64, how far the window moves, in pixels; outside the image everything is 0.
        flipped: [B] bool.

    Returns:
        [B, C, H, W], of the dtype of `pixels`.
    """
    B, C, H, W = pixels.shape
    row = torch.arange(H, device=pixels.device) + down[:, None]
    column = torch.arange(W, device=pixels.device).expand(B, W)
    column = torch.where(flipped[:, None], W - 1 - column, column) + right[:, None]
    inside = ((row >= 0) & (row < H))[:, :, None] & ((column >= 0) & (column < W))[:, None, :]
    # Positions outside the image read one black pixel, appended to each plane.
    source = torch.where(inside, row[:, :, None] * W + column[:, None, :], H * W)
    planes = F.pad(pixels.flatten(2), (0, 1))
    return planes.gather(2, source.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


class Boxes(NamedTuple):
    """The part of each image to crop, in pixels, inside the image.

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

    Each attempt draws an area and an aspect ratio, and the first box that fits into the image is taken; if
    none fits, the central one. All attempts are computed at once, so that nothing waits for the device.

    Args:
        bits: [attempts, 4, B] int64: 64 random bits each for area, aspect ratio, top and left.
        area: (smallest, largest) share of the image's area.
        height, width: of the images, in pixels.
    """
    box_height, box_width = _draw_sizes(bits, area, height * width)
    fits = (box_height > 0) & (box_height <= height) & (box_width > 0) & (box_width <= width)
    attempts = len(bits)
    first = torch.where(fits, torch.arange(attempts, device=bits.device)[:, None], attempts).amin(0)
    chosen = first.clamp_max(attempts - 1)[None]
    # Meaningless for boxes that do not fit, which are not chosen.
    top = uniform_int(bits[:, 2], height - box_height + 1)
    left = uniform_int(bits[:, 3], width - box_width + 1)
    drawn = (values.gather(0, chosen)[0] for values in (top, left, box_height, box_width))
    central = central_box(height, width)
    return Boxes(*(torch.where(first < attempts, *pair) for pair in zip(drawn, central, strict=True)))


def _draw_sizes(bits: Tensor, area: list[float], pixels: int) -> tuple[Tensor, Tensor]:
    """Box heights and widths, each [attempts, B] int64, for [attempts, 4, B] bits; some may not fit."""
    share = area[0] + (area[1] - area[0]) * uniform(bits[:, 0])
    root_ratio = torch.exp((2 * uniform(bits[:, 1]) - 1) * (math.log(_MAX_RATIO) / 2))
    side = torch.sqrt(share * pixels)
    return (side / root_ratio).round().long(), (side * root_ratio).round().long()


def central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, box height, box width): the largest central box with an aspect ratio of 3/4 to 4/3."""
    box_height = min(height, round(width * _MAX_RATIO))
    box_width = min(width, round(height * _MAX_RATIO))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_crop(pixels: Tensor, boxes: Boxes, flipped: Tensor) -> Tensor:
    """Crop each image's box, enlarge it bilinearly to the image's size, then flip it.

    Args:
        pixels: [B, C, H, W].
        boxes: one for each image.
        flipped: [B] bool.

    Returns:
        [B, C, H, W] float32.
    """
    H, W = pixels.shape[-2:]
    y = _sampling_points(boxes.top, boxes.height, H)
    x = _sampling_points(boxes.left, boxes.width, W)
    x = torch.where(flipped[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(pixels.to(torch.float32), grid, mode="bilinear", align_corners=True)


def _sampling_points(start: Tensor, length: Tensor, size: int) -> Tensor:
    """[B, size]: `size` points spread evenly over each box, in grid_sample's coordinates, −1..1."""
    start, length = start[:, None], length[:, None]
    step = (torch.arange(size, device=start.device) + 0.5) / size
    # Clamped to the box, so that pixels outside it are not blended in.
    position = torch.clamp(start + step * length - 0.5, start, start + length - 1)
    return position * (2 / max(size - 1, 1)) - 1
