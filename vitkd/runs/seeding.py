"""Independent random streams from one seed."""

import zlib

import numpy as np
import torch

from vitkd.models import Model, ModelConfig

WEIGHTS, ORDER, DROPOUT = range(3)


def seed_of(seed: int, stream: int, model: object) -> int:
    """A 32-bit seed of its own for each (seed, stream, model configuration).

    The model takes part so that a teacher and a student of the same seed share nothing: equal numbers would
    make their first weights, order and views alike, and that alone makes a student easier to teach. 32 bits,
    because PyTorch's generator on the CPU reads no more.
    """
    entropy = [seed, stream, zlib.crc32(repr(model).encode())]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_generators(seed: int, stream: int, model: object, process: int = 0) -> None:
    """Start PyTorch's generators at `seed_of`, elsewhere in each of a run's processes."""
    torch.manual_seed(seed_of(seed, stream, model) + process)


def first_weights(seed: int, config: ModelConfig) -> Model:
    """A model as training begins with it; its random stream is left where building has brought it."""
    seed_generators(seed, WEIGHTS, config)
    return config.build()
