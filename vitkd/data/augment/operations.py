"""The image operations of AutoAugment and its successors, on a batch of which each image has its own.

Three passes take the place of a call for each image:

- `warp`, an affine map of positions: shears, translations, rotation;
- `enhance`, a blend with a degenerate image, as in Pillow's ImageEnhance: brightness with black, contrast
  with the mean grey, colour with the grey image, sharpness with the blurred one;
- `remap`, a table from old to new levels: posterize, solarize, invert, autocontrast, equalize.

A pass leaves the images of the other two as they are. So no GPU has to tell the host which image needs what,
and an image's result does not depend on its batch. The results are torchvision's, of `v2.functional` for
uint8 with the nearest neighbour and black beyond the image.

Shapes: B batch, C channels (1 or 3), H and W pixels.
"""

from enum import IntEnum, auto

import torch
from torch import Tensor

from vitkd.data.augment.base import where_needed
from vitkd.data.augment.crop import pixels_at
from vitkd.data.levels import LEVELS, rounded_down


class Operation(IntEnum):
    """What is done to an image, and what its magnitude says, if anything."""

    IDENTITY = 0
    SHEAR_X = auto()
    """pixels to the left for each row"""
    SHEAR_Y = auto()
    """pixels up for each column"""
    TRANSLATE_X = auto()
    """pixels to the right"""
    TRANSLATE_Y = auto()
    """pixels down"""
    ROTATE = auto()
    """degrees, counter-clockwise"""
    BRIGHTNESS = auto()
    """of this and the next three: by how much the factor exceeds 1"""
    CONTRAST = auto()
    COLOR = auto()
    SHARPNESS = auto()
    POSTERIZE = auto()
    """bits that are kept"""
    SOLARIZE = auto()
    """share of 255 from which on levels are inverted"""
    AUTOCONTRAST = auto()
    EQUALIZE = auto()
    INVERT = auto()
    """at the end, for only AutoAugment has it"""


# Which operations each pass does.
WARPED = range(Operation.SHEAR_X, Operation.ROTATE + 1)
ENHANCED = range(Operation.BRIGHTNESS, Operation.SHARPNESS + 1)
REMAPPED = range(Operation.POSTERIZE, Operation.INVERT + 1)


def operate(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Each image after its operation.

    Args:
        pixels: [B, C, H, W] uint8.
        operation: [B] int64, of each image, as in `Operation`.
        magnitude: [B] float32.

    Returns:
        [B, C, H, W] uint8.
    """
    for change, its in ((warp, WARPED), (enhance, ENHANCED), (remap, REMAPPED)):
        needed = (operation >= its.start) & (operation < its.stop)
        pixels = where_needed(change, needed, pixels, operation, magnitude)
    return pixels


def warp(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Shear, translate or rotate: each pixel is the one nearest to where it comes from. As `operate`.

    Of two that are equally near, rounding takes one, and not always torchvision's. Shears leave the upper
    left corner where it is, rotations the centre.
    """
    H, W = pixels.shape[-2:]
    shear_x, shear_y, right, down, angle = (
        torch.where(operation == each, magnitude, 0)[:, None, None] for each in WARPED
    )
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    # Counted from the centre, and again from the upper left.
    x = torch.arange(W, device=pixels.device) - (W - 1) / 2
    y = (torch.arange(H, device=pixels.device) - (H - 1) / 2)[:, None]
    column = cos * x - sin * y + shear_x * (y + H / 2) - right + (W - 1) / 2
    row = sin * x + cos * y + shear_y * (x + W / 2) - down + (H - 1) / 2
    return pixels_at(pixels, row.round(), column.round())


def enhance(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """image + magnitude · (image − degenerate image), for those that are enhanced. As `operate`."""
    brightness, contrast, color, sharpness = (
        (operation == each).to(torch.float32)[:, None, None, None] for each in ENHANCED
    )
    levels, magnitude = pixels.to(torch.float32), magnitude[:, None, None, None]
    grey = greyscale(levels)
    degenerate = contrast * mean_level(grey) + color * grey
    result = torch.addcmul(levels, (brightness + contrast + color) * magnitude, levels - degenerate)
    # The edges have too few neighbours to be sharpened.
    inner = result[..., 1:-1, 1:-1]
    inner += sharpness * magnitude * (inner - blurred(levels))
    return rounded_down(result.clamp_(0, 255))


def greyscale(levels: Tensor) -> Tensor:
    """The luma (ITU-R BT.601), rounded down: [B, C, H, W] → [B, 1, H, W]; grey images stay as they are."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def mean_level(grey: Tensor) -> Tensor:
    """The mean of whole levels, [B, 1, H, W] → [B, 1, 1, 1]; their sum is exact, in whatever order."""
    return grey.to(torch.int32).sum((2, 3), keepdim=True).to(torch.float32) / grey.shape[2:].numel()


def blurred(levels: Tensor) -> Tensor:
    """3×3 means in which the middle counts five times, rounded: [B, C, H, W] → [B, C, H − 2, W − 2]."""
    rows = levels[..., :-2, :] + levels[..., 1:-1, :] + levels[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    return total.add_(levels[..., 1:-1, 1:-1], alpha=4).div_(13).round_()


def remap(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """New levels for old ones, by a table for each channel of each image. As `operate`."""
    chosen, places = operation[:, None, None], pixels.flatten(2).long()
    table = fixed_table(operation, magnitude)[:, None]
    table = torch.where(chosen == Operation.AUTOCONTRAST, stretching_table(pixels), table)
    table = torch.where(chosen == Operation.EQUALIZE, equalizing_table(pixels, places), table)
    return rounded_down(table).gather(2, places).view_as(pixels)


def fixed_table(operation: Tensor, magnitude: Tensor) -> Tensor:
    """Of posterize, solarize and invert, whatever the image: [B, 256]."""
    level = torch.arange(LEVELS, device=operation.device)
    bits = torch.where(operation == Operation.POSTERIZE, magnitude, 8).long()[:, None]
    first = torch.where(operation == Operation.SOLARIZE, 255 * magnitude, LEVELS)
    first = torch.where(operation == Operation.INVERT, 0, first)[:, None]
    return torch.where(level >= first, 255 - level, level >> (8 - bits) << (8 - bits)).to(torch.float32)


def stretching_table(pixels: Tensor) -> Tensor:
    """Of autocontrast: each channel's levels are stretched to 0..255, if it has two: [B, C, 256]."""
    level = torch.arange(LEVELS, device=pixels.device, dtype=torch.float32)
    darkest, brightest = extremes(pixels)
    stretched = (level - darkest) / ((brightest - darkest) * (1 / 255))
    return torch.where(darkest == brightest, level, stretched.clamp_(0, 255))


def equalizing_table(pixels: Tensor, places: Tensor) -> Tensor:
    """Of equalize: each level becomes the share of darker pixels, rounded as by Pillow: [B, C, 256].

    `places` are the pixels as [B, C, H·W] int64. Numbers of pixels are exact in float32, below 2²⁴.
    """
    level = torch.arange(LEVELS, device=pixels.device, dtype=torch.float32)
    counts = torch.zeros(*places.shape[:2], LEVELS, device=pixels.device)
    counts.scatter_add_(2, places, torch.ones((), device=pixels.device).expand_as(places))
    darker = counts.cumsum(2) - counts
    # Of all pixels but those of the brightest level.
    step = (darker.gather(2, extremes(pixels)[1].long()) / 255).floor_()
    equalized = ((darker + (step / 2).floor_()) / step.clamp_min(1)).floor_().clamp_max_(255)
    return torch.where(step == 0, level, equalized)


def extremes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level of each channel: [B, C, 1] float32."""
    lowest, highest = pixels.amin((2, 3)), pixels.amax((2, 3))
    return lowest[..., None].to(torch.float32), highest[..., None].to(torch.float32)
