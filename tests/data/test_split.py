"""Held-out images: the same share of each class, the same images for ever."""

import pytest
import torch

from vitkd.data.split import FileSplit, Split, hold_out


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
