"""Boxes are those of torchvision's RandomErasing, and hold what they should after normalisation."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms.v2 import RandomErasing as Theirs

from vitkd.data.augment.random_erasing import RandomErasing, inside
from vitkd.data.hashing import key_of
from vitkd.data.levels import normalise
from vitkd.errors import ConfigError

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SIZE = (32, 24)


def erasing(**settings: object) -> RandomErasing:
    return RandomErasing(**{"mean": MEAN, "std": STD} | settings)


def erased(augmentation: RandomErasing, count: int = 400) -> tuple[Tensor, Tensor]:
    """Normalised images after erasing, [B, 3, H, W], and the same without."""
    pixels = torch.randint(0, 256, (count, 3, *SIZE), generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    changed = augmentation.apply(pixels.to(torch.uint8), torch.arange(count), key_of(0, 0))
    return normalise(changed, mean, std), normalise(pixels, mean, std)


def masks_of(augmentation: RandomErasing, count: int) -> Tensor:
    """Whether each pixel is erased: [count, 1, H, W] bool."""
    happens, boxes = augmentation.draw(torch.arange(count), key_of(0, 0), *SIZE)
    return happens[:, None, None, None] & inside(boxes, *SIZE)


def boxes_of(masks: Tensor) -> np.ndarray:
    """[n, 4]: top, left, height and width of each of [n, H, W] bool that has any."""
    boxes = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            boxes.append((rows[0], columns[0], len(rows), len(columns)))
            assert mask.sum() == len(rows) * len(columns)
    return np.array(boxes)


@pytest.mark.parametrize(("scale", "ratio"), [([0.02, 0.33], [0.3, 3.3]), ([0.2, 0.8], [0.5, 2.0])])
def test_boxes_are_distributed_as_torchvisions(scale: list[float], ratio: list[float]) -> None:
    count = 4000
    masks = masks_of(erasing(p=1.0, scale=scale, ratio=ratio), count)
    ours = boxes_of(masks[:, 0])
    transform, blank = Theirs(1.0, scale, ratio, value=1.0), torch.zeros(1, *SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = boxes_of(torch.stack([transform(blank)[0] > 0 for _ in range(count)]))

    assert abs(len(ours) - len(theirs)) < 0.03 * count
    for one, other in ((ours, theirs), (ours[:, 2:] * ours[:, [3]], theirs[:, 2:] * theirs[:, [3]])):
        for values, expected in zip(one.T, other.T, strict=True):
            assert stats.ks_2samp(values, expected).pvalue > 1e-3


def test_the_share_of_images_is_p() -> None:
    happens, _ = erasing(p=0.3, scale=[0.1, 0.2]).draw(torch.arange(5000), key_of(0, 0), *SIZE)
    assert stats.binomtest(int(happens.sum()), 5000, 0.3).pvalue > 1e-3


@pytest.mark.parametrize("value", ["mean", "black", "random"])
def test_outside_the_box_nothing_changes(value: str) -> None:
    augmentation = erasing(p=0.5, value=value)
    changed, before = erased(augmentation)
    mask = masks_of(augmentation, 400).expand_as(changed)
    assert torch.equal(changed[~mask], before[~mask])
    assert 0.02 < mask.double().mean() < 0.2
    inside = changed[mask]
    if value == "mean":
        assert inside.abs().max() < 1e-6
    elif value == "black":
        black = (-torch.tensor(MEAN) / torch.tensor(STD))[:, None, None].expand(400, 3, *SIZE)
        assert torch.equal(inside, black[mask])
    else:
        assert stats.kstest(inside.numpy()[::7], stats.norm.cdf).pvalue > 1e-3


def test_noise_is_another_in_every_pixel_channel_and_image() -> None:
    augmentation = erasing(value="random")
    pixels = torch.zeros(300, 3, 6, 5)
    noise = augmentation.filling(pixels, torch.arange(300), key_of(0, 0)).flatten(1)
    correlation = torch.corrcoef(noise.T) - torch.eye(90)
    assert correlation.abs().max() < 0.3
    assert torch.corrcoef(noise)[0, 1:].abs().max() < 0.5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"p": 0.0}, "p=0.0: must be above 0"),
        ({"p": 1.5}, "p=1.5"),
        ({"scale": [0.5, 0.1]}, r"scale=\[0.5, 0.1\]: must be two shares"),
        ({"scale": [0.1]}, "scale"),
        ({"scale": []}, "scale"),
        ({"ratio": [0.0, 1.0]}, "ratio"),
        ({"ratio": [1.0, float("inf")]}, "ratio"),
        ({"value": "white"}, "value=white: choose mean, black or random"),
    ],
)
def test_bad_settings(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        erasing(**settings)
    assert "\n" not in str(error.value)


def test_it_fits_the_images() -> None:
    erasing().check_channels(3)
    with pytest.raises(ConfigError, match="one value a channel, 1 of them"):
        erasing().check_channels(1)
