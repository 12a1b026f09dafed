"""Attention over few tokens as one kernel: the fused projection in, the heads' merged values out.

    S = τ⁻¹ QKᵀ/√head_dim   P = softmax(mask(S))   W = P ∘ M   O = W V       M: dropout's 0 or 1/(1 − p)

and backwards, with S, P and M computed again, G the gradient that arrives through tapped scores:

    dV = Wᵀ dO         dP = dO Vᵀ ∘ M              dS = P ∘ (dP − Σ_key P ∘ dP) + G
    dQ = τ⁻¹ dS K/√head_dim                        dK = τ⁻¹ dSᵀ Q/√head_dim

Why: PyTorch copies Q, K and V out of the projection and their gradients back into it, and writes scores,
weights, masks and all their gradients. Here a head's 17 tokens stay on the chip: forwards 3 reads and 1 write
of [B, T, H·head_dim], backwards 4 and 3. A model of the memory traffic gives 7 ms of 30 a step of 108
students on an H100; that is no measurement.

Shapes: S stacked students (absent for one model), B batch, T tokens, H heads.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkd.models.dropout import Masks
from vitkd.models.kernels.philox import arguments, draw_four, multiplier

MASKS = ["place", "dropped"]
"""arguments that change from call to call, for which nothing is to be compiled again"""


@triton.jit
def _tokens(
    parts: tl.constexpr, T: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where this program's head of an image lies in [*S, B, T, parts·H·head_dim], and what of it exists."""
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    token, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = (image * T + token) * (parts * HEADS * WIDTH) + head * WIDTH + column
    return at, (token < T) & (column < WIDTH)


@triton.jit
def _pairs(T: tl.constexpr, ROWS: tl.constexpr):
    """Where its query-key pairs lie in [*S, B, H, T, T], and which of them exist."""
    query, key = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    return (tl.program_id(0).to(tl.int64) * T + query) * T + key, (query < T) & (key < T)


@triton.jit
def _masks(
    seeds, step, images, place, dropped, scale,
    T: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """M of this program's head, [ROWS, ROWS]."""
    m = tl.full((ROWS, ROWS), 1.0, tl.float32)
    if seeds is not None:
        # The values of a student are numbered, and four in a row drawn at once; T² of them begin anywhere.
        student, first = tl.program_id(0) // (images * HEADS), tl.program_id(0) % (images * HEADS) * T * T
        drawn = draw_four(first // 4 + tl.arange(0, DRAWS // 4), tl.load(seeds + student), step, place)
        query, key = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        value = tl.minimum(first % 4 + query * T + key, DRAWS - 1)
        own = tl.gather(tl.reshape(drawn, (DRAWS,)), tl.reshape(value, (ROWS * ROWS,)), 0)
        m = multiplier(tl.reshape(own, (ROWS, ROWS)), dropped, scale)
    return m


@triton.jit
def _softmax(scores, allowed, T: tl.constexpr, ROWS: tl.constexpr):
    """P of scores S, [ROWS, ROWS] both; 0 for keys beyond the last token."""
    query, key = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
    seen = tl.broadcast_to(key < T, (ROWS, ROWS))
    if allowed is not None:
        # Rows beyond the last token see something, or they would be NaN.
        inside = (query < T) & (key < T)
        seen = seen & (tl.load(allowed + query * T + key, mask=inside, other=1) != 0)
    masked = tl.where(seen, scores, float("-inf"))
    exponential = tl.exp(masked - tl.max(masked, 1)[:, None])
    return exponential / tl.sum(exponential, 1)[:, None]


@triton.jit
def _factor(inverse, images, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """τ⁻¹/√head_dim of this program's head."""
    factor = WIDTH**-0.5
    if inverse is not None:
        student, head = tl.program_id(0) // (images * HEADS), tl.program_id(0) % HEADS
        factor *= tl.load(inverse + student * HEADS + head)
    return factor


@triton.jit(do_not_specialize=MASKS)
def _attend(
    qkv, inverse, allowed, seeds, step, out, scores_out, images, place, dropped, scale,
    T: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DRAWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and, if wanted, S of one head of one image."""
    at, inside = _tokens(3, T, HEADS, WIDTH, ROWS, COLUMNS)
    q = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(qkv + at + HEADS * WIDTH, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(qkv + at + 2 * HEADS * WIDTH, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * _factor(inverse, images, HEADS, WIDTH)
    if scores_out is not None:
        pair, exists = _pairs(T, ROWS)
        tl.store(scores_out + pair, scores, mask=exists)
    m = _masks(seeds, step, images, place, dropped, scale, T, HEADS, ROWS, DRAWS)
    w = (_softmax(scores, allowed, T, ROWS) * m).to(v.dtype)
    merged, inside = _tokens(1, T, HEADS, WIDTH, ROWS, COLUMNS)
    tl.store(out + merged, tl.dot(w, v, input_precision=PRECISION), mask=inside)


@triton.jit(do_not_specialize=MASKS)
def _attend_backward(
    qkv, inverse, allowed, seeds, step, d_out, d_scores, d_qkv, d_inverse, images, place, dropped, scale,
    T: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DRAWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV of one head of one image, and its part of the gradient of τ⁻¹, which is Σ dS ∘ S τ."""
    at, inside = _tokens(3, T, HEADS, WIDTH, ROWS, COLUMNS)
    pair, exists = _pairs(T, ROWS)
    q = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(qkv + at + HEADS * WIDTH, mask=inside, other=0.0).to(tl.float32)
    products, factor = (
        tl.dot(q, tl.trans(k), input_precision=PRECISION),
        _factor(inverse, images, HEADS, WIDTH),
    )
    ds, dv = tl.zeros((ROWS, ROWS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    if d_out is not None:
        m = _masks(seeds, step, images, place, dropped, scale, T, HEADS, ROWS, DRAWS)
        p = _softmax(products * factor, allowed, T, ROWS)
        v = tl.load(qkv + at + 2 * HEADS * WIDTH, mask=inside, other=0.0)
        merged, _ = _tokens(1, T, HEADS, WIDTH, ROWS, COLUMNS)
        do = tl.load(d_out + merged, mask=inside, other=0.0)
        dv = tl.dot(tl.trans((p * m).to(v.dtype)), do, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION) * m
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    tl.store(d_qkv + at + 2 * HEADS * WIDTH, dv, mask=inside)
    if d_scores is not None:
        ds += tl.load(d_scores + pair, mask=exists, other=0.0)
    if d_inverse is not None:
        tl.store(d_inverse + tl.program_id(0), tl.sum(tl.where(exists, ds * products, 0.0)) * WIDTH**-0.5)
    ds *= factor
    tl.store(d_qkv + at, tl.dot(ds, k, input_precision=PRECISION), mask=inside)
    tl.store(d_qkv + at + HEADS * WIDTH, tl.dot(tl.trans(ds), q, input_precision=PRECISION), mask=inside)


class Form(NamedTuple):
    """What both passes have in common besides tensors."""

    heads: int
    with_scores: bool
    masks: Masks | None

    def launch(self, kernel: Any, qkv: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
        """Run `kernel` for each head of each image in `qkv` [*S, B, T, 3·H·head_dim]."""
        images, tokens, width = qkv.shape[-3:]
        seeds, step, *mask_numbers = arguments(self.masks)
        inverse, allowed, *results = tensors
        numbers = constants(tokens, self.heads, width // (3 * self.heads))
        grid = (qkv.numel() // (tokens * width) * self.heads,)
        kernel[grid](qkv, inverse, allowed, seeds, step, *results, images, *mask_numbers, **numbers)


def constants(tokens: int, heads: int, head_dim: int) -> dict[str, Any]:
    """What is compiled into a kernel: products take at least 16 rows and columns, powers of two."""
    rows, columns = (max(16, triton.next_power_of_2(size)) for size in (tokens, head_dim))
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        **{"T": tokens, "HEADS": heads, "WIDTH": head_dim, "ROWS": rows, "COLUMNS": columns},
        "DRAWS": triton.next_power_of_2(tokens**2 + 3),
        "PRECISION": "ieee" if exact else "tf32",
    }


class _Attended(torch.autograd.Function):
    """Autocast is nothing to it: `qkv` comes in the precision that it has chosen, the rest is float32."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, inverse: Tensor | None, allowed: Tensor | None, form: Form
    ) -> tuple[Tensor, Tensor | None]:
        *outer, tokens, width = qkv.shape
        out = qkv.new_empty(*outer, tokens, width // 3)
        square = (*outer, form.heads, tokens, tokens)
        scores = qkv.new_empty(square, dtype=torch.float32) if form.with_scores else None
        form.launch(_attend, qkv, (inverse, allowed, out, scores))
        masks = form.masks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, inverse, allowed, masks and masks.seeds, masks and masks.step)
        ctx.form = form
        return out, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, inverse, allowed, *_ = ctx.saved_tensors
        d_out, d_scores = (None if grad is None else grad.contiguous() for grad in (d_out, d_scores))
        d_qkv = torch.empty_like(qkv)
        of_images = None
        if inverse is not None:
            of_images = inverse.new_empty(*qkv.shape[:-2], ctx.form.heads)
        ctx.form.launch(_attend_backward, qkv, (inverse, allowed, d_out, d_scores, d_qkv, of_images))
        return d_qkv, None if of_images is None else of_images.sum(-2), None, None


def attend(
    qkv: Tensor,
    heads: int,
    inverse_temperature: Tensor | None = None,
    allowed: Tensor | None = None,
    masks: Masks | None = None,
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The heads' merged values O [*S, B, T, H·head_dim] and, if wanted, the scores S [*S, B, H, T, T].

    Scores are float32, before mask and softmax. Only a first derivative is known.

    Args:
        qkv: queries, keys and values side by side [*S, B, T, 3·H·head_dim], float32 or half of that.
        heads: H.
        inverse_temperature: τ⁻¹ [*S, H].
        allowed: [T, T], False where a query may not look at a key.
        masks: of the weights, drawn as `Dropout` would of [S, B, H, T, T]; None for no dropout.
        with_scores: whether these are written and may be differentiated.
    """
    inverse = None if inverse_temperature is None else inverse_temperature.float().contiguous()
    seen = None if allowed is None else allowed.to(torch.uint8)
    result: tuple[Tensor, Tensor | None] = _Attended.apply(
        qkv.contiguous(), inverse, seen, Form(heads, with_scores, masks)
    )
    return result
