"""Augmentation and normalisation of uint8 images, a whole batch at once on its device.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data.hashing import random_bits, uniform, uniform_int
from vitkd.errors import ConfigError

# Torchvision's RandomResizedCrop: width / height is between 3/4 and 4/3; up to ten boxes are drawn.
_MAX_RATIO = 4 / 3
_ATTEMPTS = 10


@dataclass
class Augment:
    """Random augmentation of training images; validation and test images are never augmented.

    Args:
        crop_padding: random crop after padding each side with this many black pixels; 0 for none.
        flip: flip left to right with probability 1/2.
        resized_crop: random crop, resized to the image's size; (smallest, largest) share of the image's
            area, at an aspect ratio of 3/4 to 4/3; null for none.

    Raises:
        ConfigError: a setting is out of range, or both crops are on.
    """

    crop_padding: int = 0
    flip: bool = False
    resized_crop: list[float] | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(f"crop_padding={self.crop_padding} must be 0 or more; 0 turns the crop off")
        if self.resized_crop is None:
            return
        area = list(self.resized_crop)
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ConfigError(
                f"resized_crop={area} must be two shares of the area, 0 < smallest <= largest <= 1;"
                " for example [0.5, 1.0], or null for none"
            )
        if self.crop_padding:
            raise ConfigError(
                f"crop_padding={self.crop_padding} and resized_crop={area} are both crops;"
                " set crop_padding=0 or resized_crop=null"
            )

    @property
    def is_random(self) -> bool:
        """Whether an image may look different in each epoch."""
        return bool(self.flip or self.crop_padding or self.resized_crop)

    def apply(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """A random view of each image, a pure function of (key, index).

        Args:
            pixels: [B, C, H, W] uint8.
            index: [B] int64, of each image in its split.
            key: 0-dim int64, made from the seed and the epoch.

        Returns:
            [B, C, H, W] uint8 or float32, in 0..255.
        """
        if not self.is_random:
            return pixels
        bits = random_bits(key, index, 1 + 4 * _ATTEMPTS if self.resized_crop else 3)
        flip_bits, crop_bits = bits[0], bits[1:]
        flipped = (flip_bits < 0) if self.flip else torch.zeros_like(flip_bits, dtype=torch.bool)
        if self.resized_crop is not None:
            attempts = crop_bits.view(_ATTEMPTS, 4, len(index))
            boxes = draw_boxes(attempts, self.resized_crop, pixels.shape[-2], pixels.shape[-1])
            return resized_crop(pixels, boxes, flipped)
        down, right = uniform_int(crop_bits, 2 * self.crop_padding + 1)
        return padded_crop(pixels, down - self.crop_padding, right - self.crop_padding, flipped)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, C, H, W] in 0..255 → (pixels / 255 − mean) / std as float32; mean and std are [C]."""
    scale = 1 / (255 * std)
    return pixels.to(torch.float32).mul(scale[:, None, None]).sub_((mean / std)[:, None, None])


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
