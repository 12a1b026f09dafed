"""How a run computes: how exact its matrix products are, and by whose kernels its layers."""

import torch

from vitkd.config.run import Config
from vitkd.models.kernels import allow_kernels
from vitkd.process.isolation import set_matmul_precision


def compute_as(config: Config, device: torch.device) -> None:
    """Have this process compute as `config` asks for on `device`: `matmul_precision` and `kernels`."""
    set_matmul_precision(config.matmul_precision, device)
    allow_kernels(config.kernels)
