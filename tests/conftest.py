"""What many tests start from."""

from collections.abc import Callable

import pytest
import torch

from vitkd.models import ViTConfig

# Tensors here are tiny: a second thread costs more than it brings, above all where other work runs beside.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., ViTConfig]:
    """Makes a small shape with 5 tokens; keyword arguments change it."""

    def make(**changes: object) -> ViTConfig:
        shape = {"image_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "embed_dim": 12}
        shape |= {"depth": 3, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
        return ViTConfig(**(shape | changes))

    return make
