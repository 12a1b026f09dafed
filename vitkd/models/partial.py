"""A ViT that sees some of an image's patches only: the tokens of all others are left out.

Shapes: N patches, n of them seen, D embed_dim.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check
from vitkd.models.base import CONFIGS, ModelConfig, count_parameters
from vitkd.models.output import OUTER, AttentionLayout
from vitkd.models.vit import ViT, ViTConfig


@dataclass(repr=False)
class PartialViTConfig(ViTConfig):
    """Everything that determines such a ViT's shape."""

    _: KW_ONLY
    patches: list[int] = field(default_factory=list)
    """those that it sees, counted from the top left, row by row"""

    def __post_init__(self) -> None:
        super().__post_init__()
        exist = self.patches == sorted({*self.patches} & {*range(self.grid**2)})
        check(self, "patches", len(self.patches) > 0 and exist, f"must rise, from 0 to {self.grid**2 - 1}")

    def __str__(self) -> str:
        return f"{super().__str__()}, of which it sees {len(self.patches)}"

    @property
    def tokens(self) -> int:
        return self.prefix + len(self.patches)

    @property
    def takes_scores(self) -> bool:
        return False

    def attention_layouts(self, part: str = OUTER) -> tuple[AttentionLayout, ...]:
        return ()  # these patches make no grid

    def architecture(self) -> "PartialViT":
        return PartialViT(self)


class PartialViT(ViT):
    """A ViT whose tokenizer keeps some patches."""

    def __init__(self, config: PartialViTConfig) -> None:
        super().__init__(config)
        self.tokenizer = nn.Sequential(self.tokenizer, Kept(config.patches))


class Kept(nn.Module):
    """Patches [..., N, D] → those of them that are seen [..., n, D]."""

    places: Tensor

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__()
        # A buffer, so that no step copies it to the device; it is of the configuration, so it is there before
        # any weights are.
        self.register_buffer("places", torch.tensor([*places], device="cpu"), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        return patches.index_select(-2, self.places)


CONFIGS[PartialViTConfig.__name__] = PartialViTConfig


def small_vits(student: ModelConfig, divided: Sequence[list[int]]) -> list[PartialViTConfig]:
    """A ViT for each share of the patches, as wide as leaves all together the student's parameters at most.

    They have the student's depth and heads; embed_dim and mlp_dim shrink by one factor.

    Raises ConfigError if the student is no ViT of vitkd's own, has first weights that they cannot have, or
    too few parameters for so many.
    """
    if not isinstance(student, ViTConfig):
        raise ConfigError(f"student={student}: only vitkd's own ViTs can see some patches; choose one")
    if student.init is not None:
        raise ConfigError(f"student.init={student.init}: gives small ViTs no weights; set student.init=null")

    def of_width(width: int) -> list[PartialViTConfig]:
        shape = {"embed_dim": width, "mlp_dim": max(1, student.mlp_dim * width // student.embed_dim)}
        return [PartialViTConfig(**vars(student) | shape, patches=patches) for patches in divided]

    widths = range(1, student.embed_dim + 1)
    width = bisect_right(widths, parameters(student), key=lambda each: parameters(*of_width(each)))
    if width == 0:
        raise ConfigError(
            f"student={student}: has too few parameters for {len(divided)} ViTs; choose a larger one or fewer"
        )
    return of_width(width)


def parameters(*configs: ModelConfig) -> int:
    """Of all models of these configurations."""
    with torch.device("meta"):
        return sum(count_parameters(config.architecture()) for config in configs)
