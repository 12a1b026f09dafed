"""What training images look like: the settings of `dataset.augment`.

Shapes: B batch, C channels, H and W pixels.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vitkd.data.augment.base import Augmentation
from vitkd.data.augment.boxes import ATTEMPTS, draw_boxes
from vitkd.data.augment.crop import padded_crop, resized_crop
from vitkd.data.hashing import key_named, random_bits, uniform_int
from vitkd.errors import ConfigError, suggest


@dataclass
class Augment:
    """Random augmentation of training images; validation and test images are never augmented.

    Args:
        crop_padding: random crop after padding each side with this many black pixels; 0 for none.
        flip: flip left to right with probability 1/2.
        resized_crop: random crop, resized to the image's size; (smallest, largest) share of the image's
            area, at an aspect ratio of 3/4 to 4/3; null for none.
        then: what comes after crop and flip, in this order; some of `augmentations`, each once.
        augmentations: by name; those that `then` does not list are dropped.

    Raises:
        ConfigError: a setting is out of range, both crops are on, or there is no such augmentation.
    """

    REST: ClassVar[str] = "augmentations"

    crop_padding: int = 0
    flip: bool = False
    resized_crop: list[float] | None = None
    then: list[str] = field(default_factory=list)
    augmentations: dict[str, Augmentation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_crops()
        listed = f"then=[{','.join(self.then)}]"
        for name in self.then:
            if name not in self.augmentations:
                hint = suggest(name, self.augmentations)
                raise ConfigError(f"{listed}: there is no augmentation {name}; {hint}")
        if len({*self.then}) < len(self.then):
            raise ConfigError(f"{listed}: name each augmentation once")
        self.augmentations = {name: self.augmentations[name] for name in self.then}

    def _check_crops(self) -> None:
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
        return self._crops_or_flips or bool(self.then)

    @property
    def _crops_or_flips(self) -> bool:
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
        if self._crops_or_flips:
            pixels = self._cropped_and_flipped(pixels, index, key)
        for name, augmentation in self.augmentations.items():
            pixels = augmentation.apply(pixels, index, key_named(key, name))
        return pixels

    def _cropped_and_flipped(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """The images after crop and flip."""
        bits = random_bits(key, index, 1 + 4 * ATTEMPTS if self.resized_crop else 3)
        flip_bits, crop_bits = bits[0], bits[1:]
        flipped = (flip_bits < 0) if self.flip else torch.zeros_like(flip_bits, dtype=torch.bool)
        if self.resized_crop is not None:
            attempts = crop_bits.view(ATTEMPTS, 4, len(index))
            boxes = draw_boxes(attempts, self.resized_crop, pixels.shape[-2], pixels.shape[-1])
            return resized_crop(pixels, boxes, flipped)
        down, right = uniform_int(crop_bits, 2 * self.crop_padding + 1)
        return padded_crop(pixels, down - self.crop_padding, right - self.crop_padding, flipped)
