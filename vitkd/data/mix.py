"""Mixup and CutMix: the images of a training batch mixed in pairs, a whole batch at once on its device.

Both are one formula, in which an image's weight is a number or, pixel by pixel, 0 in a box and 1 elsewhere:

    image = weight·own + (1 − weight)·partner's,    target = λ·own class + (1 − λ)·partner's class

with λ the mean of the weight over the pixels. A batch's λ and box are a pure function of (seed, epoch, step).

Shapes: N steps, B batch, C channels, H and W pixels, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.data.batch import Batch
from vitkd.data.hashing import random_bits, uniform, uniform_int
from vitkd.errors import check


@dataclass
class Mix:
    """How training images are mixed; those of validation and test never are.

    As timm's `Mixup` mixes by default, a batch has one λ and one box, and each pair gives two mixed images.

    Args:
        mixup_alpha: λ is drawn from Beta(alpha, alpha) for mixup (Zhang et al. 2018, arXiv 1710.09412); 0 for
            no mixup.
        cutmix_alpha: likewise for CutMix (Yun et al. 2019, arXiv 1905.04899), where 1 − λ is the box's share
            of the area before it is cut off at the image's edge.
        prob: the probability that a batch is mixed.
        switch_prob: the probability of CutMix in a batch that is mixed, where both have an alpha.

    Raises:
        ConfigError: a setting is out of range.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            is_alpha = 0 <= getattr(self, name) < math.inf
            check(self, name, is_alpha, "must be a finite number, 0 or more; 0 turns it off")
        for name in ("prob", "switch_prob"):
            check(self, name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]; it is a probability")

    @property
    def is_on(self) -> bool:
        """Whether any batch is mixed."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def alphas(self) -> tuple[float, float]:
        """Mixup's and CutMix's; that of one that is off, which no batch asks for, is the other's."""
        return self.mixup_alpha or self.cutmix_alpha, self.cutmix_alpha or self.mixup_alpha

    @property
    def cutmix_prob(self) -> float:
        """The probability of CutMix in a batch that is mixed."""
        if self.mixup_alpha and self.cutmix_alpha:
            return self.switch_prob
        return float(self.cutmix_alpha > 0)


class Draws(NamedTuple):
    """How the batches of N steps are mixed, on the device; of an unmixed batch all weights are 1.

    Args:
        outside: [N] float32, an image's weight outside the box; inside it is 0.
        edges: [N, 4] int64, the box's first row, the row after its last, and its columns likewise.
        share: [N] float32, λ.
    """

    outside: Tensor
    edges: Tensor
    share: Tensor


class Mixer:
    """Mixes batches of one kind.

    Args:
        mix: how.
        size: height and width of the images.
        num_classes: K.
        apart: how far the images of a pair are from each other in a batch.
    """

    def __init__(self, mix: Mix, size: int, num_classes: int, apart: int = 1) -> None:
        self.mix, self.size, self.num_classes, self.apart = mix, size, num_classes, apart

    def epoch(self, key: Tensor, steps: int) -> Callable[[Batch, int], Batch]:
        """What mixes the batches of an epoch, given each and its step.

        Args:
            key: 0-dim int64, made from the seed and the epoch.
            steps: of the epoch.
        """
        return partial(self.mixed, self.draw(key, steps))

    def draw(self, key: Tensor, steps: int) -> Draws:
        """How the batches of an epoch are mixed; arguments as for `epoch`."""
        bits = random_bits(key, torch.arange(steps, device=key.device), 6)
        is_mixed, is_cut = uniform(bits[2]) < self.mix.prob, uniform(bits[3]) < self.mix.cutmix_prob
        of_mixup, of_cutmix = (symmetric_beta(bits[:2], alpha) for alpha in self.mix.alphas)
        share = torch.where(is_mixed, torch.where(is_cut, of_cutmix, of_mixup), 1.0)
        edges = cut_edges(torch.where(is_cut, share, 1.0), bits[4:], self.size)
        top, bottom, left, right = edges.unbind(-1)
        uncut = 1 - (bottom - top) * (right - left) / self.size**2
        return Draws(torch.where(is_cut, 1.0, share), edges, torch.where(is_cut, uncut, share))

    def mixed(self, draws: Draws, batch: Batch, step: int) -> Batch:
        """The batch as it is mixed in one of the steps drawn, with its classes' shares as its target.

        Its label is the class of the larger share; its index stays that of an image itself.
        """
        partner = partners(len(batch.label), self.apart, batch.label.device)
        share, weight = draws.share[step], self._weight(draws, step)
        is_own = batch.label[:, None] == torch.arange(self.num_classes, device=share.device)
        own = is_own.to(torch.float32)
        return Batch(
            # Several times as fast as indexing.
            batch.image.index_select(0, partner).lerp_(batch.image, weight),
            torch.where(share < 0.5, batch.label[partner], batch.label),
            batch.index,
            torch.lerp(own[partner], own, share),
        )

    def _weight(self, draws: Draws, step: int) -> Tensor:
        """[H, W]: the weight of an image itself, of each of its pixels."""
        place = torch.arange(self.size, device=draws.edges.device)
        top, bottom, left, right = draws.edges[step]
        rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
        return torch.where(rows[:, None] & columns, 0.0, draws.outside[step])


@cache
def partners(count: int, apart: int, device: torch.device) -> Tensor:
    """[B] int64: which image each of `count` is mixed with: runs of `apart` images swap places, two by two.

    Two processes pair the images that one with twice their batch size pairs, if 2·`apart` divides theirs. An
    image without a partner at the batch's end is its own, which leaves it as it is.
    """
    place = torch.arange(count, device=device)
    partner = torch.where(place // apart % 2 == 0, place + apart, place - apart)
    return torch.where(partner < count, partner, place)


def symmetric_beta(bits: Tensor, alpha: float) -> Tensor:
    """[N] float32 in [0, 1] drawn from Beta(alpha, alpha), alpha > 0, of [2, N] int64: 64 random bits each.

    If T is Student's t with 2·alpha degrees of freedom, (1 + T / √(2·alpha + T²)) / 2 is such a number
    (Devroye 1996); T is a function of two uniform ones (Bailey 1994). So nothing is drawn in vain, and
    nothing waits for the device.
    """
    log_power = uniform(bits[0]).log() / alpha
    cosine = torch.cos(2 * math.pi * uniform(bits[1]))
    # √(1 − U^(1/alpha)) and, beside it, U^(1/alpha) itself, which may vanish, unlike the cosine.
    along = torch.sqrt(-torch.expm1(log_power)) * cosine
    return (1 + along / torch.sqrt(log_power.exp() + along**2)) / 2


def cut_edges(share: Tensor, bits: Tensor, size: int) -> Tensor:
    """CutMix's boxes, as functions of λ and random bits: the centre is any pixel, the image's edge cuts.

    Args:
        share: [N] float32, λ before the cut; at 1 there is no box.
        bits: [2, N] int64: 64 random bits each for the centre's row and column.
        size: height and width of the images.

    Returns:
        [N, 4] int64, as `Draws.edges`.
    """
    side = (size * torch.sqrt(1 - share)).long()
    centre = uniform_int(bits, size)
    start = (centre - side // 2).clamp_min(0)
    end = (centre + (side + 1) // 2).clamp_max(size)
    return torch.stack([start[0], end[0], start[1], end[1]], dim=-1)
