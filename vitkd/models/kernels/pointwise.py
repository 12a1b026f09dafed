"""What lies between a stack's matrix products, one kernel a gap: layer norm, and a linear layer's last steps.

    y = w ∘ x̂ + b        x̂ = (x − mean x)/√(var x + ε)
    y = M ∘ GELU(h + b)   or   y = r + M ∘ (h + b)        M: dropout's 0 or 1/(1 − p), r: the residual

and backwards, with x̂ and M computed again:

    dx = (g − mean g − x̂ mean(g ∘ x̂))/√(var x + ε), g = w ∘ dy        dw = Σ_rows dy ∘ x̂    db = Σ_rows dy
    dh = M ∘ GELU'(h + b) ∘ dy   or   dh = M ∘ dy, dr = dy            db = Σ_rows dh

Why: PyTorch's layer norm does not know weights of a student each, so these cost passes of their own; a bias,
an activation, a mask and a sum are a pass each, and their gradients again. Here each gap reads and writes
its tensors once, both ways. A model of the memory traffic gives 5 ms of 30 a step of 108 students on an
H100; that is no measurement.

Shapes: S stacked students, R rows of one (all its images' tokens), C columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkd.models.dropout import Masks
from vitkd.models.kernels.philox import arguments, draw_four, multiplier

VALUES = 4096
"""of a program's block, 32 a thread"""


@triton.jit
def _block(R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program's block lies in [S, R, C], its columns in [S, C] and in [S, blocks, C]; what exists."""
    student = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    of_student, of_block = (
        student * C + column,
        (student * tl.num_programs(1) + tl.program_id(1)) * C + column,
    )
    return (student * R + row) * C + column[None, :], of_student, of_block, row < R, column < C


@triton.jit
def _normalised(x, C, epsilon, exists):
    """x̂ of rows x, and 1/√(var x + ε)."""
    centred = tl.where(exists, x - (tl.sum(x, 1) / C)[:, None], 0.0)
    inverse_deviation = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + epsilon)
    return centred * inverse_deviation[:, None], inverse_deviation[:, None]


@triton.jit
def _norm(x, w, b, y, R, C, epsilon, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y of ROWS rows."""
    at, of_student, _, is_row, is_column = _block(R, C, ROWS, COLUMNS)
    exists = is_row & is_column[None, :]
    normalised, _ = _normalised(tl.load(x + at, mask=exists, other=0.0).to(tl.float32), C, epsilon, exists)
    weight = tl.load(w + of_student, mask=is_column, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(b + of_student, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, normalised * weight + bias, mask=exists)


@triton.jit
def _norm_backward(x, w, dy, dx, dw, db, R, C, epsilon, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dx of ROWS rows, if wanted, and their parts of dw and db."""
    at, of_student, of_block, is_row, is_column = _block(R, C, ROWS, COLUMNS)
    exists = is_row & is_column[None, :]
    loaded = tl.load(x + at, mask=exists, other=0.0).to(tl.float32)
    normalised, inverse_deviation = _normalised(loaded, C, epsilon, exists)
    gradient = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(dw + of_block, tl.sum(gradient * normalised, 0), mask=is_column)
    tl.store(db + of_block, tl.sum(gradient, 0), mask=is_column)
    if dx is not None:
        g = gradient * tl.load(w + of_student, mask=is_column, other=0.0).to(tl.float32)[None, :]
        along_mean, along_x = tl.sum(g, 1) / C, tl.sum(g * normalised, 1) / C
        tl.store(
            dx + at,
            (g - along_mean[:, None] - normalised * along_x[:, None]) * inverse_deviation,
            mask=exists,
        )


@triton.jit
def _masks(seeds, step, place, dropped, scale, R, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """M of a program's block; C is a multiple of 4, so that a lane's four numbers lie in one row."""
    m = tl.full((ROWS, COLUMNS), 1.0, tl.float32)
    if seeds is not None:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
        four = tl.program_id(2) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
        drawn = draw_four(row * (C // 4) + four, tl.load(seeds + tl.program_id(0)), step, place)
        m = multiplier(tl.reshape(drawn, (ROWS, COLUMNS)), dropped, scale)
    return m


@triton.jit
def _normal_cdf(x):
    """Φ(x) of the standard normal distribution: GELU is x Φ(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit(do_not_specialize=["place", "dropped"])
def _finish(
    h, b, residual, y, seeds, step, place, dropped, scale, R, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of a block; without a residual it is activated."""
    at, of_student, _, is_row, is_column = _block(R, C, ROWS, COLUMNS)
    exists = is_row & is_column[None, :]
    bias = tl.load(b + of_student, mask=is_column, other=0.0).to(tl.float32)[None, :]
    value = tl.load(h + at, mask=exists, other=0.0).to(tl.float32) + bias
    m = _masks(seeds, step, place, dropped, scale, R, C, ROWS, COLUMNS)
    if residual is None:
        value = m * value * _normal_cdf(value)
    else:
        value = tl.load(residual + at, mask=exists, other=0.0).to(tl.float32) + m * value
    tl.store(y + at, value, mask=exists)


@triton.jit(do_not_specialize=["place", "dropped"])
def _finish_backward(
    h, b, dy, dh, db, seeds, step, place, dropped, scale, R, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dh of a block and its part of db; h is given where there was an activation."""
    at, of_student, of_block, is_row, is_column = _block(R, C, ROWS, COLUMNS)
    exists = is_row & is_column[None, :]
    gradient = tl.load(dy + at, mask=exists, other=0.0).to(tl.float32)
    gradient *= _masks(seeds, step, place, dropped, scale, R, C, ROWS, COLUMNS)
    if h is not None:
        bias = tl.load(b + of_student, mask=is_column, other=0.0).to(tl.float32)[None, :]
        value = tl.load(h + at, mask=exists, other=0.0).to(tl.float32) + bias
        density = tl.exp(-0.5 * value * value) * 0.3989422804014327
        gradient *= _normal_cdf(value) + value * density
    tl.store(dh + at, gradient, mask=exists)
    tl.store(db + of_block, tl.sum(gradient, 0), mask=is_column)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.epsilon = epsilon
        grid, rest = tiles(x, whole_rows=True)
        y = torch.empty_like(x, dtype=dtype)
        _norm[grid](x, w, b, y, *x.shape[1:], epsilon, **rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grid, rest = tiles(x, whole_rows=True)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        parts = x.new_empty(2, *grid[:2], x.shape[-1], dtype=torch.float32)
        _norm_backward[grid](x, w, dy.contiguous(), dx, *parts, *x.shape[1:], ctx.epsilon, **rest)
        return dx, *parts.sum(2).to(w.dtype), None, None


class _Finished(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, b: Tensor, residual: Tensor | None, masks: Masks | None) -> Tensor:
        seeds, step, *ctx.numbers = arguments(masks)
        # A sum has a gradient that does not depend on its terms.
        kept = (None, None) if residual is not None else (h, b)
        ctx.save_for_backward(*kept, seeds, step)
        ctx.dtypes = h.dtype, b.dtype
        y = torch.empty_like(h if residual is None else residual)
        grid, rest = tiles(h)
        _finish[grid](h, b, residual, y, seeds, step, *ctx.numbers, *h.shape[1:], **rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, b, seeds, step = ctx.saved_tensors
        grid, rest = tiles(dy := dy.contiguous())
        dh = torch.empty_like(dy, dtype=ctx.dtypes[0])
        db = dy.new_empty(*grid[:2], dy.shape[-1], dtype=torch.float32)
        _finish_backward[grid](h, b, dy, dh, db, seeds, step, *ctx.numbers, *dy.shape[1:], **rest)
        return dh, db.sum(1).to(ctx.dtypes[1]), dy if ctx.needs_input_grad[2] else None, None


def tiles(x: Tensor, whole_rows: bool = False) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The programs for blocks of `x` [S, R, C], and the blocks' sides."""
    students, rows, columns = x.shape
    side = triton.next_power_of_2(columns)
    side = side if whole_rows else max(16, min(side, 128))
    height = max(1, min(VALUES // side, triton.next_power_of_2(rows)))
    grid = (students, triton.cdiv(rows, height), triton.cdiv(columns, side))
    return grid, {"ROWS": height, "COLUMNS": side}


def normed(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, feeds_product: bool = False) -> Tensor:
    """`x` [S, …, C], each row normalised, times weight plus bias [S, C].

    Under autocast in float32 or, where it `feeds_product`, in the precision to which that would round it.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda") if feeds_product else torch.float32
    rows = x.flatten(1, -2).contiguous()
    result: Tensor = _Normed.apply(rows, weight.contiguous(), bias.contiguous(), epsilon, dtype)
    return result.view(x.shape)


def finished(h: Tensor, bias: Tensor, masks: Masks | None, residual: Tensor | None = None) -> Tensor:
    """Dropout of GELU(h + b), or, given a residual, this plus dropout of h + b; of `h` [S, …, C].

    Args:
        bias: [S, C].
        masks: drawn as `Dropout` would of [S, …, C]; None for no dropout.
        residual: of h's shape, in a precision that is no lower.
    """
    rows = None if residual is None else residual.flatten(1, -2).contiguous()
    result: Tensor = _Finished.apply(h.flatten(1, -2).contiguous(), bias.contiguous(), rows, masks)
    return result.view(h.shape)
