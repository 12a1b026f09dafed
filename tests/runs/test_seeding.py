"""A teacher and a student of one seed share no numbers; the same model of one seed shares all."""

import pytest
import torch

from vitkd.runs.seeding import DROPOUT, ORDER, WEIGHTS, seed_generators, seed_of


def weights(config, seed=0):
    seed_generators(seed, WEIGHTS, config)
    return config.build().state_dict()


def test_the_same_model_and_seed_start_alike(tiny):
    one, other = weights(tiny()), weights(tiny())

    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("change", [{"depth": 5}, {"num_heads": 4}, {"mlp_dim": 32}])
def test_another_model_of_the_same_seed_starts_elsewhere(tiny, change):
    """Equal shapes or equal beginnings would make a student a part of its teacher."""
    one, other = weights(tiny()), weights(tiny(**change))

    for name in one.keys() & other.keys():
        a, b = one[name].flatten(), other[name].flatten()
        shared = min(len(a), len(b))
        is_constant = bool((a == a[0]).all())  # a LayerNorm's ones and zeros
        assert is_constant or not torch.equal(a[:shared], b[:shared]), name


def test_streams_and_seeds_differ():
    seeds = [
        seed_of(seed, stream, "model") for seed in (0, 1, 2**32 - 1) for stream in (WEIGHTS, ORDER, DROPOUT)
    ]

    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**32 for seed in seeds)
