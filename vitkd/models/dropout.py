"""Dropout and stochastic depth with quick masks on the CPU, and with masks of their own for stacked students.

Shapes: S stacked students (absent for one model), B batch.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masks(NamedTuple):
    """What the masks of one dropout layer are a function of, where a kernel draws them.

    A student's are the same in any stack.
    """

    seeds: Tensor
    """[S] int64"""
    step: Tensor
    """0-dim int64 on the device, the same in the backward pass"""
    place: int
    """number of the layer within a step"""
    p: float
    """the probability that a value becomes 0"""


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) from PyTorch's own generator, or by `drop` where that is set.

    Args:
        p: the probability that a value becomes 0; on the CPU to four digits.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.drop: Callable[[Tensor, float], Tensor] | None = None
        self.next_masks: Callable[[float], Masks] | None = None

    @property
    def rate(self) -> float:
        """`p` in training, otherwise 0."""
        return self.p if self.training else 0.0

    def has_own_masks(self, x: Tensor) -> bool:
        """Whether `forward` would drop values of `x` by other masks than PyTorch's fused kernels draw."""
        return self.rate > 0 and (self.drop is not None or x.device.type == "cpu")

    @property
    def suits_kernels(self) -> bool:
        """Whether a kernel can apply it: it does nothing, or its masks can be drawn anywhere."""
        return self.rate == 0 or self.next_masks is not None

    def masks(self) -> Masks | None:
        """In place of `forward`: the masks that a kernel is to draw; None where nothing is dropped."""
        return self.next_masks(self.p) if self.rate > 0 and self.next_masks is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_own_masks(x):
            return F.dropout(x, self.p, self.training)
        if self.drop is not None:
            return self.drop(x, self.p)
        return x * quick_mask(x, self.p)


class DropPath(Dropout):
    """Stochastic depth (Huang et al. 2016): leaves out an image's residual branches, each with probability p.

    What a branch adds to the tokens becomes 0 for all tokens of the image, or is scaled by 1/(1 − p).
    """

    def draw(self, like: Tensor) -> Tensor | None:
        """What to multiply a block's two branches with [2, *S, B, 1, 1]; None where none is left out.

        The shape, device and precision of `like` [*S, B] are those of each branch's numbers.
        """
        if self.rate == 0:
            return None
        # Students first, as their streams have it.
        drawn: Tensor = self(like.new_ones(*like.shape, 2))
        return drawn.movedim(-1, 0)[..., None, None]


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


def drop_by(
    drop: Callable[[Tensor, float], Tensor],
    modules: Iterable[nn.Module],
    next_masks: Callable[[float], Masks] | None = None,
) -> None:
    """Let every `Dropout` among `modules` call `drop(x, p)` in training.

    It zeroes each value of `x` [S, …] with probability `p` and scales the others by 1/(1 − p). A kernel that
    does that itself calls `next_masks(p)` instead.
    """
    for module in modules:
        if isinstance(module, Dropout):
            module.drop, module.next_masks = drop, next_masks
