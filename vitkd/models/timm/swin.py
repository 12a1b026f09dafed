"""Swin block by block (Liu et al. 2021, arXiv 2103.14030; V2: Liu et al. 2022, arXiv 2111.09883).

The blocks of all stages are counted in one sequence. A block's tokens attend within windows, after a shift by
half a window in every second block. The shift makes neighbours of opposite borders of the image, which the
layout's mask keeps apart.

Shapes: B images, h × w patches, T = h·w tokens, N tokens of a window, D embed_dim of the stage, K classes.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch
from timm.models.swin_transformer import window_partition
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.models.output import AttentionLayout, Output
from vitkd.models.timm.encoders import Encoder, State


class SwinEncoder(Encoder):
    """Swin, which normalises what goes into attention."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        starts = accumulate((len(stage.blocks) for stage in network.layers), initial=0)
        self.mergings = {
            start: stage.downsample for start, stage in zip(starts, network.layers, strict=False)
        }
        """the first block of each stage → what makes its tokens out of the last stage's"""
        for block in self.blocks:
            block.attn.windows = prod(block.input_resolution) // block.window_area

    @staticmethod
    def blocks_of(network: Any) -> Sequence[Any]:
        return [block for stage in network.layers for block in stage.blocks]

    def layouts(self) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention; ConfigError unless windows divide every stage's patches."""
        check_stages(self.network.layers)
        return tuple(map(layout_of, self.blocks))

    def embed(self, images: Tensor) -> State:
        return State(self.network.patch_embed(images).flatten(1, 2))

    def block(self, index: int, state: State) -> State:
        return State(self.blocks[index](self._enter(index, state)).flatten(1, 2))

    def before_attention(self, index: int, state: State) -> tuple[Tensor, None]:
        """The windows' tokens [B · windows, N, D] that a block's attention is given."""
        block = self.blocks[index]
        x = self.normalised(block, self._enter(index, state))
        shifted = torch.roll(x, [-shift for shift in block.shift_size], dims=(1, 2))
        return window_partition(shifted, block.window_size).flatten(1, 2), None

    @staticmethod
    def normalised(block: Any, x: Tensor) -> Tensor:
        """What a block's attention is given, before it is cut into windows."""
        normalised: Tensor = block.norm1(x)
        return normalised

    def read(self, state: State) -> tuple[Tensor, Callable[[], Output]]:
        tokens = self.network.norm(state.tokens.unflatten(1, self.blocks[-1].input_resolution))
        pre_logits = self.network.forward_head(tokens, pre_logits=True)
        return pre_logits, lambda: Output(self.network.head.fc(pre_logits))

    def _enter(self, index: int, state: State) -> Tensor:
        """A block's input [B, h, w, D]; the first block of a stage has merged patches."""
        grid = self.blocks[index - 1].input_resolution if index else self.network.patch_embed.grid_size
        x = state.tokens.unflatten(1, tuple(grid))
        return self.mergings[index](x) if index in self.mergings else x


class SwinV2Encoder(SwinEncoder):
    """Swin V2, which normalises what comes out of attention."""

    @staticmethod
    def normalised(block: Any, x: Tensor) -> Tensor:
        return x


def layout_of(block: Any) -> AttentionLayout:
    """The layout of one block's attention: rows of windows, of whose tokens the mean is classified."""
    rows, columns = block.input_resolution
    # From timm's rule, not its buffer, which has no values before the model has memory.
    mask = block.get_attn_mask(device=torch.device("cpu"), dtype=torch.float32)
    return AttentionLayout(
        block.attn.num_heads,
        block.attn.head_dim,
        (rows, columns),
        prefix=0,
        readers=tuple(range(rows * columns)),
        mask=None if mask is None else (mask == 0).flatten(0, 1),
        window=tuple(block.window_size),
        shift=tuple(block.shift_size),
        has_class_token=False,
        has_bias=True,
    )


def check_stages(stages: Sequence[Any]) -> None:
    """ConfigError unless every stage has blocks, and windows that divide its patches."""
    for number, stage in enumerate(stages):
        if not len(stage.blocks):
            raise ConfigError(f"depths: stage {number} has no blocks; give it one at least")
        block = stage.blocks[0]
        for patches, window in zip(block.input_resolution, block.window_size, strict=True):
            if patches % window:
                fitting = ", ".join(map(str, windows_for(stages)))
                raise ConfigError(
                    f"window_size={window}: does not divide the {patches} patches a side of stage {number}; "
                    f"choose one of {fitting}, or another img_size"
                )


def windows_for(stages: Sequence[Any]) -> list[int]:
    """The window sizes that divide the patches of every stage with more than one window."""
    sides = {side for stage in stages for side in stage.output_resolution}
    return [
        size for size in range(1, max(sides) + 1) if all(side <= size or side % size == 0 for side in sides)
    ]
