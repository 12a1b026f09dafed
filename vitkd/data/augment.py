"""uint8 pixels → the float32 view that a model sees, for a whole batch on its device.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd.data.hashing import below, random_bits, uniform
from vitkd.errors import ConfigError

_LOG_RATIO = math.log(4 / 3)


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
        flip_bits, *crop_bits = random_bits(key, index, 5)
        mirrored = (flip_bits < 0) if self.flip else torch.zeros_like(flip_bits, dtype=torch.bool)
        if self.resized_crop is not None:
            box = draw_box(crop_bits, self.resized_crop, pixels.shape[-2], pixels.shape[-1])
            return crop_resized(pixels, *box, mirrored)
        down, right = (below(bits, 2 * self.crop_padding + 1) for bits in crop_bits[:2])
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


def draw_box(
    bits: list[Tensor], area: list[float], height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The boxes of RandomResizedCrop: (top, left, box height, box width), each [B] int64.

    Torchvision redraws a box that does not fit, up to ten times; here its long side is cut to the image.

    Args:
        bits: four streams of [B].
        area: (least, largest) share of the image's area.
    """
    share = area[0] + (area[1] - area[0]) * uniform(bits[0])
    root_ratio = torch.exp((2 * uniform(bits[1]) - 1) * (_LOG_RATIO / 2))
    side = torch.sqrt(share * (height * width))
    box_height = (side / root_ratio).round().long().clamp(1, height)
    box_width = (side * root_ratio).round().long().clamp(1, width)
    top = below(bits[2], height - box_height + 1)
    left = below(bits[3], width - box_width + 1)
    return top, left, box_height, box_width


def crop_resized(
    pixels: Tensor, top: Tensor, left: Tensor, box_height: Tensor, box_width: Tensor, mirrored: Tensor
) -> Tensor:
    """Each image's box, enlarged bilinearly to the image's own size and then perhaps mirrored.

    Args:
        pixels: [B, C, H, W].
        top, left, box_height, box_width: [B] int64, in pixels, inside the image.
        mirrored: [B] bool.

    Returns:
        [B, C, H, W] float32.
    """
    H, W = pixels.shape[-2:]
    y = _sampling_points(top, box_height, H)
    x = _sampling_points(left, box_width, W)
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
