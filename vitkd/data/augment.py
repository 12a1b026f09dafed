"""uint8 pixels → the float32 view that a model sees, for a whole batch on its device.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data.hashing import below, random_bits, uniform
from vitkd.errors import ConfigError

# RandomResizedCrop as torchvision has it: width / height is 3/4 to 4/3, and a box is drawn up to ten times.
_MAX_RATIO = 4 / 3
_ATTEMPTS = 10


@dataclass
class Augment:
    """How training images are varied. Evaluation never is.

    Args:
        crop_padding: shift by up to this many pixels each way; what comes in is black.
        flip: mirror left-right with probability 1/2.
        resized_crop: (least, largest) share of the image's area to cut out and enlarge back, at an aspect
            ratio of 3/4 to 4/3; null for none.
    """

    crop_padding: int = 0
    flip: bool = False
    resized_crop: list[float] | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ConfigError(
                f"augment.crop_padding={self.crop_padding} must be 0 or more; 0 switches the crop off"
            )
        if self.resized_crop is None:
            return
        area = list(self.resized_crop)
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ConfigError(
                f"augment.resized_crop={area} must be two shares of the area, 0 < least <= largest <= 1;"
                " for example [0.5, 1.0], or null for none"
            )
        if self.crop_padding:
            raise ConfigError(
                f"augment.crop_padding={self.crop_padding} and augment.resized_crop={area} are both crops;"
                " set crop_padding=0 or resized_crop=null"
            )

    @property
    def varies(self) -> bool:
        """Whether an image may look different from epoch to epoch."""
        return bool(self.flip or self.crop_padding or self.resized_crop)

    def vary(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """A random view of each image, a pure function of (key, index).

        Args:
            pixels: [B, C, H, W] uint8.
            index: [B] int64, the images' own numbers.
            key: 0-dim int64, of the seed and the epoch.

        Returns:
            [B, C, H, W], uint8 or float32, still in 0..255.
        """
        if not self.varies:
            return pixels
        bits = random_bits(key, index, 1 + 4 * _ATTEMPTS if self.resized_crop else 3)
        flip_bits, crop_bits = bits[0], bits[1:]
        mirrored = (flip_bits < 0) if self.flip else torch.zeros_like(flip_bits, dtype=torch.bool)
        if self.resized_crop is not None:
            attempts = crop_bits.view(_ATTEMPTS, 4, len(index))
            boxes = draw_boxes(attempts, self.resized_crop, pixels.shape[-2], pixels.shape[-1])
            return crop_resized(pixels, boxes, mirrored)
        down, right = below(crop_bits, 2 * self.crop_padding + 1)
        return crop_shifted(pixels, down - self.crop_padding, right - self.crop_padding, mirrored)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, C, H, W] in 0..255 → (pixels / 255 − mean) / std as float32; mean and std are [C]."""
    scale = 1 / (255 * std)
    return pixels.to(torch.float32).mul(scale[:, None, None]).sub_((mean / std)[:, None, None])


def crop_shifted(pixels: Tensor, down: Tensor, right: Tensor, mirrored: Tensor) -> Tensor:
    """Windows of each image's own size, moved and then perhaps mirrored, in one gather.

    Args:
        pixels: [B, C, H, W].
        down, right: [B] int64, how far the window moves; outside the image everything is 0.
        mirrored: [B] bool.
    """
    B, C, H, W = pixels.shape
    row = torch.arange(H, device=pixels.device) + down[:, None]
    column = torch.arange(W, device=pixels.device).expand(B, W)
    column = torch.where(mirrored[:, None], W - 1 - column, column) + right[:, None]
    inside = ((row >= 0) & (row < H))[:, :, None] & ((column >= 0) & (column < W))[:, None, :]
    # One black pixel past the end of each plane is where everything outside the image points.
    source = torch.where(inside, row[:, :, None] * W + column[:, None, :], H * W)
    planes = F.pad(pixels.flatten(2), (0, 1))
    return planes.gather(2, source.view(B, 1, H * W).expand(B, C, H * W)).view(B, C, H, W)


class Boxes(NamedTuple):
    """Where each image is cropped, in pixels.

    Args:
        top, left: [B] int64, of the first row and column.
        height, width: [B] int64, at least 1; the box lies inside the image.
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
    # Where a box does not fit, these are meaningless, and not chosen.
    top, left = below(bits[:, 2], height - box_height + 1), below(bits[:, 3], width - box_width + 1)
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


def crop_resized(pixels: Tensor, boxes: Boxes, mirrored: Tensor) -> Tensor:
    """Each image's box, enlarged bilinearly to the image's own size and then perhaps mirrored.

    Args:
        pixels: [B, C, H, W].
        boxes: one for each image.
        mirrored: [B] bool.

    Returns:
        [B, C, H, W] float32.
    """
    H, W = pixels.shape[-2:]
    y = _sampling_points(boxes.top, boxes.height, H)
    x = _sampling_points(boxes.left, boxes.width, W)
    x = torch.where(mirrored[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return F.grid_sample(pixels.to(torch.float32), grid, mode="bilinear", align_corners=True)


def _sampling_points(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where `size` pixels spread over a box fall, [B, size], in grid_sample's −1..1 from end to end."""
    start, length = start[:, None], length[:, None]
    step = (torch.arange(size, device=start.device) + 0.5) / size
    # Held inside the box, as if it had been cut out first: its neighbours must not bleed in.
    position = torch.clamp(start + step * length - 0.5, start, start + length - 1)
    return position * (2 / max(size - 1, 1)) - 1
