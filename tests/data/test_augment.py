"""Views equal torchvision's for the same draws, and do not depend on what else is in the batch."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from vitkd.data.augment import Augment, crop_resized, crop_shifted, draw_box, normalise
from vitkd.data.hashing import key_of, random_bits, uniform
from vitkd.errors import ConfigError

VIEWS = [Augment(crop_padding=4, flip=True), Augment(flip=True), Augment(resized_crop=[0.3, 1.0], flip=True)]


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(
        0, 256, (40, 3, 32, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_crop_and_flip_equal_torchvision(pixels: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    down, right = torch.randint(-4, 5, (2, 40), generator=generator)
    mirrored = torch.rand(40, generator=generator) < 0.5
    ours = crop_shifted(pixels, down, right, mirrored)
    for i in range(40):
        padded = tv.pad(pixels[i], [4, 4, 4, 4])
        theirs = tv.crop(padded, int(down[i]) + 4, int(right[i]) + 4, 32, 24)
        assert torch.equal(ours[i], tv.horizontal_flip(theirs) if mirrored[i] else theirs)


def test_resized_crop_equals_torchvision(pixels: Tensor) -> None:
    mirrored = torch.arange(40) % 2 == 0
    box = draw_box(list(random_bits(key_of(0, 0), torch.arange(40), 4)), [0.2, 1.0], 32, 24)
    ours = crop_resized(pixels, *box, mirrored)
    for i in range(40):
        place = [int(value[i]) for value in box]
        theirs = tv.resized_crop(pixels[i].float(), *place, [32, 24], antialias=True)
        torch.testing.assert_close(
            ours[i], tv.horizontal_flip(theirs) if mirrored[i] else theirs, atol=0.02, rtol=0
        )


def test_boxes_lie_inside_and_have_the_drawn_area() -> None:
    bits = list(random_bits(key_of(0, 1), torch.arange(20_000), 4))
    top, left, height, width = draw_box(bits, [0.25, 0.5], 64, 64)
    for start, length in ((top, height), (left, width)):
        assert start.min() == 0
        assert length.min() >= 1
        assert (start + length).max() == 64
    share = height * width / 64**2
    torch.testing.assert_close(share.double().mean().item(), 0.375, atol=3e-3, rtol=0)
    ratio = torch.log(width / height)
    assert ratio.min() > -0.32
    assert ratio.max() < 0.32
    assert abs(ratio.mean()) < 0.01


def test_the_whole_box_is_the_identity(pixels: Tensor) -> None:
    zero, never = torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.bool)
    same = crop_resized(pixels, zero, zero, zero + 32, zero + 24, never)
    torch.testing.assert_close(same, pixels.float(), atol=2e-3, rtol=0)


def test_normalise_equals_torchvision(pixels: Tensor) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    ours = normalise(pixels, torch.tensor(mean), torch.tensor(std))
    theirs = tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("augment", VIEWS)
def test_a_view_does_not_depend_on_its_batch(augment: Augment, pixels: Tensor) -> None:
    index, key = torch.arange(100, 140), key_of(5, 2)
    together = augment.vary(pixels, index, key)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(augment.vary(pixels[shuffled], index[shuffled], key), together[shuffled])
    for i in (0, 17, 39):
        assert torch.equal(augment.vary(pixels[i : i + 1], index[i : i + 1], key)[0], together[i])


@pytest.mark.parametrize("augment", VIEWS)
def test_a_view_depends_on_seed_epoch_and_image(augment: Augment, pixels: Tensor) -> None:
    same, index = pixels[:1].expand(40, -1, -1, -1), torch.arange(40)
    view = augment.vary(same, index, key_of(0, 0))
    assert not torch.equal(view, augment.vary(same, index, key_of(0, 1)))
    assert not torch.equal(view, augment.vary(same, index, key_of(1, 0)))
    assert len(view.unique(dim=0)) > 1


def test_every_shift_and_both_sides_occur_equally() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(18_000, -1, -1, -1)
    views = Augment(crop_padding=1, flip=True).vary(image, torch.arange(18_000), key_of(0, 0))
    kinds, counts = views.unique(dim=0, return_counts=True)
    assert len(kinds) == 18
    assert (counts - 1000).abs().max() < 150


def test_no_torch_generator_is_touched(pixels: Tensor) -> None:
    before = torch.get_rng_state()
    VIEWS[0].vary(pixels, torch.arange(40), key_of(0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_drawn_where_nothing_varies(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitkd.data.augment.random_bits", None)
    assert Augment().vary(pixels, torch.arange(40), key_of(0, 0)) is pixels


def test_flip_and_crop_draws_are_independent() -> None:
    streams = uniform(random_bits(key_of(0, 0), torch.arange(10_000), 5)).double()
    assert (torch.corrcoef(streams) - torch.eye(5)).abs().max() < 0.045


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"resized_crop": [0.5]}, r"resized_crop=\[0.5\]"),
        ({"resized_crop": [0.9, 0.5]}, "least <= largest"),
        ({"resized_crop": [0.0, 1.0]}, "0 < least"),
        ({"resized_crop": [0.5, float("nan")]}, "resized_crop"),
        ({"resized_crop": [0.5, 1.0], "crop_padding": 2}, "both crops"),
    ],
)
def test_bad_settings(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        Augment(**settings)
    assert "\n" not in str(error.value)
