"""The ViT's layers, in vit-pytorch's layout: pre-norm, no QKV bias, inner width heads·head_dim.

Every parameter may carry one leading axis S, "which student": the same code then computes S independent
students at once (`Linear` becomes one batched matmul, the rest broadcasts). Nothing else here knows of it.

Shapes: S stacked students (absent for one model), B batch, T tokens, H heads, D embed_dim.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models.dropout import Dropout


def at_least_float32(x: Tensor) -> Tensor:
    """Attention is compared in float32 even where bf16 computed it; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Factors(NamedTuple):
    """What the scores QKᵀ/√head_dim are made of: T·head_dim numbers a head each, where the scores are T·T."""

    q: Tensor
    """[*S, B, H, T, head_dim], at the attention's own temperature, if it has one, not yet over √head_dim"""
    k: Tensor
    """[*S, B, H, T, head_dim]"""

    def scores(self) -> Tensor:
        """QKᵀ/√head_dim [*S, B, H, T, T], in at least float32; what a model masks is computed, too."""
        # Rounded to bf16, scores of some tens differ by tenths; they are what is compared, so they are exact.
        with torch.autocast(self.q.device.type, enabled=False):
            return (at_least_float32(self.q) * self.q.shape[-1] ** -0.5) @ at_least_float32(self.k).mT

    def without_values(self) -> "Factors":
        """Copies, unless a backward pass keeps the tensor that Q and K share with V anyway."""
        return self if self.q.requires_grad else Factors(self.q.contiguous(), self.k.contiguous())


Scores = Tensor | Factors
"""Attention scores before mask and softmax, as a tensor [*S, B, H, T, T] or as their factors."""


def changed(scores: Scores, change: Callable[[Tensor], Tensor]) -> Scores:
    """Scores, or each of their factors, after `change`."""
    return change(scores) if isinstance(scores, Tensor) else Factors(*map(change, scores))


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


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over D; weight and bias are [D], or [S, D] for `x` [S, B, …, D]."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.ndim == 1:
            return super().forward(x)
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
        self.projection_norm = LayerNorm(dim) if patch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(images, self.patch_size).flatten(-2).mT
        return self.projection_norm(self.projection(self.patch_norm(patches)))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) that can return the scores QKᵀ/√head_dim."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * head_dim, dim)

    def scale(self, q: Tensor) -> Tensor:
        """Queries [*S, B, H, T, head_dim] at the attention's temperature, if it has one of its own."""
        return q

    @staticmethod
    def allowed(tokens: int, device: torch.device | None = None) -> Tensor | None:
        """[T, T], False where a query may not look at a key; None where it may look at all."""
        return None

    def forward(self, x: Tensor, record: bool, factors: bool = False) -> tuple[Tensor, Scores | None]:
        """Map tokens [*S, B, T, D] to tokens, and to scores [*S, B, H, T, T] if they are to be recorded.

        Only a recorded block pays for its T×T matrix; the others, and those of which just the factors are to
        be recorded, use PyTorch's fused attention, which draws dropout's mask in another order. That has no
        masks of ours, so where dropout draws these (on CPUs and in stacks) every block makes its matrix.
        """
        q, k, v = self._heads(self.qkv(self.norm(x)), 3)
        q = self.scale(q)
        recorded: Scores | None = None
        if record:
            recorded = Factors(q, k).without_values() if factors else Factors(q, k).scores()
        if isinstance(recorded, Tensor):
            values = self._attend(recorded, v)
        elif self.dropout.has_own_masks(q):
            values = self._attend(Factors(q, k).scores(), v)
        else:
            # The fused kernels take exactly one batch axis.
            flat_q, flat_k, flat_v = (t.flatten(0, -4) for t in (q, k, v))
            fused = F.scaled_dot_product_attention(
                flat_q, flat_k, flat_v, self.allowed(x.shape[-2], x.device), self.dropout.rate
            )
            values = fused.view_as(v)
        return self._merge(values), recorded

    def trace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [*S, B, T, D] to tokens, and to the weights [*S, B, H, T, T] that multiplied the values.

        Both are in one graph, so gradients by the weights can be had.
        """
        q, k, v = self._heads(self.qkv(self.norm(x)), 3)
        weights = self._weights(Factors(self.scale(q), k).scores(), v.dtype)
        return self._merge(weights @ v), weights

    def _attend(self, scores: Tensor, v: Tensor) -> Tensor:
        """The values [*S, B, H, T, head_dim] averaged as the scores [*S, B, H, T, T] say."""
        return self._weights(scores, v.dtype) @ v

    def _weights(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """What multiplies the values [*S, B, H, T, T]: the masked softmax, in the scores' precision."""
        allowed = self.allowed(scores.shape[-1], scores.device)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -math.inf)
        return self.dropout(scores.softmax(-1)).to(dtype)

    def _merge(self, values: Tensor) -> Tensor:
        """All heads' values [*S, B, H, T, head_dim] as tokens [*S, B, T, D]."""
        return self.dropout(self.out(values.transpose(-3, -2).flatten(-2)))

    def factors(self, x: Tensor) -> Factors:
        """The scores' factors alone: no values, no output projection."""
        inner = self.num_heads * self.head_dim
        weight = self.qkv.weight[..., : 2 * inner, :]
        bias = None if self.qkv.bias is None else self.qkv.bias[..., : 2 * inner]
        q, k = self._heads(project(self.norm(x), weight, bias), 2)
        return Factors(self.scale(q), k)

    def _heads(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split [*S, B, T, count·H·head_dim] into `count` tensors [*S, B, H, T, head_dim]."""
        split = projected.unflatten(-1, (count, self.num_heads, self.head_dim))
        return split.transpose(-4, -2).unbind(-3)


class MLP(nn.Module):
    """Two linear layers with a GELU between, each followed by dropout."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.norm = LayerNorm(dim)
        self.expand = Linear(dim, hidden)
        self.contract = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(self.norm(x))))))


class Block(nn.Module):
    """One encoder block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Attention, mlp: MLP) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp

    def forward(self, x: Tensor, record: bool = False, factors: bool = False) -> tuple[Tensor, Scores | None]:
        """Map tokens [*S, B, T, D] to tokens and, if `record`, the block's scores or just their `factors`."""
        attended, scores = self.attention(x, record, factors)
        return self._add(x, attended), scores

    def trace(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens [*S, B, T, D] to tokens, and to the attention weights [*S, B, H, T, T] within."""
        attended, weights = self.attention.trace(x)
        return self._add(x, attended), weights

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.mlp(x)
