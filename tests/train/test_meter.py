"""Means over images, however these were cut into batches and shared among processes."""

import pytest
import torch

from vitkd.train.logged import Meter


def test_the_mean_is_over_images_not_over_batches():
    meter = Meter()
    images = torch.arange(13.0)
    for batch in images.split([5, 5, 2, 1]):
        meter.add({"value": batch.mean()}, len(batch))

    assert meter.images == 13
    assert meter.means() == {"value": [pytest.approx(6.0)]}


def test_values_of_any_shape_are_flattened_and_kept_apart():
    meter = Meter()
    for factor, images in ((1, 3), (5, 1)):
        meter.add({"maps": factor * torch.tensor([[1.0, 2.0]]), "loss": factor * torch.tensor(3.0)}, images)

    # Three images count 1, one counts 5: on average 2.
    assert meter.means() == {"maps": [2.0, 4.0], "loss": [6.0]}


def test_a_meter_holds_no_graph():
    meter = Meter()
    weight = torch.ones(1000, requires_grad=True)
    meter.add({"loss": (weight * 2).sum()}, 1)
    meter.add({"loss": (weight * 2).sum()}, 1)

    assert not any(value.requires_grad for value in meter._sums.values())
    assert meter.means() == {"loss": [2000.0]}


def test_reset_forgets():
    meter = Meter()
    meter.add({"old": torch.tensor(1.0)}, 4)
    meter.reset()
    assert meter.means() == {}
    assert meter.images == 0

    meter.add({"new": torch.tensor(2.0)}, 1)
    assert meter.means() == {"new": [2.0]}


def test_processes_with_uneven_shares():
    """This one saw 3 images of mean 1, the other one 1 image of mean 5."""
    ours, theirs = Meter(), Meter()
    ours.add({"a": torch.tensor(1.0), "b": torch.tensor([0.0, 4.0])}, 3)
    theirs.add({"a": torch.tensor(5.0), "b": torch.tensor([4.0, 0.0])}, 1)
    sent = []
    theirs.means(lambda sums: sent.append(sums) or sums)

    assert ours.means(lambda sums: sums + sent[0]) == {"a": [2.0], "b": [1.0, 3.0]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_do_not_lose_the_sum(dtype):
    """A sum kept in half precision would stop growing, or overflow."""
    meter = Meter()
    for _ in range(1000):
        meter.add({"acc": torch.tensor(0.5, dtype=dtype)}, 256)

    assert meter.means() == {"acc": [0.5]}
