"""Held-out images: the same share of each class, the same images for ever."""

from itertools import pairwise

import pytest
import torch

from vitkd.data.split import FileSplit, Split, hold_out, share_of_each_class


def split_of(labels: torch.Tensor) -> Split:
    return Split(labels, ["a", "b", "c"], torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_every_class_gives_its_rounded_share(fraction: float) -> None:
    labels = torch.tensor([0] * 100 + [1] * 37 + [2] * 2)
    kept, held = hold_out(labels, split_of(labels).random_keys(0), fraction)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(139))
    for label, size in enumerate((100, 37, 2)):
        expected = min(max(round(fraction * size), 1), size - 1) if fraction else 0
        assert (labels[held] == label).sum() == expected


def test_a_lone_image_stays() -> None:
    kept, held = hold_out(torch.tensor([0, 1, 1]), torch.tensor([1, 2, 3]), 0.5)
    assert kept.tolist() == [0, 2]
    assert held.tolist() == [1]


def test_the_seed_decides_which() -> None:
    labels = torch.zeros(200, dtype=torch.int64)
    held = [hold_out(labels, split_of(labels).random_keys(seed), 0.1)[1] for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])


def test_a_file_keeps_its_lot_when_others_come_and_go(tmp_path) -> None:
    def lots(*paths: str) -> list[int]:
        labels = torch.zeros(len(paths), dtype=torch.int64)
        return FileSplit(labels, ["a"], tmp_path, list(paths), 3, 8, 1.0, 0).random_keys(0).tolist()

    assert lots("a/1.png", "a/2.png", "a/3.png")[2] == lots("a/3.png")[0]
    assert lots("a/1.png", "b/1.png")[0] != lots("a/1.png", "b/1.png")[1]


FRACTIONS = [1e-9, 0.01, 0.1, 0.2, 1 / 3, 0.5, 0.9, 0.99, 1.0]


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_stratified_and_nested(seed: int) -> None:
    labels = torch.tensor([0] * 100 + [1] * 37 + [2] * 2 + [3])[torch.randperm(140)]
    keys = split_of(labels).random_keys(seed)
    shares = [share_of_each_class(labels, keys, fraction) for fraction in FRACTIONS]
    for share, fraction in zip(shares, FRACTIONS, strict=True):
        counts = [max(round(fraction * size), 1) for size in (100, 37, 2, 1)]
        assert labels[share].bincount().tolist() == counts
        assert share.tolist() == sorted({*share.tolist()})
    assert all({*a.tolist()} <= {*b.tolist()} for a, b in pairwise(shares))
    assert torch.equal(shares[-1], torch.arange(140))


def test_a_share_of_one_class_does_not_depend_on_the_others() -> None:
    labels, keys = torch.tensor([0, 1] * 30), torch.randperm(60)
    share = share_of_each_class(labels, keys, 0.3)
    of_the_first = share[labels[share] == 0]
    assert torch.equal(of_the_first // 2, share_of_each_class(labels[::2], keys[::2], 0.3))
