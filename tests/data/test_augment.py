"""Views equal torchvision's for the same draws, and do not depend on what else is in the batch."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from vitkd.data.augment.base import Augmentation
from vitkd.data.augment.boxes import Boxes, central_box, draw_boxes
from vitkd.data.augment.color_jitter import ColorJitter
from vitkd.data.augment.crop import padded_crop, resized_crop
from vitkd.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from vitkd.data.augment.random_erasing import RandomErasing
from vitkd.data.augment.view import Augment
from vitkd.data.hashing import key_named, key_of, random_bits, uniform
from vitkd.data.levels import normalise
from vitkd.errors import ConfigError

OTHERS: dict[str, Augmentation] = {
    "rand_augment": RandAugment(),
    "auto_augment": AutoAugment(),
    "trivial_augment": TrivialAugment(),
    "color_jitter": ColorJitter(),
    "random_erasing": RandomErasing(p=0.9, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3], value="random"),
}
VIEWS = [
    Augment(crop_padding=4, flip=True),
    Augment(flip=True),
    Augment(resized_crop=[0.3, 1.0], flip=True),
    *(Augment(then=[name], augmentations=OTHERS) for name in OTHERS),
    Augment(crop_padding=4, then=[*OTHERS], augmentations=OTHERS),
    Augment(resized_crop=[0.3, 1.0], then=["random_erasing", "rand_augment"], augmentations=OTHERS),
]


def attempts_of(index: Tensor, key: Tensor | None = None) -> Tensor:
    """The [10, 4, B] bits of ten boxes for each image, behind the bits of its flip."""
    key = key_of(0, 0) if key is None else key
    return random_bits(key, index, 41)[1:].view(10, 4, len(index))


@pytest.fixture
def pixels() -> Tensor:
    return torch.randint(
        0, 256, (40, 3, 32, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def test_crop_and_flip_equal_torchvision(pixels: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    down, right = torch.randint(-4, 5, (2, 40), generator=generator)
    flipped = torch.rand(40, generator=generator) < 0.5
    ours = padded_crop(pixels, down, right, flipped)
    for i in range(40):
        padded = tv.pad(pixels[i], [4, 4, 4, 4])
        theirs = tv.crop(padded, int(down[i]) + 4, int(right[i]) + 4, 32, 24)
        assert torch.equal(ours[i], tv.horizontal_flip(theirs) if flipped[i] else theirs)


def test_resized_crop_equals_torchvision(pixels: Tensor) -> None:
    flipped = torch.arange(40) % 2 == 0
    boxes = draw_boxes(attempts_of(torch.arange(40)), [0.2, 1.0], 32, 24)
    ours = resized_crop(pixels, boxes, flipped)
    for i in range(40):
        place = [int(value[i]) for value in boxes]
        theirs = tv.resized_crop(pixels[i].float(), *place, [32, 24], antialias=True)
        torch.testing.assert_close(
            ours[i], tv.horizontal_flip(theirs) if flipped[i] else theirs, atol=0.02, rtol=0
        )


def test_boxes_lie_inside_and_have_the_drawn_area() -> None:
    bits = attempts_of(torch.arange(20_000), key_of(0, 1))
    top, left, height, width = draw_boxes(bits, [0.25, 0.5], 64, 64)
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


@pytest.mark.parametrize(
    ("size", "area"),
    [
        ((64, 64), [0.5, 1.0]),
        ((64, 64), [0.9, 1.0]),
        ((48, 64), [0.5, 1.0]),
        ((64, 40), [0.3, 0.9]),
        ((224, 224), [0.08, 1.0]),
    ],
)
def test_boxes_are_distributed_as_torchvisions(size: tuple[int, int], area: list[float]) -> None:
    count = 5000
    boxes = draw_boxes(attempts_of(torch.arange(count)), area, *size)
    ours = facts_of(torch.stack(boxes).T.numpy())
    theirs = facts_of(torchvisions_boxes(count, size, area))
    for fact, values in ours.items():
        assert stats.ks_2samp(values, theirs[fact]).pvalue > 1e-3, fact
    for one, other in (("area", "ratio"), ("top", "left"), ("area", "top"), ("ratio", "left")):
        edges = [np.unique(np.quantile(theirs[fact], np.linspace(0, 1, 6)[1:-1])) for fact in (one, other)]
        counts = [
            np.bincount(
                np.digitize(drawn[one], edges[0]) * 5 + np.digitize(drawn[other], edges[1]), minlength=25
            )
            for drawn in (ours, theirs)
        ]
        table = np.stack(counts)
        assert stats.chi2_contingency(table[:, table.sum(0) > 20]).pvalue > 1e-3, (one, other)


def torchvisions_boxes(count: int, size: tuple[int, int], area: list[float]) -> np.ndarray:
    """[count, 4]: top, left, height and width."""
    image = torch.empty(1, *size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.array([RandomResizedCrop.get_params(image, area, [3 / 4, 4 / 3]) for _ in range(count)])


def facts_of(boxes: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = boxes.T
    return {
        "area": height * width,
        "ratio": width / height,
        "height": height,
        "width": width,
        "top": top,
        "left": left,
    }


@pytest.mark.parametrize("size", [(64, 64), (32, 24), (24, 64)])
def test_a_box_is_the_first_of_ten_that_fits(size: tuple[int, int]) -> None:
    index = torch.arange(1000)
    bits = attempts_of(index)
    boxes = torch.stack(draw_boxes(bits, [0.7, 1.0], *size)).T.tolist()
    drawn = [first_that_fits(bits[:, :, i].tolist(), [0.7, 1.0], *size) for i in range(len(index))]
    assert boxes == [box for _, box in drawn]
    numbers = {number for number, _ in drawn}
    assert numbers >= {0, 1, 2, 3} if size != (24, 64) else numbers == {10}


def first_that_fits(
    attempts: list[list[int]], area: list[float], height: int, width: int
) -> tuple[int, list[int]]:
    """The number of the attempt, and its box; written as torchvision's loop, for one image."""
    high = [[(bits & (1 << 64) - 1) >> 32 for bits in attempt] for attempt in attempts]
    for number, (of_area, of_ratio, of_top, of_left) in enumerate(high):
        pixels = height * width * (area[0] + (area[1] - area[0]) * (of_area >> 8) / 2**24)
        ratio = math.exp((2 * (of_ratio >> 8) / 2**24 - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return number, [of_top * (height - h + 1) >> 32, of_left * (width - w + 1) >> 32, h, w]
    image = torch.empty(1, height, width)
    return len(attempts), [*RandomResizedCrop.get_params(image, [9.0, 9.0], [3 / 4, 4 / 3])]


def test_a_view_is_the_flipped_box_of_ten_attempts() -> None:
    pixels = torch.arange(300 * 64 * 64).view(300, 1, 64, 64).to(torch.uint8)
    index, area = torch.arange(300), [0.99, 1.0]
    boxes = draw_boxes(attempts_of(index), area, 64, 64)
    fewer = draw_boxes(attempts_of(index)[:9], area, 64, 64)
    assert not torch.equal(boxes.height, fewer.height)
    flipped = random_bits(key_of(0, 0), index, 1)[0] < 0
    view = Augment(resized_crop=area, flip=True).apply(pixels, index, key_of(0, 0))
    assert torch.equal(view, resized_crop(pixels, boxes, flipped))


def test_the_central_box_is_torchvisions() -> None:
    for height in range(1, 40):
        for width in range(1, 40):
            image = torch.empty(1, height, width)
            # No box of nine times the area fits.
            theirs = RandomResizedCrop.get_params(image, [9.0, 9.0], [3 / 4, 4 / 3])
            assert central_box(height, width) == tuple(theirs)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_boxes_do_not_depend_on_the_batch(batch_size: int) -> None:
    together = draw_boxes(attempts_of(torch.arange(400)), [0.5, 1.0], 64, 64)
    parts = [
        draw_boxes(attempts_of(index), [0.5, 1.0], 64, 64) for index in torch.arange(400).split(batch_size)
    ]
    for whole, cut in zip(together, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(cut))


@pytest.mark.parametrize("augment", VIEWS)
def test_no_value_is_read_back_from_the_device(augment: Augment, pixels: Tensor) -> None:
    # The meta device has no values: reading one raises an error.
    index, key = torch.arange(40, device="meta"), key_of(0, 0, device="meta")
    assert augment.apply(pixels.to("meta"), index, key).shape == pixels.shape


def test_the_whole_box_is_the_identity(pixels: Tensor) -> None:
    zero, never = torch.zeros(40, dtype=torch.int64), torch.zeros(40, dtype=torch.bool)
    same = resized_crop(pixels, Boxes(zero, zero, zero + 32, zero + 24), never)
    torch.testing.assert_close(same, pixels.float(), atol=2e-3, rtol=0)


def test_normalise_equals_torchvision(pixels: Tensor) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    ours = normalise(pixels, torch.tensor(mean), torch.tensor(std))
    theirs = tv.normalize(tv.to_dtype(pixels, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


@pytest.mark.parametrize("augment", VIEWS)
def test_a_view_does_not_depend_on_its_batch(augment: Augment, pixels: Tensor) -> None:
    index, key = torch.arange(100, 140), key_of(5, 2)
    together = augment.apply(pixels, index, key)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(augment.apply(pixels[shuffled], index[shuffled], key), together[shuffled])
    for i in (0, 17, 39):
        assert torch.equal(augment.apply(pixels[i : i + 1], index[i : i + 1], key)[0], together[i])


@pytest.mark.parametrize("augment", VIEWS)
def test_a_view_depends_on_seed_epoch_and_image(augment: Augment, pixels: Tensor) -> None:
    same, index = pixels[:1].expand(40, -1, -1, -1), torch.arange(40)
    view = augment.apply(same, index, key_of(0, 0))
    assert not torch.equal(view, augment.apply(same, index, key_of(0, 1)))
    assert not torch.equal(view, augment.apply(same, index, key_of(1, 0)))
    assert len(view.unique(dim=0)) > 1


def test_every_shift_and_both_sides_occur_equally() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(18_000, -1, -1, -1)
    views = Augment(crop_padding=1, flip=True).apply(image, torch.arange(18_000), key_of(0, 0))
    kinds, counts = views.unique(dim=0, return_counts=True)
    assert len(kinds) == 18
    assert (counts - 1000).abs().max() < 150


def test_no_torch_generator_is_touched(pixels: Tensor) -> None:
    before = torch.get_rng_state()
    for augment in VIEWS:
        augment.apply(pixels, torch.arange(40), key_of(0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_drawn_where_nothing_varies(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitkd.data.augment.view.random_bits", None)
    assert Augment().apply(pixels, torch.arange(40), key_of(0, 0)) is pixels


def test_flip_and_crop_draws_are_independent() -> None:
    streams = uniform(random_bits(key_of(0, 0), torch.arange(10_000), 41)).double()
    assert (torch.corrcoef(streams) - torch.eye(41)).abs().max() < 0.045


def test_what_is_listed_comes_after_the_crop_in_its_order(pixels: Tensor) -> None:
    index, key = torch.arange(40), key_of(4, 2)
    cropped = Augment(crop_padding=4, flip=True).apply(pixels, index, key)
    views = []
    for then in (["color_jitter", "rand_augment"], ["rand_augment", "color_jitter"]):
        expected = cropped
        for name in then:
            expected = OTHERS[name].apply(expected, index, key_named(key, name))
        augment = Augment(crop_padding=4, flip=True, then=then, augmentations=OTHERS)
        views.append(augment.apply(pixels, index, key))
        assert torch.equal(views[-1], expected)
        assert [*augment.augmentations] == then
    assert not torch.equal(*views)


def test_a_view_with_fractions_is_rounded_where_levels_are_needed(pixels: Tensor) -> None:
    index, key = torch.arange(40), key_of(4, 2)
    for name in ("rand_augment", "color_jitter"):
        rounded = OTHERS[name].apply(pixels, index, key)
        assert torch.equal(OTHERS[name].apply(pixels + 0.4, index, key), rounded)


def test_augmentations_draw_independently() -> None:
    index = torch.arange(10_000)
    keys = [key_of(0, 0), *(key_named(key_of(0, 0), name) for name in OTHERS)]
    streams = torch.cat([uniform(random_bits(key, index, 5)) for key in keys]).double()
    assert (torch.corrcoef(streams) - torch.eye(len(streams))).abs().max() < 0.045


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"resized_crop": [0.5]}, r"resized_crop=\[0.5\]"),
        ({"resized_crop": [0.9, 0.5]}, "smallest <= largest"),
        ({"resized_crop": [0.0, 1.0]}, "0 < smallest"),
        ({"resized_crop": [0.5, float("nan")]}, "resized_crop"),
        ({"resized_crop": [0.5, 1.0], "crop_padding": 2}, "both crops"),
        (
            {"then": ["random_erasing", "colour_jitter"], "augmentations": OTHERS},
            r"then=\[random_erasing,colour_jitter\]: there is no augmentation colour_jitter; did you mean",
        ),
        ({"then": ["rand_augment", "rand_augment"], "augmentations": OTHERS}, "name each augmentation once"),
    ],
)
def test_bad_settings(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        Augment(**settings)
    assert "\n" not in str(error.value)
