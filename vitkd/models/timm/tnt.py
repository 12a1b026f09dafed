"""TNT block by block (Transformer in Transformer: Han et al. 2021, arXiv 2103.00112).

Every patch is cut into words. In a block the words of a patch attend among themselves (inner attention), are
added to their patch as one vector, and then the patches attend (outer attention). For the inner one a patch
is what a window is for Swin's.

Shapes: B images, C channels, H × W pixels, P patches, T = 1 + P tokens, N words of a patch, D embed_dim, E
inner_dim.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.models.output import INNER, OUTER, AttentionLayout
from vitkd.models.timm.encoders import Encoder, State


class TNTBlocks(Encoder):
    """What is computed whichever attention is asked for."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        for block in range(len(self)):
            # In place, as timm has it, dropout overwrites what the softmax needs for its gradient.
            self.attention(block).attn_drop.inplace = False

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.network.pixel_embed.grid_size
        return rows, columns

    def embed(self, images: Tensor) -> State:
        network = self.network
        words = network.pixel_embed(images, network.pixel_pos)
        as_vectors = words.reshape(len(images), network.num_patches, -1)
        patches = network.norm2_proj(network.proj(network.norm1_proj(as_vectors)))
        tokens = torch.cat([network.cls_token.expand(len(images), -1, -1), patches], dim=1)
        return State(network.pos_drop(tokens + network.patch_pos), words=words)

    def block(self, index: int, state: State) -> State:
        words, tokens = self.blocks[index](state.words, state.tokens)
        return State(tokens, words=words)


class TNTEncoder(TNTBlocks):
    """TNT, asked for the attention among patches."""

    ATTENTION: ClassVar[str] = "attn_out"

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.parts: Mapping[str, Encoder] = {OUTER: self, INNER: InnerTNTEncoder(network)}

    def layouts(self) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention; ConfigError where a size does not divide what it has to."""
        check_sizes(self.network)
        return super().layouts()

    def before_attention(self, index: int, state: State) -> tuple[Tensor, None]:
        block, words = self.blocks[index], state.words
        words = words + block.drop_path(block.attn_in(block.norm_in(words)))
        words = words + block.drop_path(block.mlp_in(block.norm_mlp_in(words)))
        class_token, patches = state.tokens.tensor_split([1], dim=1)
        patches = patches + as_patches(block, words, len(patches))
        return block.norm_out(torch.cat([class_token, patches], dim=1)), None


class InnerTNTEncoder(TNTBlocks):
    """TNT, asked for the attention among the words of each patch."""

    ATTENTION: ClassVar[str] = "attn_in"

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        for block in self.blocks:
            block.attn_in.windows = network.num_patches

    def layouts(self) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention; no word is classified by itself."""
        (rows, columns), (height, width) = self.grid, self.network.pixel_embed.new_patch_size
        first = self.attention(0)
        layout = AttentionLayout(
            first.num_heads,
            first.head_dim,
            (rows * height, columns * width),
            prefix=0,
            readers=(),
            window=(height, width),
            has_class_token=False,
            names=("patches", "words"),
        )
        return (layout,) * len(self)

    def before_attention(self, index: int, state: State) -> tuple[Tensor, None]:
        return self.blocks[index].norm_in(state.words), None


def as_patches(block: Any, words: Tensor, images: int) -> Tensor:
    """What the words [B · P, N, E] of a block add to their patches [B, P, D]."""
    if block.legacy:
        words = block.norm1_proj(words)
    vectors = words.reshape(images, -1, block.proj.in_features)
    patches: Tensor = (
        block.proj(vectors) if block.legacy else block.norm2_proj(block.proj(block.norm1_proj(vectors)))
    )
    return patches


def check_sizes(network: Any) -> None:
    """ConfigError unless there are blocks, heads divide the widths, and whole words make up a patch."""
    if not len(network.blocks):
        raise ConfigError("depth=0: must be at least 1")
    outer, inner = network.blocks[0].attn_out, network.blocks[0].attn_in
    check_divides("num_heads_outer", outer.num_heads, "embed_dim", outer.hidden_dim)
    check_divides("num_heads_inner", inner.num_heads, "inner_dim", inner.hidden_dim)
    embed = network.pixel_embed
    for side, stride in zip(embed.patch_size, embed.proj.stride, strict=True):
        check_divides("first_stride", stride, "patch_size", side)


def check_divides(name: str, divisor: int, whole: str, size: int) -> None:
    """ConfigError with the divisors there are, unless the setting `name` divides the setting `whole`."""
    if size % divisor:
        *others, last = (number for number in range(1, size + 1) if size % number == 0)
        fitting = f"{', '.join(map(str, others))} or {last}"
        raise ConfigError(f"{name}={divisor}: does not divide {whole}={size}; choose {fitting}")
