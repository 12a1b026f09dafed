"""An epoch's batches: each image once, the same for any number of processes."""

import pytest
import torch

from vitkd.data.loader import NEXT_VIEW, EpochOrder
from vitkd.errors import ConfigError

INDEX = torch.arange(0, 206, 2)  # 103 images with their own numbers


def epoch(number: int, **settings: object) -> list[torch.Tensor]:
    order = EpochOrder(INDEX, **settings)  # type: ignore[arg-type]
    order.set_epoch(number)
    batches = list(order.batches())
    assert len(batches) == len(order)
    return batches


def test_shuffled_epoch_gives_each_image_at_most_once_in_full_batches() -> None:
    batches = epoch(0, batch_size=10, shuffle=True)
    assert [len(batch) for batch in batches] == [10] * 10
    seen = torch.cat(batches)
    assert len(seen.unique()) == 100
    assert set(seen.tolist()) <= set(INDEX.tolist())


def test_epoch_is_a_permutation() -> None:
    (batch,) = epoch(3, batch_size=103, shuffle=True)
    assert not torch.equal(batch, INDEX)
    assert torch.equal(batch.sort().values, INDEX)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = torch.cat(epoch(1, batch_size=10, shuffle=True, seed=4))
    assert torch.equal(first, torch.cat(epoch(1, batch_size=10, shuffle=True, seed=4)))
    assert not torch.equal(first, torch.cat(epoch(2, batch_size=10, shuffle=True, seed=4)))
    assert not torch.equal(first, torch.cat(epoch(1, batch_size=10, shuffle=True, seed=5)))


def test_every_image_comes_to_every_place() -> None:
    places = torch.stack([torch.cat(epoch(e, batch_size=103, shuffle=True)) for e in range(400)]).double()
    centre = INDEX.double().mean()
    spread = INDEX.double().std() / 400**0.5
    assert (places.mean(0) - centre).abs().max() < 4.5 * spread


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_global_batches(world_size: int) -> None:
    alone = epoch(2, batch_size=4 * world_size, shuffle=True)
    shared = [
        epoch(2, batch_size=4, shuffle=True, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for whole, *slices in zip(alone, *shared, strict=True):
        assert torch.equal(whole, torch.cat(slices))


def test_a_lone_partial_batch_is_kept() -> None:
    (batch,) = epoch(0, batch_size=500, shuffle=True)
    assert len(batch) == 103


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("batch_size", [2, 10, 51, 103, 500])
def test_evaluation_takes_every_image_once(batch_size: int, world_size: int) -> None:
    ranks = [epoch(0, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    sizes = [len(batch) for batches in ranks for batch in batches]
    assert 1 <= min(sizes) <= max(sizes) <= min(batch_size, min(sizes) + 1)
    assert torch.equal(torch.cat([torch.cat(batches) for batches in ranks]).sort().values, INDEX)


def test_evaluation_is_in_order() -> None:
    assert torch.equal(torch.cat(epoch(5, batch_size=10)), INDEX)


def test_more_processes_than_images() -> None:
    with pytest.raises(ConfigError, match="3 images cannot serve 4 process"):
        EpochOrder(torch.arange(3), 8, world_size=4)


def runs_of(images: torch.Tensor) -> torch.Tensor:
    """[R, 2]: each image that stands in a row, and how often."""
    found, counts = images.unique_consecutive(return_counts=True)
    return torch.stack([found, counts], dim=1)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_an_epoch_of_several_views_of_each_image(passes: int, repeats: int) -> None:
    """One permutation after the other, as long as there is room, with an image's repeats in a row."""
    (views,) = epoch(3, batch_size=10_000, shuffle=True, passes=passes, repeats=repeats)
    images = views % NEXT_VIEW

    assert len(views) == passes * len(INDEX) == len(views.unique())
    whole, rest = divmod(passes, repeats)
    for part in images[: whole * repeats * len(INDEX)].view(-1, len(INDEX), repeats):
        assert torch.equal(part[:, 0].sort().values, INDEX)
        assert (part == part[:, :1]).all()
    if rest:
        counts = runs_of(images[whole * repeats * len(INDEX) :])[:, 1]
        assert (counts[:-1] == repeats).all()
    for image in INDEX[:5]:
        numbers = views[images == image] // NEXT_VIEW
        assert numbers.tolist() == [*range(len(numbers))]


def test_each_pass_has_an_order_of_its_own_and_the_first_is_that_of_one_pass() -> None:
    (once,) = epoch(3, batch_size=10_000, shuffle=True)
    (thrice,) = epoch(3, batch_size=10_000, shuffle=True, passes=3)
    first, second, third = (thrice % NEXT_VIEW).view(3, -1)

    assert torch.equal(first, once)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_processes_share_the_global_batches_of_several_passes() -> None:
    settings = {"shuffle": True, "passes": 3, "repeats": 2}
    alone = epoch(2, batch_size=8, **settings)
    shared = [epoch(2, batch_size=4, rank=rank, world_size=2, **settings) for rank in range(2)]
    for whole, *slices in zip(alone, *shared, strict=True):
        assert torch.equal(whole, torch.cat(slices))
    assert len(alone) == 3 * len(INDEX) // 8
