"""Dropout with quick masks on the CPU, and with streams of their own for stacked students.

Shapes: S stacked students.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
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
        p: the probability that a value becomes 0; on the CPU to four digits.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.streams: Streams | None = None

    @property
    def rate(self) -> float:
        """`p` in training, otherwise 0."""
        return self.p if self.training else 0.0

    def has_own_masks(self, x: Tensor) -> bool:
        """Whether `forward` would drop values of `x` by other masks than PyTorch's fused kernels draw."""
        return self.rate > 0 and (self.streams is not None or x.device.type == "cpu")

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_own_masks(x):
            return F.dropout(x, self.p, self.training)
        if self.streams is not None:
            return self.streams.drop(x, self.p)
        return x * quick_mask(x, self.p)


def quick_mask(x: Tensor, p: float, generators: Sequence[torch.Generator | None] = (None,)) -> Tensor:
    """What to multiply `x` with on the CPU: 0 with probability `p`, else 1/(1 − p); in its shape.

    Each of `generators` draws for its part of `x`, along the first axis. Four values share one 64-bit draw,
    so `p` is a multiple of 2⁻¹⁶. PyTorch's own masks take ten times as long, a quarter of a small student's
    step.
    """
    parts, values = len(generators), x.numel() // len(generators)
    draws = torch.empty(parts, -(-values // 4), dtype=torch.int64)
    for part, generator in zip(draws, generators, strict=True):
        part.random_(-(2**63), None, generator=generator)
    dropped = min(round(p * 2**16), 2**16 - 1)
    # As numbers, not as truth values: those are neither compared nor multiplied by vector instructions.
    drawn = draws.view(torch.int16)[:, :values].to(torch.promote_types(x.dtype, torch.float32))
    mask = drawn.ge_(dropped - 2**15).mul_(2**16 / (2**16 - dropped))
    return mask.to(x.dtype).view(x.shape)


def draw_from(streams: Streams, modules: Iterable[nn.Module]) -> None:
    """Let every `Dropout` among `modules` draw from `streams`."""
    for module in modules:
        if isinstance(module, Dropout):
            module.streams = streams
