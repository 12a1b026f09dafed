"""Dropout on a GPU whose masks are a function of (student's seed, step, place in the model, value).

One kernel draws and applies a mask, and draws it again for the gradient: nothing is kept in between.

Shapes: S stacked students, n values of one student.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Lanes of a block, each with four neighbouring values: Philox (Salmon et al. 2011) gives four numbers.
LANES = 256


# What is specialised on 1 would be no number of the device's.
@triton.jit(do_not_specialize=["place", "dropped"])
def _drop(x, y, seeds, step, n, place, dropped, scale, LANES: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """y = x or 0, for one student and 4·LANES of its n values; `dropped` is the probability times 2³²."""
    student, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    counter = (block * LANES + tl.arange(0, LANES)).to(tl.uint32)
    zero = counter * 0
    now = tl.load(step).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seeds + student), counter, zero + place, zero + now, zero)
    # Value by value: a lane's four lie side by side, so that memory is read and written in wide pieces.
    drawn = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * LANES,))
    value = block * 4 * LANES + tl.arange(0, 4 * LANES)
    given = tl.load(x + student * n + value, mask=value < n, other=0.0)
    kept = tl.where(drawn.to(tl.int64) >= dropped, given * scale, 0.0)
    tl.store(y + student * n + value, kept, mask=value < n)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float) -> Tensor:
        ctx.save_for_backward(seeds, step)
        ctx.place, ctx.p = place, p
        return _apply(x, seeds, step, place, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seeds, step = ctx.saved_tensors
        return _apply(grad, seeds, step, ctx.place, ctx.p), None, None, None, None


def dropped(x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float) -> Tensor:
    """`x` [S, …] with each value 0 with probability `p`, the others scaled by 1/(1 − p).

    Args:
        x: on the device.
        seeds: [S] int64.
        step: 0-dim int64, the same in the backward pass.
        place: number of the dropout layer within a step.
    """
    result: Tensor = _Dropped.apply(x, seeds, step, place, p)
    return result


def _apply(x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    values = x[0].numel()
    grid = (len(x), triton.cdiv(values, 4 * LANES))
    _drop[grid](x, y, seeds, step, values, place, round(p * 2**32), 1 / (1 - p), LANES)
    return y
