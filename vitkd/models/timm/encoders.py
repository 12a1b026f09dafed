"""timm's architectures, block by block.

Shapes: B images, C channels, H × W pixels, T tokens, D embed_dim, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NamedTuple

from timm.models.eva import EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

from vitkd.models.output import OUTER, AttentionLayout, Output
from vitkd.models.timm.attention import Tapped, make_tapped

# These normalise what comes out of attention, not what goes in.
POST_NORM = (ResPostBlock, EvaBlockPostNorm)


class State(NamedTuple):
    """What one block gives to the next."""

    tokens: Tensor
    """[B, T, D]"""
    rope: Any = None
    """the rotary embedding of the patches, of each block or of all"""
    words: Tensor | None = None
    """of each patch of a TNT [B · patches, N, D of words]"""


class Encoder(ABC):
    """How one of timm's networks is computed block by block; it holds no parameters."""

    ATTENTION: ClassVar[str] = "attn"
    """the name of the attention in a block that is asked for"""

    def __init__(self, network: Any) -> None:
        self.network, self.blocks = network, self.blocks_of(network)
        self.parts: Mapping[str, Encoder] = {OUTER: self}
        """the same network's encoders, by the part of its attention that they ask for"""
        for block in range(len(self)):
            if not isinstance(self.attention(block), Tapped):
                make_tapped(self.attention(block))

    @staticmethod
    def blocks_of(network: Any) -> Sequence[Any]:
        """All blocks of a network of this architecture."""
        return [*network.blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def attention(self, block: int) -> Tapped:
        """The attention of a block."""
        attention: Tapped = getattr(self.blocks[block], self.ATTENTION)
        return attention

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom and from left to right."""
        rows, columns = self.network.patch_embed.grid_size
        return rows, columns

    def layouts(self) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention."""
        prefix, grid = self.network.num_prefix_tokens, self.grid
        attentions = [self.attention(block) for block in range(len(self))]
        layouts = [AttentionLayout(a.num_heads, a.head_dim, grid, prefix, self.readers()) for a in attentions]
        has_class_token = self.network.cls_token is not None
        return tuple(layout._replace(has_class_token=has_class_token) for layout in layouts)

    def readers(self) -> tuple[int, ...]:
        """The tokens from which the network classifies."""
        if self.network.global_pool == "token":
            return (0,)
        prefix = self.network.num_prefix_tokens
        return tuple(range(prefix, prefix + prod(self.grid)))

    @abstractmethod
    def embed(self, images: Tensor) -> State:
        """Images [B, C, H, W] as the tokens of the first block."""

    @abstractmethod
    def block(self, index: int, state: State) -> State:
        """The state after a block."""

    def before_attention(self, index: int, state: State) -> tuple[Tensor, Any]:
        """What a block's attention is given: tokens [B, T, D], and the rotary embedding, if there is one."""
        block = self.network.blocks[index]
        return state.tokens if isinstance(block, POST_NORM) else block.norm1(state.tokens), None

    def read(self, state: State) -> tuple[Tensor, Callable[[], Output]]:
        """[B, D] from which the head classifies after the last block, and what makes logits [B, K] of it."""
        pre_logits = self.network.forward_head(self.network.norm(state.tokens), pre_logits=True)
        return pre_logits, lambda: Output(self.network.head(pre_logits))


class VisionTransformerEncoder(Encoder):
    """ViT (Dosovitskiy et al. 2020) and what has its form: DeiT, DINOv2, CLIP's and SigLIP's image towers."""

    def embed(self, images: Tensor) -> State:
        network = self.network
        return State(network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images)))))

    def block(self, index: int, state: State) -> State:
        return State(self.network.blocks[index](state.tokens))


class DistilledEncoder(VisionTransformerEncoder):
    """DeiT with a distillation token (Touvron et al. 2021), whose logits are the mean of two heads."""

    def readers(self) -> tuple[int, ...]:
        return (0, 1)

    def read(self, state: State) -> tuple[Tensor, Callable[[], Output]]:
        network = self.network
        tokens = network.norm(state.tokens)
        of_class, of_distillation = (network.head_drop(tokens[:, index]) for index in (0, 1))

        def classify() -> Output:
            heads = {
                "class_token": network.head(of_class),
                "distillation_token": network.head_dist(of_distillation),
            }
            return Output((heads["class_token"] + heads["distillation_token"]) / 2, heads)

        return (of_class + of_distillation) / 2, classify


class EvaEncoder(Encoder):
    """EVA (Fang et al. 2022), and what has rotary embeddings: EVA-02, DINOv3, the perception encoders."""

    def embed(self, images: Tensor) -> State:
        network = self.network
        tokens, rope = network._pos_embed(network.patch_embed(images))
        return State(network.norm_pre(tokens), rope)

    def block(self, index: int, state: State) -> State:
        return State(self.network.blocks[index](state.tokens, rope=self._rope(index, state)), state.rope)

    def before_attention(self, index: int, state: State) -> tuple[Tensor, Any]:
        tokens, _ = super().before_attention(index, state)
        return tokens, self._rope(index, state)

    def _rope(self, index: int, state: State) -> Any:
        """Of one block; `mixed` embeddings are learned for each."""
        is_of_each = getattr(self.network, "rope_mixed", False) and state.rope is not None
        return state.rope[index] if is_of_each else state.rope
