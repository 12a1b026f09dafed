"""The Vision Transformer (Dosovitskiy et al. 2020), whose forward returns its attention scores as data.

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens (CLS + grid²), H heads,
D embed_dim, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError
from vitkd.models.dropout import Dropout
from vitkd.models.layers import MLP, Attention, Block, LayerNorm, Linear, PatchEmbedding, Scores


class ViTOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """[*S, B, K]"""
    scores: Mapping[int, Scores]
    """block → pre-softmax scores [*S, B, H, T, T], or their factors, for exactly the blocks asked for"""


class Trace(NamedTuple):
    """Everything a forward pass computed on its way, in the autograd graph."""

    logits: Tensor
    """[*S, B, K]"""
    weights: tuple[Tensor, ...]
    """per block: [*S, B, H, T, T], the very tensors that multiplied the values"""
    tokens: tuple[Tensor, ...]
    """per block: [*S, B, T, D] after it"""


@dataclass
class ModelConfig(ABC):
    """What every model's configuration says, whatever the architecture."""

    image_size: int
    channels: int
    num_classes: int

    @abstractmethod
    def build(self) -> nn.Module:
        """A model of this configuration, freshly initialised from PyTorch's global generator."""


@dataclass
class ViTConfig(ModelConfig):
    """Everything that determines a ViT's shape."""

    patch_size: int
    embed_dim: int = 64
    depth: int = 5
    num_heads: int = 4
    head_dim: int = 64
    """Independent of embed_dim: the attention's inner width is num_heads · head_dim."""
    mlp_dim: int = 512
    dropout: float = 0.0
    """After attention weights, projections and the MLP's layers."""
    emb_dropout: float = 0.0
    """After adding the position embedding."""
    qkv_bias: bool = False
    patch_norm: bool = True
    """LayerNorm before and after the patch projection, as vit-pytorch has it; timm and torchvision do not."""

    def __post_init__(self) -> None:
        sizes = "image_size channels num_classes patch_size embed_dim depth num_heads head_dim mlp_dim"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("dropout", "emb_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if self.image_size % self.patch_size:
            divisors = [d for d in range(1, self.image_size + 1) if self.image_size % d == 0]
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}: "
                f"choose one of {', '.join(map(str, divisors))}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """The class token and the patches: the attention's T."""
        return 1 + self.grid**2

    def build(self) -> "ViT":
        return ViT(self)


class ViT(nn.Module):
    """A ViT in vit-pytorch's layout, initialised as vit-pytorch does."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.dropout = Dropout(c.emb_dropout)
        self.tokenizer = PatchEmbedding(c.channels, c.patch_size, c.embed_dim, c.patch_norm)
        # N(0, 1), not timm's 0.02: on small images the narrow start costs tens of points after few epochs.
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.embed_dim))
        self.positions = nn.Parameter(torch.randn(1, c.tokens, c.embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                Attention(c.embed_dim, c.num_heads, c.head_dim, c.dropout, c.qkv_bias),
                MLP(c.embed_dim, c.mlp_dim, c.dropout),
            )
            for _ in range(c.depth)
        )
        self.norm = LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.num_classes)

    def forward(self, images: Tensor, record: Collection[int] = (), factors: bool = False) -> ViTOutput:
        """Classify images [B, C, H, W] (or [S, B, C, H, W]) and record the scores of `record`'s blocks.

        With `factors` only Q and K are recorded, and no block makes its T×T matrix, but for dropout (see
        `Attention.forward`).
        """
        x, scores = self._encode(images, len(self.blocks), record, factors)
        return ViTOutput(self._classify(x), scores)

    def trace(self, images: Tensor) -> Trace:
        """Classify images [*S, B, C, H, W] and keep every block's attention weights and tokens.

        For explanations: nothing is fused, and every block's T×T matrix stays in memory.
        """
        x = self.embed(images)
        weights, tokens = [], []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, of_block = block.trace(x)
            weights.append(of_block)
            tokens.append(x)
        return Trace(self._classify(x), tuple(weights), tuple(tokens))

    @overload
    def scores(self, images: Tensor, blocks: Collection[int]) -> dict[int, Tensor]: ...
    @overload
    def scores(self, images: Tensor, blocks: Collection[int], factors: bool) -> Mapping[int, Scores]: ...
    def scores(self, images: Tensor, blocks: Collection[int], factors: bool = False) -> Mapping[int, Scores]:
        """The pre-softmax scores [*S, B, H, T, T] of `blocks`, or just their `factors`, at the least cost.

        Stops after QKᵀ of the last block asked for: no values, MLP or head there and nothing above it.
        """
        last = max(blocks)
        x, scores = self._encode(images, last, blocks, factors)
        block = self.blocks[last]
        assert isinstance(block, Block)
        of_last = block.attention.factors(x)
        return scores | {last: of_last if factors else of_last.scores()}

    def embed(self, images: Tensor) -> Tensor:
        """Images [*S, B, C, H, W] to tokens [*S, B, T, D], CLS first, positions added."""
        if self.head.weight.ndim == 3 and images.ndim == 4:
            images = images.expand(len(self.head.weight), *images.shape)
        x = self.tokenizer(images)
        cls = self.cls_token.expand(*x.shape[:-2], 1, -1)
        x = torch.cat([cls, x], dim=-2) + self.positions
        return self.dropout(x)

    def _classify(self, x: Tensor) -> Tensor:
        """The logits [*S, B, K] of the last block's tokens."""
        return self.head(self.norm(x[..., 0, :]))

    def _encode(
        self, images: Tensor, depth: int, record: Collection[int], factors: bool
    ) -> tuple[Tensor, dict[int, Scores]]:
        """Tokens [*S, B, T, D] after the first `depth` blocks, and the scores of those to record."""
        assert all(0 <= block < len(self.blocks) for block in record), f"no such block among {list(record)}"
        x = self.embed(images)
        recorded: dict[int, Scores] = {}
        for i, block in enumerate(self.blocks[:depth]):
            x, scores = block(x, i in record, factors)
            if scores is not None:
                recorded[i] = scores
        return x, recorded


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())
