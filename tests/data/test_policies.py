"""Which operation is drawn how often, and how strong: torchvision's, by chi-square over the results."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from vitkd.data.augment.base import Augmentation
from vitkd.data.augment.color_jitter import ColorJitter
from vitkd.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from vitkd.data.hashing import key_of, random_bits, uniform
from vitkd.errors import ConfigError

DRAWS = 3000
PAIRS: dict[str, tuple[Augmentation, Callable[[Tensor], Tensor]]] = {
    "one of RandAugment": (RandAugment(num_ops=1, magnitude=17), v2.RandAugment(1, 17)),
    "the strongest": (RandAugment(1, 4, 5), v2.RandAugment(1, 4, 5)),
    "TrivialAugment": (TrivialAugment(4), v2.TrivialAugmentWide(4)),
    **{
        f"AutoAugment, {policy}": (AutoAugment(policy), v2.AutoAugment(v2.AutoAugmentPolicy(policy)))
        for policy in ("cifar10", "imagenet", "svhn")
    },
}


@pytest.fixture(scope="module")
def image() -> Tensor:
    """[3, 12, 12] uint8, which each operation makes another."""
    noise = torch.randint(30, 200, (3, 12, 12), generator=torch.Generator().manual_seed(5))
    return noise.to(torch.uint8)


def results(augmentation: Augmentation, image: Tensor, draws: int, key: Tensor | None = None) -> Tensor:
    pixels = image.expand(draws, -1, -1, -1)
    return augmentation.apply(pixels, torch.arange(draws), key_of(7, 0) if key is None else key)


def torchvisions(transform: Callable[[Tensor], Tensor], image: Tensor, draws: int) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.stack([transform(image) for _ in range(draws)])


@pytest.mark.parametrize("name", PAIRS)
def test_every_result_is_as_frequent_as_torchvisions(name: str, image: Tensor) -> None:
    ours, theirs = results(PAIRS[name][0], image, DRAWS), torchvisions(PAIRS[name][1], image, DRAWS)
    distinct = theirs.unique(dim=0).flatten(1).float()
    assert len(distinct) > 15

    kinds = []
    for each in (ours, theirs):
        distance = torch.cdist(each.flatten(1).float(), distinct, p=1)
        nearest, kind = distance.min(1)
        # Rounding is a level a pixel, and a sheared pixel that lies between two; other results are far away.
        assert (nearest < 3 * image.numel()).double().mean() > 0.99
        kinds.append(kind)
    table = np.stack([np.bincount(kind, minlength=len(distinct)) for kind in kinds])
    often = table.sum(0) > 20
    table = np.concatenate([table[:, often], table[:, ~often].sum(1, keepdims=True)], axis=1)
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


def test_operations_follow_each_other(image: Tensor) -> None:
    """Two at once are one, and then the other one of the same draw."""
    key = key_of(3, 1)
    both = results(RandAugment(num_ops=2), image, 200, key)
    pixels, policy = image.expand(200, -1, -1, -1), RandAugment(num_ops=2)
    first = results(RandAugment(num_ops=1), image, 200, key)
    assert not torch.equal(both, first)
    assert len(both.unique(dim=0)) > len(first.unique(dim=0)) > 15
    drawn = [*policy.draw(torch.arange(200), key)]
    alone = drawn[1].operation == 0
    assert alone.any()
    assert torch.equal(both[alone], first[alone])
    assert torch.equal(first[drawn[0].operation == 0], pixels[drawn[0].operation == 0])


def test_a_jittered_image_is_torchvisions_for_the_same_factors(image: Tensor) -> None:
    jitter = ColorJitter(0.5, 1.4, 0.6, 0.2)
    index, key = torch.arange(60), key_of(1, 2)
    order, drawn = random_bits(key, index, 8).view(2, 4, -1)
    amounts = jitter.amounts(uniform(drawn))
    steps = (
        lambda image, amount: v2.functional.adjust_brightness(image, 1 + amount),
        lambda image, amount: v2.functional.adjust_contrast(image, 1 + amount),
        lambda image, amount: v2.functional.adjust_saturation(image, 1 + amount),
        v2.functional.adjust_hue,
    )
    ours = jitter.apply(image.expand(60, -1, -1, -1), index, key)
    for i in range(60):
        theirs = image
        for which in order[:, i].argsort().tolist():
            theirs = steps[which](theirs, amounts[which, i].item())
        # A level of rounding in each of four steps.
        assert (ours[i].int() - theirs.int()).abs().max() <= 4
        assert (ours[i].int() - theirs.int()).abs().double().mean() < 0.5


def test_factors_and_orders_are_torchvisions() -> None:
    jitter = ColorJitter(0.5, 1.4, 0.6, 0.2)
    amounts = jitter.amounts(uniform(random_bits(key_of(0, 0), torch.arange(5000), 4)))
    for values, (low, high) in zip(amounts, [(-0.5, 0.5), (-1, 1.4), (-0.6, 0.6), (-0.2, 0.2)], strict=True):
        assert stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    orders = random_bits(key_of(0, 0), torch.arange(6000), 4).argsort(0)
    _, counts = orders.T.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_a_grey_image_has_neither_colour_nor_hue() -> None:
    pixels = torch.randint(0, 256, (30, 1, 9, 9), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    jitter = ColorJitter(brightness=0, contrast=0, saturation=0.9, hue=0.5)
    assert torch.equal(jitter.apply(pixels, torch.arange(30), key_of(0, 0)), pixels)


@pytest.mark.parametrize(
    ("cls", "settings", "named"),
    [
        (RandAugment, {"num_ops": 0}, "num_ops=0: must be at least 1"),
        (RandAugment, {"magnitude": 31}, "magnitude=31: must be from 0 to 30"),
        (RandAugment, {"magnitude": -1}, "magnitude=-1"),
        (RandAugment, {"num_magnitude_bins": 1, "magnitude": 0}, "num_magnitude_bins=1: must be at least 2"),
        (TrivialAugment, {"num_magnitude_bins": 1}, "num_magnitude_bins=1"),
        (AutoAugment, {"policy": "cifar100"}, "policy=cifar100: choose cifar10, imagenet or svhn"),
        (ColorJitter, {"brightness": -0.1}, "brightness=-0.1"),
        (ColorJitter, {"contrast": float("nan")}, "contrast=nan"),
        (ColorJitter, {"hue": 0.6}, r"hue=0.6: must lie in \[0, 0.5\]"),
    ],
)
def test_bad_settings(cls: type[Augmentation], settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        cls(**settings)
    assert "\n" not in str(error.value)
