"""What training images look like: the settings of `dataset.augment`.

Shapes: B batch, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkd.data.augment.boxes import ATTEMPTS, draw_boxes
from vitkd.data.augment.crop import padded_crop, resized_crop
from vitkd.data.hashing import random_bits, uniform_int
from vitkd.errors import ConfigError


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
        bits = random_bits(key, index, 1 + 4 * ATTEMPTS if self.resized_crop else 3)
        flip_bits, crop_bits = bits[0], bits[1:]
        flipped = (flip_bits < 0) if self.flip else torch.zeros_like(flip_bits, dtype=torch.bool)
        if self.resized_crop is not None:
            attempts = crop_bits.view(ATTEMPTS, 4, len(index))
            boxes = draw_boxes(attempts, self.resized_crop, pixels.shape[-2], pixels.shape[-1])
            return resized_crop(pixels, boxes, flipped)
        down, right = uniform_int(crop_bits, 2 * self.crop_padding + 1)
        return padded_crop(pixels, down - self.crop_padding, right - self.crop_padding, flipped)
