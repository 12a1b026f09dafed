"""The Vision Transformer (Dosovitskiy et al. 2020), whose forward returns its attention scores as data.

A model may have a second token, to learn from a teacher (DeiT: Touvron et al. 2021, arXiv 2012.12877). It
stands behind the class token and has a head of its own; the model's logits are the mean of both heads', as
in the authors' code (the paper adds their probabilities).

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens (CLS, perhaps a distillation
token, grid²), H heads, D embed_dim, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check, check_at_least, check_choice
from vitkd.models.base import Model, Trace
from vitkd.models.dropout import Dropout, DropPath
from vitkd.models.initialisation import MIMETIC, InitialisedConfig
from vitkd.models.layers import MLP, Attention, Block, LayerNorm, Linear, PatchEmbedding
from vitkd.models.mimetic import make_mimetic
from vitkd.models.output import LOGITS, OUTER, AttentionLayout, BlockTaps, Output, Taps
from vitkd.models.small_data import LocalityAttention, ShiftedPatchTokenization

ATTENTIONS: dict[str, type[Attention]] = {"msa": Attention, "lsa": LocalityAttention}
TOKENIZERS = ("patch", "spt")
NO_SCORES: Mapping[int, Tensor] = MappingProxyType({})


@dataclass(repr=False)
class ViTConfig(InitialisedConfig):
    """Everything that determines a ViT's shape."""

    why_alone = None
    is_named = False

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
    _: KW_ONLY  # variants, see __repr__
    tokenizer: str = "patch"
    """patch | spt: see `ShiftedPatchTokenization`"""
    attention: str = "msa"
    """msa, plain multi-head self-attention | lsa: see `LocalityAttention`"""
    distillation_token: bool = False
    """A second token, which a teacher may teach, with a head of its own."""
    representation_size: int | None = None
    """The width of a linear layer between the last norm and the head, and so of "pre_logits"; None for no
    such layer."""
    drop_path_rate: float = 0.0
    """Stochastic depth: with which probability the last block's branches are left out for an image; the
    blocks before have less, in equal steps from 0 in the first."""
    drop_path_uniform: bool = False
    """Whether all blocks have that probability (Lee et al. 2021), rather than the last alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "patch_size", "embed_dim", "num_heads", "head_dim", "mlp_dim")
        check_at_least(1, self, "depth", most=10_000)
        if self.representation_size is not None:
            check_at_least(1, self, "representation_size")
        check_choice(self, "tokenizer", TOKENIZERS)
        check_choice(self, "attention", ATTENTIONS)
        for name in ("dropout", "emb_dropout", "drop_path_rate"):
            check(self, name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)")
        if self.drop_path_rate and self.depth == 1 and not self.drop_path_uniform:
            raise ConfigError(
                f"drop_path_rate={self.drop_path_rate}: rises from 0 in the first block, and depth=1 has no "
                "other; set drop_path_rate=0 or drop_path_uniform=true"
            )
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
            f"{f', representation {self.representation_size}' if self.representation_size else ''}"
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

    @property
    def least_bytes(self) -> int:
        inner, pixels = self.num_heads * self.head_dim, self.channels * self.patch_size**2
        blocks = self.depth * self.embed_dim * (4 * inner + 2 * self.mlp_dim)
        last = (self.representation_size or 0) + self.num_classes
        parameters = blocks + self.embed_dim * (self.tokens + pixels + last)
        activations = self.depth * self.tokens * (4 * inner + self.mlp_dim)
        mask = self.tokens**2 if self.attention == "lsa" else 0
        # A parameter's value, gradient and AdamW's two moments; one image's activations.
        return 16 * parameters + 4 * activations + mask

    @property
    def drops(self) -> bool:
        return max(self.dropout, self.emb_dropout, self.drop_path_rate) > 0

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        if self.drop_path_uniform:
            return (self.drop_path_rate,) * self.depth
        steps = max(self.depth - 1, 1)
        return tuple(self.drop_path_rate * block / steps for block in range(self.depth))

    @property
    def has_distillation_token(self) -> bool:
        return self.distillation_token

    @property
    def takes_scores(self) -> bool:
        return self.attention == "msa"

    def attention_layouts(self, part: str = OUTER) -> tuple[AttentionLayout, ...]:
        if part != OUTER:
            return ()
        grid, mask = (self.grid, self.grid), ATTENTIONS[self.attention].allowed(self.tokens)
        layout = AttentionLayout(
            self.num_heads, self.head_dim, grid, self.prefix, tuple(range(self.prefix)), mask
        )
        return (layout,) * self.depth

    def architecture(self) -> "ViT":
        return ViT(self)

    def build(self) -> "ViT":
        model = self.architecture()
        if self.init == MIMETIC:
            layers = [(block.attention.qkv, block.attention.out) for block in model.blocks]  # type: ignore[union-attr]
            make_mimetic(layers, model.positions, self.attention_layouts()[0])  # type: ignore[arg-type]
        return model


class ViT(Model):
    """A ViT in vit-pytorch's layout, initialised as vit-pytorch does."""

    config: ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.dropout = Dropout(c.emb_dropout)
        self.tokenizer: nn.Module = (
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
                DropPath(rate),
            )
            for rate in c.drop_path_rates
        )
        self.norm = LayerNorm(c.embed_dim, feeds_product=False)
        width = c.representation_size or c.embed_dim
        self.head = Linear(width, c.num_classes)
        self.register_parameter("distillation_token", None)
        if c.distillation_token:
            self.distillation_token = nn.Parameter(torch.randn(1, 1, c.embed_dim))
            self.distillation_head = Linear(width, c.num_classes)
        self.representation = Linear(c.embed_dim, width) if c.representation_size else nn.Identity()

    @property
    def classifier(self) -> nn.Linear | None:
        return self.head if self.distillation_token is None else None

    def layers_in_order(self) -> list[nn.Module]:
        # The last norm as timm has it, with the last block.
        return [*self.blocks[:-1], nn.ModuleList([self.blocks[-1], self.norm])]

    def forward(
        self,
        images: Tensor,
        taps: Taps = LOGITS,
        given: Mapping[int, Tensor] = NO_SCORES,
        kept: Sequence[Tensor | None] | None = None,
    ) -> Output:
        """Classify images [B, C, H, W] (or [S, B, C, H, W]), and return what `taps` asks for.

        Without logits it stops where the last of that is known: after QKᵀ of the last block, for example.
        Blocks attend by the scores [*S, B, H, T, T] that are given for them, if any are. Their branches are
        left out as `kept` says, by default as `draw_kept` draws.
        """
        depth = len(self.blocks)
        taps.assert_exist(depth, ("embed", *(f"block{i}" for i in range(depth)), "pre_logits"))
        x, last = self.embed(images), taps.last_whole_block(depth)
        kept = self.draw_kept(x[..., 0, 0]) if kept is None else kept
        features, attention = {"embed": x}, {}
        for i, block in enumerate(self.blocks[: last + 1]):
            x, attention[i] = block(x, taps.of_block(i), given.get(i), kept[i])
            if f"block{i}" in taps.features:
                features[f"block{i}"] = x
        for i in (block for block in taps.blocks if block > last):
            attention[i] = self.blocks[i].attention.tapped(x, taps.of_block(i))  # type: ignore[union-attr,operator]
        classes = self._classify(x, taps, features) if taps.needs_all_blocks else Output()
        return classes._replace(
            scores={i: output.scores for i, output in attention.items() if output.scores is not None},
            qkv={i: output.qkv for i, output in attention.items() if output.qkv is not None},
            features={name: features[name] for name in taps.features},
        )

    def trace(self, images: Tensor, given: Mapping[int, Tensor] = NO_SCORES) -> Trace:
        """As `Model.trace`: nothing is fused, and every block's T×T matrix stays in memory."""
        x = self.embed(images)
        kept = self.draw_kept(x[..., 0, 0])
        weights, tokens = [], []
        for i, block in enumerate(self.blocks):
            x, attention = block(x, BlockTaps(weights=True), given.get(i), kept[i])
            weights.append(attention.weights)
            tokens.append(x)
        logits = self._classify(x, LOGITS, {}).answer
        return Trace(logits, tuple(weights), tuple(tokens))

    def draw_kept(self, like: Tensor) -> list[Tensor | None]:
        """By block what to multiply its branches with, as `DropPath.draw` makes it for `like` [*S, B]."""
        return [block.drop_path.draw(like) for block in self.blocks]  # type: ignore[union-attr,operator]

    def embed(self, images: Tensor) -> Tensor:
        """Images [*S, B, C, H, W] to tokens [*S, B, T, D], first CLS, then the distillation token, if any."""
        if self.head.weight.ndim == 3 and images.ndim == 4:
            images = images.expand(len(self.head.weight), *images.shape)
        x = self.tokenizer(images)
        prefix = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        before = [token.expand(*x.shape[:-2], 1, -1) for token in prefix]
        x = torch.cat([*before, x], dim=-2) + self.positions
        return self.dropout(x)

    def _classify(self, x: Tensor, taps: Taps, features: dict[str, Tensor]) -> Output:
        """The logits, if wanted, of the last block's tokens `x`; "pre_logits" joins `features`."""
        features["pre_logits"] = self.representation(self.norm(x[..., 0, :]))
        if not taps.logits:
            return Output()
        logits = self.head(features["pre_logits"])
        if self.distillation_token is None:
            return Output(logits)
        distilled = self.distillation_head(self.representation(self.norm(x[..., 1, :])))
        return Output((logits + distilled) / 2, {"class_token": logits, "distillation_token": distilled})
