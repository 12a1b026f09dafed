"""timm's attention modules, which return their scores where a tap asks for them.

A tapped module is of a subclass of its class in timm: its parameters and their names are the same, and where
nothing is asked of it timm's own forward runs, with fused attention.

Shapes: B images, T tokens, H heads, D embed_dim; of attention within windows W windows of N tokens each.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.tnt import Attention as TNTAttention
from torch import Tensor, nn

from vitkd.models.layers import AttentionOutput
from vitkd.models.output import NO_BLOCK_TAPS, QKV, BlockTaps, at_least_float32


class Tapped(nn.Module):
    """What a subclass of a softmax attention adds to it: `taps`, and `output`, which they ask for."""

    num_heads: int
    head_dim: int
    attn_drop: Any
    taps: BlockTaps = NO_BLOCK_TAPS
    """what is asked of the forward pass under way"""
    output: AttentionOutput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map normalised tokens [B, T, D] to what a block adds to its own."""
        if self.taps == NO_BLOCK_TAPS:
            return super().forward(x, *args, **kwargs)
        assert kwargs.get("attn_mask") is None, "no encoder here masks attention"
        qkv = project(self, x, kwargs.get("rope"))
        assert qkv.v is not None
        if not (self.taps.scores or self.taps.weights):
            self.output = AttentionOutput.tapped(self.taps, qkv, None)
            rate = self.attn_drop.p if self.training else 0.0
            return merge(self, F.scaled_dot_product_attention(qkv.q, qkv.k, qkv.v, dropout_p=rate), x)
        scores = qkv.scores()
        weights = self.attn_drop(scores.softmax(-1)).to(qkv.v.dtype)
        self.output = AttentionOutput.tapped(self.taps, qkv, scores, weights)
        return merge(self, weights @ qkv.v, x)

    def tapped(self, x: Tensor, taps: BlockTaps, rope: Tensor | None = None) -> AttentionOutput:
        """What `taps` asks for of normalised tokens [B, T, D], and nothing more: no output projection."""
        qkv = project(self, x, rope)
        return AttentionOutput.tapped(taps, qkv, qkv.scores() if taps.scores else None)


def project(attention: Any, x: Tensor, rope: Tensor | None) -> QKV:
    """Queries, keys and values [B, H, T, head_dim], after the norms of queries and keys and the rotation."""
    if attention.qkv is None:
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        split = [each(x).unflatten(-1, (-1, attention.head_dim)) for each in projections]
    else:
        rows = F.linear(x, attention.qkv.weight, bias_of(attention))
        split = [*rows.unflatten(-1, (3, attention.num_heads, attention.head_dim)).unbind(-3)]
    q, k, v = (rows.transpose(1, 2) for rows in split)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        q, k = (rotated(each, rope, attention).type_as(v) for each in (q, k))
    if (groups := attention.num_heads // k.shape[1]) > 1:
        k, v = (each.repeat_interleave(groups, dim=1) for each in (k, v))
    return QKV(q, k, v)


def bias_of(attention: Any) -> Tensor | None:
    """[3 · H · head_dim]; EVA keeps the keys' at 0, apart from the others."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def rotated(x: Tensor, rope: Tensor, attention: Any) -> Tensor:
    """Queries or keys [B, H, T, head_dim] after the rotary embedding (Su et al. 2021) of the patches."""
    prefix, patches = x.tensor_split([attention.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attention.rotate_half)], dim=2)


def merge(attention: Any, values: Tensor, x: Tensor) -> Tensor:
    """All heads' values [B, H, T, head_dim] as tokens [B, T, D], gated by the input `x` where that is so."""
    tokens = attention.norm(values.transpose(1, 2).flatten(2))
    if (gate := getattr(attention, "gate", None)) is not None:
        tokens = tokens * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(tokens))


class TappedAttention(Tapped, Attention):
    """Of a VisionTransformer."""


class TappedAttentionRope(Tapped, AttentionRope):
    """With rotary embeddings, and perhaps fewer keys than queries."""


class TappedEvaAttention(Tapped, EvaAttention):
    """Of EVA, whose keys have no bias."""


class TappedWindows(Tapped):
    """Attention within windows: a window's tokens [B · W, N, D] come and go as if it were an image.

    What is returned has all rows of an image together, those of one window after those of another: scores
    [B, H, W · N, N], which hold the relative position bias, and queries, keys and values [B, H, W · N,
    head_dim].
    """

    windows: int = 1
    proj: nn.Linear
    proj_drop: nn.Dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map windows [B · W, N, D] to windows; `mask` [W, N, N] is added to an image's scores."""
        if self.taps == NO_BLOCK_TAPS:
            return super().forward(x) if mask is None else super().forward(x, mask)
        qkv = self.project(x)
        assert qkv.v is not None
        scores = self.scores(qkv)
        masked = scores if mask is None else scores + mask.repeat(len(x) // self.windows, 1, 1).unsqueeze(1)
        weights = self.attn_drop(masked.softmax(-1)).to(qkv.v.dtype)
        self.output = self.in_rows(self.taps, qkv, scores, weights)
        if self.output.weights is not None:
            # The very tensor that is returned, so that there is a gradient by it.
            weights = self.in_windows(self.output.weights)
        return self.proj_drop(self.proj((weights @ qkv.v).transpose(1, 2).flatten(2)))

    def tapped(self, x: Tensor, taps: BlockTaps, rope: Tensor | None = None) -> AttentionOutput:
        """What `taps` asks for of windows [B · W, N, D], and nothing more: no output projection."""
        qkv = self.project(x)
        return self.in_rows(taps, qkv, self.scores(qkv) if taps.scores else None)

    def project(self, x: Tensor) -> QKV:
        """Queries, keys and values [B · W, H, N, head_dim], so that the scores are QKᵀ/√head_dim + bias."""
        raise NotImplementedError

    def scores(self, qkv: QKV) -> Tensor:
        """[B · W, H, N, N] before the mask."""
        bias = self.position_bias()
        return qkv.scores() if bias is None else qkv.scores() + at_least_float32(bias)

    def position_bias(self) -> Tensor | None:
        """What the positions of query and key, relative to each other, add to the scores [H, N, N]."""
        return None

    def in_rows(
        self, taps: BlockTaps, qkv: QKV, scores: Tensor | None, weights: Tensor | None = None
    ) -> AttentionOutput:
        """What `taps` asks for, the windows of an image one after another."""
        if self.windows == 1:
            return AttentionOutput.tapped(taps, qkv, scores, weights)

        def rows(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, self.windows)).transpose(1, 2).flatten(2, 3)

        in_rows = (None if each is None else rows(each) for each in (scores, weights))
        return AttentionOutput.tapped(taps, qkv.map(rows), *in_rows)

    def in_windows(self, rows: Tensor) -> Tensor:
        """All rows of an image [B, H, W · N, …] by their windows [B · W, H, N, …]."""
        return rows.unflatten(2, (self.windows, -1)).transpose(1, 2).flatten(0, 1)


class TappedSwin(TappedWindows):
    """What Swin and Swin V2 have in common."""

    qkv: nn.Linear

    @property
    def head_dim(self) -> int:  # type: ignore[override]
        """The size of each head."""
        return self.proj.in_features // self.num_heads

    def project(self, x: Tensor) -> QKV:
        rows = F.linear(x, self.qkv.weight, bias_of(self)).unflatten(-1, (3, self.num_heads, self.head_dim))
        return QKV(*(each.transpose(1, 2) for each in rows.unbind(-3)))


class TappedWindowAttention(TappedSwin, WindowAttention):
    """Of Swin."""

    def position_bias(self) -> Tensor:
        bias: Tensor = self._get_rel_pos_bias()
        return bias.squeeze(0)


class TappedWindowAttentionV2(TappedSwin, WindowAttentionV2):
    """Of Swin V2, whose scores are cosines at a learned temperature."""

    def project(self, x: Tensor) -> QKV:
        q, k, v = super().project(x)
        temperature = self.logit_scale.clamp(max=math.log(100)).exp()
        return QKV(
            F.normalize(q, dim=-1) * (temperature * math.sqrt(self.head_dim)), F.normalize(k, dim=-1), v
        )

    def position_bias(self) -> Tensor:
        of_offsets = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * of_offsets[self.relative_position_index].permute(2, 0, 1).sigmoid()


class TappedTNTAttention(TappedWindows, TNTAttention):
    """Of a TNT: among its patches, as one window, or among the words of each patch."""

    qk: nn.Linear
    v: nn.Linear

    def project(self, x: Tensor) -> QKV:
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        v = self.v(x).unflatten(-1, (self.num_heads, -1))
        return QKV(*(each.transpose(1, 2) for each in (q, k, v)))


CLASSES = (
    *(TappedAttention, TappedAttentionRope, TappedEvaAttention),
    *(TappedWindowAttention, TappedWindowAttentionV2, TappedTNTAttention),
)
TAPPED: dict[type, type[Tapped]] = {tapped.__bases__[1]: tapped for tapped in CLASSES}


def make_tapped(attention: nn.Module) -> Tapped:
    """The very module, from now on of the subclass that can be tapped."""
    attention.__class__ = TAPPED[type(attention)]
    return attention  # type: ignore[return-value]
