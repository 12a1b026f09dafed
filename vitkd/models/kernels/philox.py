"""Dropout on a GPU whose masks are a function of (student's seed, step, place in the model, value).

One kernel draws and applies a mask, and draws it again for the gradient: nothing is kept in between. Kernels
that compute something else besides draw the same numbers by `draw_four`, so their masks are the same.

Shapes: S stacked students, n values of one student.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitkd.models.dropout import Masks

# Lanes of a block, each with four neighbouring values: Philox (Salmon et al. 2011) gives four numbers.
LANES = 256


@triton.jit
def draw_four(counter, seed, step, place):
    """The 32-bit numbers 4·counter … 4·counter + 3 of a student's place and step, [*counter, 2, 2]."""
    counter = counter.to(tl.uint32)
    zero = counter * 0
    now = tl.load(step).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, zero + place, zero + now, zero)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def multiplier(drawn, dropped, scale):
    """What dropout multiplies with: 0 where a number is below `dropped`, the probability times 2³²."""
    return tl.where(drawn.to(tl.int64) >= dropped, scale, 0.0)


# What is specialised on 1 would be no number of the device's.
@triton.jit(do_not_specialize=["place", "dropped"])
def _drop(x, y, seeds, step, n, place, dropped, scale, LANES: tl.constexpr):
    """y = x or 0, for one student and 4·LANES of its n values."""
    student, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    drawn = draw_four(block * LANES + tl.arange(0, LANES), tl.load(seeds + student), step, place)
    # Value by value: a lane's four lie side by side, so that memory is read and written in wide pieces.
    kept = multiplier(tl.reshape(drawn, (4 * LANES,)), dropped, scale)
    value = block * 4 * LANES + tl.arange(0, 4 * LANES)
    given = tl.load(x + student * n + value, mask=value < n, other=0.0)
    tl.store(y + student * n + value, tl.where(kept > 0, given * kept, 0.0), mask=value < n)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seeds: Tensor, step: Tensor, place: int, p: float) -> Tensor:
        ctx.save_for_backward(seeds, step)
        ctx.place, ctx.p = place, p
        return _apply(x, Masks(seeds, step, place, p))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seeds, step = ctx.saved_tensors
        return _apply(grad, Masks(seeds, step, ctx.place, ctx.p)), None, None, None, None


def dropped(x: Tensor, masks: Masks) -> Tensor:
    """`x` [S, …], on the device, with each value 0 with probability p, the others scaled by 1/(1 − p)."""
    result: Tensor = _Dropped.apply(x, *masks)
    return result


def arguments(masks: Masks | None) -> tuple[Tensor | None, Tensor | None, int, int, float]:
    """What a kernel is given to draw these masks: seeds, step, place, threshold and scale."""
    if masks is None:
        return None, None, 0, 0, 1.0
    return masks.seeds, masks.step, masks.place, round(masks.p * 2**32), 1 / (1 - masks.p)


def _apply(x: Tensor, masks: Masks) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    values = x[0].numel()
    grid = (len(x), triton.cdiv(values, 4 * LANES))
    seeds, step, *rest = arguments(masks)
    _drop[grid](x, y, seeds, step, values, *rest, LANES)
    return y
