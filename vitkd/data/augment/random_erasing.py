"""Random erasing.

Shapes: B batch, C channels, H and W pixels.
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vitkd.data.augment.base import Augmentation, where_needed
from vitkd.data.augment.boxes import ATTEMPTS, Boxes, draw_sizes, first_that_fits
from vitkd.data.hashing import key_named, normal, random_bits, uniform
from vitkd.errors import check, check_choice, check_fraction


@dataclass(kw_only=True)
class RandomErasing(Augmentation):
    """Erase a random box of an image (Zhong et al. 2020, arXiv 1708.04896), drawn as torchvision draws it.

    Args:
        p: the probability that an image loses anything.
        scale: (smallest, largest) share of the image's area.
        ratio: (smallest, largest) height / width; its logarithm is distributed evenly.
        value: what is there instead: `mean`, the mean colour, which normalised is 0; `black`; or `random`,
            for each pixel and channel another number, which normalised has the standard normal distribution.
        mean, std: of each channel of the data set, of pixels in 0..1.
    """

    p: float = 0.25
    scale: list[float] = field(default_factory=lambda: [0.02, 0.33])
    ratio: list[float] = field(default_factory=lambda: [0.3, 3.3])
    value: str = "mean"
    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        check_fraction(self, "p")
        is_range = len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[-1] <= 1
        check(self, "scale", is_range, "must be two shares of the area, 0 < smallest <= largest <= 1")
        is_range = len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[-1] < math.inf
        check(self, "ratio", is_range, "must be two ratios of height to width, 0 < smallest <= largest")
        check_choice(self, "value", ("mean", "black", "random"))

    def check_channels(self, channels: int) -> None:
        for name in ("mean", "std"):
            fits = len(getattr(self, name)) == channels
            check(self, name, fits, f"must be one value a channel, {channels} of them")

    def apply(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        happens, boxes = self.draw(index, key, *pixels.shape[-2:])
        erase = partial(self.erase, key=key)
        return where_needed(erase, happens, pixels.to(torch.float32), index, happens, *boxes)

    def draw(self, index: Tensor, key: Tensor, height: int, width: int) -> tuple[Tensor, Boxes]:
        """Whether images of this size lose anything, [B] bool, and which box."""
        bits = random_bits(key, index, 1 + 4 * ATTEMPTS)
        chance, bits = bits[0], bits[1:].view(ATTEMPTS, 4, -1)
        box_width, box_height = draw_sizes(bits, self.scale, self.ratio, height * width)
        fits = (box_height < height) & (box_width < width)
        boxes, found = first_that_fits(bits, box_height, box_width, fits, height, width)
        return found & (uniform(chance) < self.p), boxes

    def erase(self, levels: Tensor, index: Tensor, happens: Tensor, *box: Tensor, key: Tensor) -> Tensor:
        """The images, [B, C, H, W] float32, without their boxes, if that `happens`."""
        is_erased = happens[:, None, None, None] & inside(Boxes(*box), *levels.shape[-2:])
        return torch.where(is_erased, self.filling(levels, index, key), levels)

    def filling(self, levels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """What is there instead: [C, 1, 1] or, for images [B, C, H, W], of their shape."""
        mean, std = (
            255 * torch.tensor(values)[:, None, None].to(levels.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        if self.value == "mean":
            return mean
        if self.value == "black":
            return torch.zeros_like(mean)
        count = levels.shape[1:].numel()
        bits = random_bits(key_named(key, "noise"), index, math.ceil(count / 2))
        return mean + std * normal(bits).flatten(0, 1)[:count].T.reshape(levels.shape)


def inside(boxes: Boxes, height: int, width: int) -> Tensor:
    """Whether each pixel lies in its image's box: [B, 1, H, W] bool."""
    top, left, box_height, box_width = (values[:, None, None, None] for values in boxes)
    row = torch.arange(height, device=top.device)[:, None]
    column = torch.arange(width, device=top.device)
    return (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)
