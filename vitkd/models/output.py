"""What can be asked of a model, and what it returns.

Shapes: S stacked students (absent for one model), B batch, H heads, Q queries, K keys, T tokens, D embed_dim,
C classes. A plain ViT has Q = K = T.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

NOTHING: Mapping[str, Tensor] = MappingProxyType({})

OUTER, INNER = PARTS = ("outer", "inner")
"""the attentions of a block: among patches, which every model has that has maps; and within each patch"""


class BlockTaps(NamedTuple):
    """What is asked of one block's attention."""

    scores: bool = False
    factors: bool = False
    qkv: bool = False
    weights: bool = False
    """what multiplies the values; an explanation wants them, no `Taps` does"""


class Taps(NamedTuple):
    """What is asked of a model besides, or instead of, its logits; it computes no more than that takes."""

    scores: tuple[int, ...] = ()
    """the blocks whose scores before mask and softmax are wanted"""
    factors: tuple[int, ...] = ()
    """the blocks of which queries and keys, the scores' factors, are wanted"""
    qkv: tuple[int, ...] = ()
    """the blocks of which queries, keys and values are wanted"""
    features: tuple[str, ...] = ()
    """the activations wanted, by name: a ViT's "embed", "block0", …; a ResNet's "stage1", …; "pre_logits" """
    logits: bool = True
    part: str = OUTER
    """which attention of these blocks is meant"""

    def of_block(self, block: int) -> BlockTaps:
        """What is asked of the attention in `block`."""
        return BlockTaps(block in self.scores, block in self.factors, block in self.qkv)

    @property
    def blocks(self) -> set[int]:
        """All blocks whose attention is asked for anything."""
        return {*self.scores, *self.factors, *self.qkv}

    @property
    def needs_all_blocks(self) -> bool:
        """Whether something is wanted that takes the last block: logits, or what they are made of."""
        return self.logits or "pre_logits" in self.features

    def last_whole_block(self, depth: int) -> int:
        """The last of `depth` blocks that is computed as a whole, −1 for none; of the next at most QKᵀ.

        For a model whose features are "embed", "block0", … and "pre_logits".
        """
        if self.needs_all_blocks:
            return depth - 1
        outputs = [int(name.removeprefix("block")) for name in self.features if name != "embed"]
        return max(*outputs, max(self.blocks, default=0) - 1, -1)

    def assert_exist(
        self, num_blocks: int, features: Collection[str], parts: Collection[str] = (OUTER,)
    ) -> None:
        """AssertionError unless a model of `num_blocks` attention blocks and these features has all of it."""
        assert self.part in parts, f"no {self.part} attention: this model has {', '.join(parts)}"
        blocks = sorted(block for block in self.blocks if not 0 <= block < num_blocks)
        assert not blocks, f"no attention block {blocks}: this model has {num_blocks}"
        unknown = [name for name in self.features if name not in features]
        assert not unknown, f"no feature {unknown}: this model has {', '.join(features)}"

    @classmethod
    def union(cls, all_taps: Iterable["Taps"]) -> "Taps":
        """Everything that any of `all_taps` asks for; those of attention mean the same part of it."""
        taps = [*all_taps]
        parts = {each.part for each in taps if each.blocks} or {OUTER}
        assert len(parts) == 1, f"attention of several parts: {', '.join(sorted(parts))}"
        return cls(
            tuple(sorted({block for each in taps for block in each.scores})),
            tuple(sorted({block for each in taps for block in each.factors})),
            tuple(sorted({block for each in taps for block in each.qkv})),
            tuple(sorted({name for each in taps for name in each.features})),
            any(each.logits for each in taps),
            *parts,
        )


LOGITS = Taps()
NO_BLOCK_TAPS = BlockTaps()


def shown(sides: tuple[int, int]) -> str:
    """A grid as one writes it."""
    return f"{sides[0]}×{sides[1]}"


def compared_in(x: Tensor) -> torch.dtype:
    """Attention is compared in float32 even where bf16 computed it; float64 stays."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in the precision in which it is compared."""
    return x.to(compared_in(x))


def select(x: Tensor, indices: Sequence[int], dim: int) -> Tensor:
    """The slices of `x` at `indices` of an axis; a run of neighbours is a view, without copy or scatter."""
    first, count = indices[0], len(indices)
    if [*indices] == [*range(x.shape[dim])]:
        return x  # even of such a view the gradient would be a copy among zeros
    if [*indices] == [*range(first, first + count)]:
        return x.narrow(dim, first, count)
    # Not an index tensor: its gradient is a scatter, and on a GPU it would be copied over at every step.
    return torch.cat([x.narrow(dim, index, 1) for index in indices], dim=dim)


class QKV(NamedTuple):
    """An attention's queries, keys and, if they were asked for, values, [*S, B, H, T, head_dim] each."""

    q: Tensor
    """at the attention's own temperature, if it has one, not yet divided by √head_dim"""
    k: Tensor
    v: Tensor | None = None

    def scores(self) -> Tensor:
        """QKᵀ/√head_dim [*S, B, H, Q, K], in at least float32; masked entries are computed too."""
        # Rounded to bf16, scores of some tens differ by tenths; they are what is compared, so they are exact.
        with torch.autocast(self.q.device.type, enabled=False):
            return (at_least_float32(self.q) * self.q.shape[-1] ** -0.5) @ at_least_float32(self.k).mT

    def factors(self) -> Self:
        """Without the values: as copies, unless a backward pass keeps the tensor that all three share."""
        if self.q.requires_grad:
            return self._replace(v=None)
        return self._replace(q=self.q.contiguous(), k=self.k.contiguous(), v=None)

    def map(self, change: Callable[[Tensor], Tensor]) -> "QKV":
        """All of them after `change`."""
        return QKV(change(self.q), change(self.k), None if self.v is None else change(self.v))


class Output(NamedTuple):
    """What a forward pass returns: exactly what the taps asked for."""

    logits: Tensor | None = None
    """[*S, B, C]"""
    heads: Mapping[str, Tensor] = NOTHING
    """the logits of each classification head, by the token it reads, where there are several; else nothing"""
    scores: Mapping[int, Tensor] = MappingProxyType({})
    """block → scores before mask and softmax [*S, B, H, Q, K]"""
    qkv: Mapping[int, QKV] = MappingProxyType({})
    """block → queries, keys and perhaps values"""
    features: Mapping[str, Tensor] = NOTHING
    """name → tokens [*S, B, T, D], feature maps [B, channels, height, width] or vectors [*S, B, D]"""

    @property
    def answer(self) -> Tensor:
        """The logits, known to be there."""
        assert self.logits is not None, "the model was not asked for logits"
        return self.logits

    @property
    def predicted(self) -> Tensor:
        """The most probable classes [*S, B]."""
        return self.answer.argmax(-1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Output":
        """Every tensor after `change`."""
        return Output(
            None if self.logits is None else change(self.logits),
            {name: change(logits) for name, logits in self.heads.items()},
            {block: change(scores) for block, scores in self.scores.items()},
            {block: qkv.map(change) for block, qkv in self.qkv.items()},
            {name: change(values) for name, values in self.features.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of `map`."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found


class AttentionLayout(NamedTuple):
    """What the rows and columns of one block's attention stand for."""

    heads: int
    head_dim: int
    grid: tuple[int, int]
    """patches from top to bottom and from left to right"""
    prefix: int
    """tokens before the patches, the class token first, if there is one"""
    readers: tuple[int, ...]
    """the tokens from which the model classifies"""
    mask: Tensor | None = None
    """[Q, K], False where a query may not look at a key; None where all is allowed"""
    window: tuple[int, int] | None = None
    """patches from top to bottom and from left to right that attend among themselves; None: all tokens do"""
    shift: tuple[int, int] = (0, 0)
    """patches by which the image is rolled up and to the left before it is cut into windows"""
    has_class_token: bool = True
    """whether a class token is the first of the prefix"""
    has_bias: bool = False
    """whether the scores are more than QKᵀ/√head_dim, to which for example relative positions add"""
    names: tuple[str, str] = ("windows", "patches")
    """what windows are called, and what the grid is made of"""

    @property
    def windows(self) -> int:
        """How many windows there are; the rows of one stand after those of another."""
        return 1 if self.window is None else prod(self.grid) // prod(self.window)

    @property
    def tokens(self) -> int:
        """All tokens: the prefix and the patches."""
        return self.prefix + prod(self.grid)
