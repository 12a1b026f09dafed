"""Independent random streams from one seed."""

import zlib

import numpy as np
import torch

from vitkd.errors import naming
from vitkd.models import Model, ModelConfig, load_model
from vitkd.models.initialisation import InitialisedConfig
from vitkd.models.selection import select_weights

WEIGHTS, ORDER, DROPOUT = range(3)


def seed_of(seed: int, stream: int, model: object) -> int:
    """A 32-bit seed for each (seed, stream, model configuration).

    It depends on the model so that a teacher and a student of the same seed share no random numbers: equal
    first weights, order and views would by themselves make a student easier to teach. 32 bits, because
    PyTorch's CPU generator reads no more.
    """
    entropy = [seed, stream, zlib.crc32(repr(model).encode())]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_generators(seed: int, stream: int, model: object, process: int = 0) -> None:
    """Seed PyTorch's generators by `seed_of`, differently in each of a run's processes."""
    torch.manual_seed(seed_of(seed, stream, model) + process)


def first_weights(seed: int, config: ModelConfig) -> Model:
    """A model with its initial weights; PyTorch's generators are left in the state after building it.

    Raises ConfigError if a file that some of them come from cannot be read, or does not suit the model.
    """
    seed_generators(seed, WEIGHTS, config)
    model = config.build()
    if isinstance(config, InitialisedConfig) and config.source_file is not None:
        with naming("init_from="):
            source = load_model(config.source_file)
        select_weights(model, source, config.init_layers)
    return model
