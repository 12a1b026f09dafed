"""A model of vitkd's beside timm's own network."""

from typing import Any

import timm
import torch
from torch import nn

from vitkd.models import TimmConfig


def beside_timm(config: TimmConfig, noise: float = 0.0) -> tuple[Any, Any]:
    """The model, and timm's own network with the same weights; neither knows the other.

    `noise` is added to all weights: those that training begins with make nearly uniform maps.
    """
    torch.manual_seed(0)
    model = config.build().eval()
    if noise:
        roughen(model, noise)
    network = timm.create_model(config.name, num_classes=config.num_classes, **config.options).eval()
    network.load_state_dict(model.network.state_dict())
    return model, network


@torch.no_grad()
def roughen(model: nn.Module, noise: float) -> None:
    """Add normal noise of this deviation to every weight."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=noise)
