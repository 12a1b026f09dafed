"""The bits are splitmix64's, and random along every input."""

import itertools

import pytest
import torch
from scipy import stats

from vitkd.data.hashing import fold, key_of, random_bits, uniform, uniform_int

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The next output from `state`, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_first_output_is_the_published_one() -> None:
    assert key_of(0).item() & MASK == 0xE220A8397B1DCDAF == splitmix64(0)


def test_key_of_folds_its_parts_in_turn() -> None:
    state = 0
    for part in (7, 3, 12):
        state = splitmix64((state + part * 0x9E3779B97F4A7C15) & MASK)
    assert key_of(7, 3, 12).item() & MASK == state


def test_keys_of_near_seeds_and_epochs_differ() -> None:
    keys = {key_of(seed, epoch).item() for seed, epoch in itertools.product(range(30), range(30))}
    assert len(keys) == 900


@pytest.mark.parametrize("along", ["index", "epoch", "seed", "stream"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    count, many = 20_000, torch.arange(20_000)
    bits = {
        "index": lambda: random_bits(key_of(0, 0), many, 1)[0],
        "epoch": lambda: fold(fold(key_of(0), many), torch.tensor(5)),
        "seed": lambda: fold(fold(key_of(), many), torch.tensor(5)),
        "stream": lambda: random_bits(key_of(0, 0), torch.tensor([5]), count)[:, 0],
    }[along]()
    draws = uniform(bits).double()
    assert 0 <= draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    assert draws.mean().item() == pytest.approx(1 / 2, abs=4 / (12 * count) ** 0.5)
    assert draws.var().item() == pytest.approx(1 / 12, abs=4 * (1 / 180 / count) ** 0.5)
    assert stats.kstest(draws.numpy(), "uniform").pvalue > 1e-3
    for lag in (1, 2, 8, 64):
        correlation = torch.corrcoef(torch.stack([draws[:-lag], draws[lag:]]))[0, 1].item()
        assert abs(correlation) < 4 / count**0.5


def test_streams_and_epochs_are_independent() -> None:
    index = torch.arange(20_000)
    rows = torch.cat([uniform(random_bits(key_of(0, epoch), index, 5)) for epoch in range(3)])
    off_diagonal = torch.corrcoef(rows.double()) - torch.eye(15)
    assert off_diagonal.abs().max() < 4.5 / 20_000**0.5


def test_each_bit_is_a_fair_coin() -> None:
    bits = random_bits(key_of(1, 2), torch.arange(20_000), 1)[0]
    shares = torch.stack([((bits >> place) & 1).double().mean() for place in range(64)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.5 / 20_000**0.5


def test_below_is_uniform_and_takes_a_bound_each() -> None:
    bits = random_bits(key_of(3), torch.arange(18_000), 1)[0]
    counts = uniform_int(bits, 9).bincount(minlength=9)
    assert len(counts) == 9
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    bounds = torch.arange(18_000) % 5 + 1
    assert (uniform_int(bits, bounds) < bounds).all()
    assert (uniform_int(bits, 1) == 0).all()
    assert uniform_int(bits, 2**31).max() < 2**31
