"""The Vision Transformer (Dosovitskiy et al. 2020), whose forward returns its attention scores as data.

A model may have a second token, to learn from a teacher (DeiT: Touvron et al. 2021, arXiv 2012.12877). It
stands behind the class token and has a head of its own; the model's answer is the mean of both heads'
logits, as in the authors' code (the paper adds their probabilities).

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens (CLS, perhaps a distillation
token, grid²), H heads, D embed_dim, K classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError
from vitkd.models.base import Model, ModelConfig, ModelOutput, TokenLogits
from vitkd.models.dropout import Dropout
from vitkd.models.layers import MLP, Attention, Block, LayerNorm, Linear, PatchEmbedding, Scores
from vitkd.models.lsa import LocalityAttention
from vitkd.models.spt import ShiftedPatchTokenization

ATTENTIONS: dict[str, type[Attention]] = {"msa": Attention, "lsa": LocalityAttention}
TOKENIZERS = ("patch", "spt")


class Trace(NamedTuple):
    """Everything a forward pass computed on its way, in the autograd graph."""

    logits: Tensor
    """[*S, B, K]"""
    weights: tuple[Tensor, ...]
    """per block: [*S, B, H, T, T], the very tensors that multiplied the values"""
    tokens: tuple[Tensor, ...]
    """per block: [*S, B, T, D] after it"""


@dataclass(repr=False)
class ViTConfig(ModelConfig):
    """Everything that determines a ViT's shape."""

    LATER: ClassVar[Mapping[str, Any]] = {
        "tokenizer": "patch",
        "attention": "msa",
        "distillation_token": False,
    }

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
    """LayerNorm before and after the patch projection, as vit-pytorch has it; timm and torchvision do not.
    Shifted patches have their own norm, whatever this says."""
    tokenizer: str = "patch"
    """patch | spt: see `spt`"""
    attention: str = "msa"
    """msa, plain multi-head self-attention | lsa: see `lsa`"""
    distillation_token: bool = False
    """A second token, which a teacher may teach, with a head of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least_one("patch_size", "embed_dim", "depth", "num_heads", "head_dim", "mlp_dim")
        self.check_choice("tokenizer", TOKENIZERS)
        self.check_choice("attention", ATTENTIONS)
        for name in ("dropout", "emb_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if self.image_size % self.patch_size:
            divisors = [d for d in range(1, self.image_size + 1) if self.image_size % d == 0]
            raise ConfigError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}: "
                f"choose one of {', '.join(map(str, divisors))}"
            )
        if self.tokenizer == "spt" and self.patch_size == 1:
            raise ConfigError("tokenizer=spt: shifts by half a patch, and patch_size=1 has no half")

    def __str__(self) -> str:
        return (
            f"{self.depth}×{self.num_heads} blocks×heads, width {self.embed_dim}, MLP {self.mlp_dim}, "
            f"{self.grid}×{self.grid}{' shifted' if self.tokenizer == 'spt' else ''} patches + CLS"
            f"{' + distillation token' if self.distillation_token else ''}"
            f"{', locality attention' if self.attention == 'lsa' else ''}"
        )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return 1 + self.distillation_token

    @property
    def tokens(self) -> int:
        """The class token, perhaps the distillation token, and the patches: the attention's T."""
        return self.prefix + self.grid**2

    def allowed(self, device: torch.device | None = None) -> Tensor | None:
        """[T, T], False where attention is masked; None where it is not."""
        return ATTENTIONS[self.attention].allowed(self.tokens, device)

    def architecture(self) -> "ViT":
        return ViT(self)

    def build(self) -> "ViT":
        return self.architecture()


class ViT(Model):
    """A ViT in vit-pytorch's layout, initialised as vit-pytorch does."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.dropout = Dropout(c.emb_dropout)
        self.tokenizer = (
            ShiftedPatchTokenization(c.channels, c.patch_size, c.embed_dim)
            if c.tokenizer == "spt"
            else PatchEmbedding(c.channels, c.patch_size, c.embed_dim, c.patch_norm)
        )
        # N(0, 1), not timm's 0.02: on small images the narrow start costs tens of points after few epochs.
        self.cls_token = nn.Parameter(torch.randn(1, 1, c.embed_dim))
        self.positions = nn.Parameter(torch.randn(1, c.tokens, c.embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                ATTENTIONS[c.attention](c.embed_dim, c.num_heads, c.head_dim, c.dropout, c.qkv_bias),
                MLP(c.embed_dim, c.mlp_dim, c.dropout),
            )
            for _ in range(c.depth)
        )
        self.norm = LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.num_classes)
        self.register_parameter("distillation_token", None)
        if c.distillation_token:
            self.distillation_token = nn.Parameter(torch.randn(1, 1, c.embed_dim))
            self.distillation_head = Linear(c.embed_dim, c.num_classes)

    def forward(self, images: Tensor, record: Collection[int] = (), factors: bool = False) -> ModelOutput:
        """Classify images [B, C, H, W] (or [S, B, C, H, W]) and record the scores of `record`'s blocks.

        With `factors` only Q and K are recorded, and no block makes its T×T matrix, but for dropout (see
        `Attention.forward`).
        """
        x, scores = self._encode(images, len(self.blocks), record, factors)
        logits, of_tokens = self._classify(x)
        return ModelOutput(logits, scores, of_tokens)

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
        logits, _ = self._classify(x)
        return Trace(logits, tuple(weights), tuple(tokens))

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
        """Images [*S, B, C, H, W] to tokens [*S, B, T, D], first CLS, then the distillation token, if any."""
        if self.head.weight.ndim == 3 and images.ndim == 4:
            images = images.expand(len(self.head.weight), *images.shape)
        x = self.tokenizer(images)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        before = [token.expand(*x.shape[:-2], 1, -1) for token in prefix]
        x = torch.cat([*before, x], dim=-2) + self.positions
        return self.dropout(x)

    def _classify(self, x: Tensor) -> tuple[Tensor, TokenLogits | None]:
        """The logits [*S, B, K] of the last block's tokens, and each head's where there are two."""
        logits = self.head(self.norm(x[..., 0, :]))
        if self.distillation_token is None:
            return logits, None
        learned = self.distillation_head(self.norm(x[..., 1, :]))
        return (logits + learned) / 2, TokenLogits(logits, learned)

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
