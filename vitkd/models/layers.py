"""The ViT's layers, in vit-pytorch's layout: pre-norm, no QKV bias, inner width heads·head_dim.

Every parameter may carry one leading axis S, "which student": the same code then computes S independent
students at once (`Linear` becomes one batched matmul, the rest broadcasts). Nothing else here knows of it.

Shapes: S stacked students (absent for one model), B batch, T tokens, H heads, D embed_dim.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models import kernels
from vitkd.models.dropout import Dropout, DropPath
from vitkd.models.output import NO_BLOCK_TAPS, QKV, BlockTaps


def per_student(parameter: Tensor, x: Tensor) -> Tensor:
    """Reshape a stacked [S, D] vector to [S, 1, …, 1, D], so that it broadcasts against `x` [S, …, D]."""
    return parameter.reshape(len(parameter), *[1] * (x.ndim - 2), -1)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for `x` [B, …, in], or for `x` [S, B, …, in] when the weight is [S, out, in]."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x.flatten(1, -2)
    y = rows @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.unflatten(1, x.shape[1:-1])


class Linear(nn.Linear):
    """`project` with this layer's weight [*S, out, in] and bias [*S, out]."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def activated(x: Tensor, linear: Linear, dropout: Dropout) -> Tensor:
    """dropout(GELU(linear(x))), of stacked students on a GPU in one pass after the product."""
    if not _has_kernel(x, linear, dropout):
        return dropout(F.gelu(linear(x)))
    from vitkd.models.kernels.pointwise import finished

    return finished(project(x, linear.weight, None), linear.bias, dropout.masks())


def added(residual: Tensor | None, x: Tensor, linear: Linear, dropout: Dropout) -> Tensor:
    """residual + dropout(linear(x)), of stacked students on a GPU in one pass after the product."""
    if residual is None:
        return dropout(linear(x))
    if not _has_kernel(x, linear, dropout):
        return residual + dropout(linear(x))
    from vitkd.models.kernels.pointwise import finished

    return finished(project(x, linear.weight, None), linear.bias, dropout.masks(), residual)


def _has_kernel(x: Tensor, linear: Linear, dropout: Dropout) -> bool:
    """Whether what follows a product is one kernel: PyTorch fuses a solo model's bias by itself."""
    is_stacked, is_even = linear.weight.ndim == 3, linear.out_features % 4 == 0
    return is_stacked and is_even and dropout.suits_kernels and kernels.can_compute(x)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over D; weight and bias are [D], or [S, D] for `x` [S, B, …, D].

    Args:
        dim: D.
        feeds_product: whether all it returns is multiplied by weights, which under autocast round it: then a
            kernel does that by itself.
    """

    def __init__(self, dim: int, feeds_product: bool = True) -> None:
        super().__init__(dim)
        self.feeds_product = feeds_product

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return super().forward(x)
        if self.weight.shape[-1] <= kernels.MOST_COLUMNS and kernels.can_compute(x):
            from vitkd.models.kernels.pointwise import normed

            return normed(x, self.weight, self.bias, self.eps, self.feeds_product)
        normalised = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return torch.addcmul(per_student(self.bias, x), normalised, per_student(self.weight, x))


class PatchEmbedding(nn.Module):
    """Images [*S, B, C, H, W] to patch tokens [*S, B, T − 1, D], by one linear map of each patch's pixels."""

    def __init__(self, channels: int, patch_size: int, dim: int, patch_norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        pixels = channels * patch_size**2
        self.patch_norm = LayerNorm(pixels) if patch_norm else nn.Identity()
        self.projection = Linear(pixels, dim)
        self.projection_norm = LayerNorm(dim, feeds_product=False) if patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size).flatten(-2).mT
        return self.projection_norm(self.projection(self.patch_norm(patches)))


class AttentionOutput(NamedTuple):
    """What was asked of one block's attention."""

    scores: Tensor | None
    """[*S, B, H, T, T]; within windows [B, H, Q, K]"""
    qkv: QKV | None
    weights: Tensor | None
    """as `scores`: the very tensor that multiplied the values, in one graph with the tokens"""

    @classmethod
    def tapped(
        cls, taps: BlockTaps, qkv: QKV | None, scores: Tensor | None, weights: Tensor | None = None
    ) -> "AttentionOutput":
        """What `taps` asks for, out of all that was computed."""
        factors = qkv if taps.qkv else qkv.factors() if taps.factors and qkv else None
        return cls(scores if taps.scores else None, factors, weights if taps.weights else None)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) that can return the scores QKᵀ/√head_dim."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim)

    def inverse_temperature(self) -> Tensor | None:
        """What each head's scores are multiplied with [*S, H], if the attention has such a thing."""
        return None

    @staticmethod
    def allowed(tokens: int, device: torch.device | None = None) -> Tensor | None:
        """[T, T], False where a query may not look at a key; None where it may look at all."""
        return None

    def forward(
        self, x: Tensor, taps: BlockTaps = NO_BLOCK_TAPS, residual: Tensor | None = None
    ) -> tuple[Tensor, AttentionOutput]:
        """Map tokens [*S, B, T, D] to tokens, plus the residual if any, and to what is asked for by `taps`.

        On a GPU one kernel attends over few tokens. Elsewhere only a block whose scores or weights are asked
        for pays for its T×T matrix. The others use PyTorch's fused attention, which draws dropout's mask in
        another order. That has no masks of ours, so where dropout draws these (on CPUs and in stacks) every
        block makes its matrix.
        """
        projected = self._project(x)
        if self._has_kernel(projected, taps):
            values, scores = self._attend(projected, taps)
            qkv = self._split(projected) if taps.qkv or taps.factors else None
            return self._leave(values, residual), AttentionOutput.tapped(taps, qkv, scores)
        qkv = self._split(projected)
        assert qkv.v is not None
        if not (taps.scores or taps.weights or self.dropout.has_own_masks(qkv.q)):
            return self._merge(self._fused(qkv), residual), AttentionOutput.tapped(taps, qkv, None)
        scores = qkv.scores()
        weights = self._weights(scores, qkv.v.dtype)
        return self._merge(weights @ qkv.v, residual), AttentionOutput.tapped(taps, qkv, scores, weights)

    def attend_by(
        self, scores: Tensor, x: Tensor, taps: BlockTaps, residual: Tensor | None = None
    ) -> tuple[Tensor, AttentionOutput]:
        """As `forward`, by scores [*S, B, H, T, T] of elsewhere: neither queries nor keys are computed."""
        inner = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[..., 2 * inner :]
        projected = project(self.norm(x), self.qkv.weight[..., 2 * inner :, :], bias)
        values = projected.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2)
        weights = self.dropout(scores.softmax(-1)).to(values.dtype)
        return self._merge(weights @ values, residual), AttentionOutput.tapped(taps, None, scores, weights)

    def tapped(self, x: Tensor, taps: BlockTaps) -> AttentionOutput:
        """What is asked for by `taps` of tokens [*S, B, T, D], and nothing more: no output projection."""
        qkv = self._split(self._project(x, with_values=taps.qkv))
        return AttentionOutput.tapped(taps, qkv, qkv.scores() if taps.scores else None)

    def _project(self, x: Tensor, with_values: bool = True) -> Tensor:
        """Queries, keys and, if wanted, values side by side [*S, B, T, 3·H·head_dim]."""
        width = (3 if with_values else 2) * self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[..., :width]
        return project(self.norm(x), self.qkv.weight[..., :width, :], bias)

    def _split(self, projected: Tensor) -> QKV:
        """Queries at this attention's temperature, keys and, if they are there, values."""
        split = projected.unflatten(-1, (-1, self.num_heads, self.head_dim))
        q, *others = split.transpose(-4, -2).unbind(-3)
        inverse = self.inverse_temperature()
        if inverse is not None:
            # Rounded once, not twice: 1/τ in bf16 would be off by up to 0.4 % for every token alike.
            q = (q * inverse[..., None, :, None, None]).to(q.dtype)
        return QKV(q, *others)

    def _has_kernel(self, projected: Tensor, taps: BlockTaps) -> bool:
        """Whether the kernel computes what is wanted; it never writes the weights."""
        is_small = projected.shape[-2] <= kernels.MOST_TOKENS and self.head_dim <= kernels.MOST_HEAD_DIM
        is_known = self.dropout.suits_kernels and not taps.weights
        return is_small and is_known and kernels.can_compute(projected)

    def _attend(self, projected: Tensor, taps: BlockTaps) -> tuple[Tensor, Tensor | None]:
        """The heads' merged values [*S, B, T, H·head_dim] and, if asked for, the scores, by the kernel."""
        from vitkd.models.kernels.attention import attend

        return attend(
            projected,
            self.num_heads,
            self.inverse_temperature(),
            self.allowed(projected.shape[-2], projected.device),
            self.dropout.masks(),
            taps.scores,
        )

    def _fused(self, qkv: QKV) -> Tensor:
        """The attended values [*S, B, H, T, head_dim] by PyTorch's fused kernels."""
        assert qkv.v is not None
        # These take exactly one batch axis.
        q, k, v = (t.flatten(0, -4) for t in (qkv.q, qkv.k, qkv.v))
        allowed = self.allowed(q.shape[-2], q.device)
        return F.scaled_dot_product_attention(q, k, v, allowed, self.dropout.rate).view_as(qkv.v)

    def _weights(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """What multiplies the values [*S, B, H, T, T]: the masked softmax, in the scores' precision."""
        allowed = self.allowed(scores.shape[-1], scores.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return self.dropout(scores.softmax(-1)).to(dtype)

    def _merge(self, values: Tensor, residual: Tensor | None) -> Tensor:
        """All heads' values [*S, B, H, T, head_dim] as tokens [*S, B, T, D], plus the residual if any."""
        return self._leave(values.transpose(-3, -2).flatten(-2), residual)

    def _leave(self, merged: Tensor, residual: Tensor | None) -> Tensor:
        """All heads' values side by side [*S, B, T, H·head_dim] as tokens, plus the residual if any."""
        return added(residual, merged, self.out, self.dropout)


class MLP(nn.Module):
    """Two linear layers with a GELU between, each followed by dropout."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim)
        self.expand = Linear(dim, hidden)
        self.contract = Linear(hidden, dim)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = activated(self.norm(x), self.expand, self.dropout)
        return added(residual, hidden, self.contract, self.dropout)


class Block(nn.Module):
    """One encoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, mlp: MLP, drop_path: DropPath) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,
        taps: BlockTaps = NO_BLOCK_TAPS,
        given: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, AttentionOutput]:
        """Map tokens [*S, B, T, D] to tokens, and to what `taps` asks of the attention.

        Args:
            given: scores [*S, B, H, T, T] by which to attend, if any.
            kept: what to multiply both branches with [2, *S, B, 1, 1], if anything: see `DropPath.draw`.
        """
        # What is multiplied is added afterwards.
        residual = x if kept is None else None
        if given is None:
            y, tapped = self.attention(x, taps, residual)
        else:
            y, tapped = self.attention.attend_by(given, x, taps, residual)
        if kept is None:
            return self.mlp(y, residual=y), tapped
        of_attention, of_mlp = kept.to(x.dtype)
        x = x + of_attention * y
        return x + of_mlp * self.mlp(x), tapped
