"""Random operations, drawn as torchvision's classes of the same names draw them.

Shapes: B batch, C channels, H and W pixels.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.data.augment.auto_policies import POLICIES, read_policy
from vitkd.data.augment.base import Augmentation
from vitkd.data.augment.operations import Operation, operate
from vitkd.data.hashing import random_bits, uniform, uniform_int
from vitkd.data.levels import rounded
from vitkd.errors import check, check_at_least, check_choice


class Drawn(NamedTuple):
    """What is done to each image next.

    Args:
        operation: [B] int64, as in `Operation`.
        strength: [B] int64, the number of its magnitude.
        sign: [B] int64, negative for a magnitude below 0, where there are such.
    """

    operation: Tensor
    strength: Tensor
    sign: Tensor


@dataclass
class Policy(Augmentation):
    """One random operation after the other."""

    @abstractmethod
    def draw(self, index: Tensor, key: Tensor) -> Iterator[Drawn]:
        """The operations on the images at `index` ([B] int64)."""

    @abstractmethod
    def magnitudes(self, height: int, width: int) -> Tensor:
        """Those of each operation, from weak to strong: [operations, strengths] float32."""

    def apply(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        pixels = rounded(pixels)
        magnitudes = self.magnitudes(*pixels.shape[-2:]).to(pixels.device, non_blocking=True)
        for operation, strength, sign in self.draw(index, key):
            magnitude = magnitudes[operation, strength]
            is_below = (sign < 0) & (operation <= Operation.SHARPNESS)
            pixels = operate(pixels, operation, torch.where(is_below, -magnitude, magnitude))
        return pixels


def evenly_spaced(
    count: int,
    *,
    shear: float,
    translate: tuple[float, float],
    rotate: float,
    enhance: float,
    posterize: int,
) -> Tensor:
    """Magnitudes from no change to the strongest, which is given: [operations, count] float32."""
    ends = {
        **{Operation.SHEAR_X: (0, shear), Operation.SHEAR_Y: (0, shear), Operation.ROTATE: (0, rotate)},
        **{Operation.TRANSLATE_X: (0, translate[0]), Operation.TRANSLATE_Y: (0, translate[1])},
        **{Operation.BRIGHTNESS: (0, enhance), Operation.CONTRAST: (0, enhance)},
        **{Operation.COLOR: (0, enhance), Operation.SHARPNESS: (0, enhance)},
        **{Operation.POSTERIZE: (8, posterize), Operation.SOLARIZE: (1, 0)},
    }
    table = torch.stack([torch.linspace(*ends.get(each, (0, 0)), count) for each in Operation])
    table[Operation.TRANSLATE_X : Operation.TRANSLATE_Y + 1].trunc_()
    table[Operation.POSTERIZE].round_()
    return table


def usual_magnitudes(count: int, height: int, width: int) -> Tensor:
    """Those of AutoAugment and RandAugment, which move images by up to 45 % of their size."""
    translate = (150 / 331 * width, 150 / 331 * height)
    return evenly_spaced(count, shear=0.3, translate=translate, rotate=30, enhance=0.9, posterize=4)


@dataclass
class RandAugment(Policy):
    """Random operations at one and the same strength (Cubuk et al. 2020, arXiv 1909.13719).

    Args:
        num_ops: how many, one after the other.
        magnitude: the strength, a number below `num_magnitude_bins`.
        num_magnitude_bins: into how many steps each operation's range is divided.
    """

    num_ops: int = 2
    magnitude: int = 9
    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        check_at_least(1, self, "num_ops", most=100)
        check_at_least(2, self, "num_magnitude_bins", most=1000)
        is_one = 0 <= self.magnitude < self.num_magnitude_bins
        check(self, "magnitude", is_one, f"must be from 0 to {self.num_magnitude_bins - 1}, a bin's number")

    def draw(self, index: Tensor, key: Tensor) -> Iterator[Drawn]:
        for choice, sign in random_bits(key, index, 2 * self.num_ops).view(self.num_ops, 2, -1):
            operation = uniform_int(choice, Operation.INVERT)
            yield Drawn(operation, torch.full_like(operation, self.magnitude), sign)

    def magnitudes(self, height: int, width: int) -> Tensor:
        return usual_magnitudes(self.num_magnitude_bins, height, width)


@dataclass
class TrivialAugment(Policy):
    """One random operation at a random strength, up to a wide one (Müller and Hutter 2021, arXiv 2103.10158).

    Args:
        num_magnitude_bins: into how many steps each operation's range is divided.
    """

    num_magnitude_bins: int = 31

    def __post_init__(self) -> None:
        check_at_least(2, self, "num_magnitude_bins", most=1000)

    def draw(self, index: Tensor, key: Tensor) -> Iterator[Drawn]:
        choice, strength, sign = random_bits(key, index, 3)
        operation = uniform_int(choice, Operation.INVERT)
        yield Drawn(operation, uniform_int(strength, self.num_magnitude_bins), sign)

    def magnitudes(self, height: int, width: int) -> Tensor:
        bins, wide = self.num_magnitude_bins, 0.99
        return evenly_spaced(bins, shear=wide, translate=(32, 32), rotate=135, enhance=wide, posterize=2)


@dataclass
class AutoAugment(Policy):
    """A pair of operations out of 25 that were found by search (Cubuk et al. 2019, arXiv 1805.09501).

    Args:
        policy: the data set on which they were searched for, `cifar10`, `imagenet` or `svhn`.
    """

    policy: str = "cifar10"

    def __post_init__(self) -> None:
        check_choice(self, "policy", POLICIES)

    def draw(self, index: Tensor, key: Tensor) -> Iterator[Drawn]:
        pair, *bits = random_bits(key, index, 5)
        pairs = read_policy(self.policy).to(index.device, non_blocking=True)
        both = pairs[uniform_int(pair, len(pairs))].permute(1, 2, 0)
        for (operation, probability, strength), chance, sign in zip(both, bits[:2], bits[2:], strict=True):
            happens = uniform(chance) < probability
            yield Drawn(torch.where(happens, operation, Operation.IDENTITY).long(), strength.long(), sign)

    def magnitudes(self, height: int, width: int) -> Tensor:
        return usual_magnitudes(10, height, width)
