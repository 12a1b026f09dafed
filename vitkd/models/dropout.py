"""Dropout whose stacked students draw from streams of their own.

Shapes: S stacked students.
"""

from collections.abc import Iterable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


class Streams(Protocol):
    """Where the masks of stacked students come from."""

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Zero each value of `x` [S, …] with probability `p` and scale the others by 1/(1 − p).

        What student s keeps depends on its own stream alone, not on who else is in the stack.
        """


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) from PyTorch's own generator, or from `streams` where they are set.

    Args:
        p: the probability that a value becomes 0.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.streams: Streams | None = None

    @property
    def rate(self) -> float:
        """`p` in training, otherwise 0."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.streams is None or not self.rate:
            return F.dropout(x, self.p, self.training)
        return self.streams.drop(x, self.p)


def draw_from(streams: Streams, modules: Iterable[nn.Module]) -> None:
    """Let every `Dropout` among `modules` draw from `streams`."""
    for module in modules:
        if isinstance(module, Dropout):
            module.streams = streams
