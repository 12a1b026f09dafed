"""What every model is to the rest of the code: images in, logits and attention scores out.

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens, H heads, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from vitkd.errors import ConfigError
from vitkd.models.layers import Scores


class TokenLogits(NamedTuple):
    """What the two heads of a model with a distillation token say, each of its own token."""

    class_token: Tensor
    """[*S, B, K]"""
    distillation_token: Tensor
    """[*S, B, K]"""


class ModelOutput(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """[*S, B, K]: the model's answer"""
    scores: Mapping[int, Scores]
    """block → pre-softmax scores [*S, B, H, T, T], or their factors, for exactly the blocks asked for"""
    of_tokens: TokenLogits | None = None
    """whose mean `logits` are, where a model has a head for each of two tokens"""


@dataclass(repr=False)
class ModelConfig(ABC):
    """What every model's configuration says, whatever the architecture."""

    image_size: int
    channels: int
    num_classes: int

    # Settings younger than the first trained models, and what these were built as.
    LATER: ClassVar[Mapping[str, Any]] = {}

    # Training images a step without which a model cannot train.
    LEAST_BATCH: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.check_at_least_one("image_size", "channels", "num_classes")

    def check_at_least_one(self, *names: str) -> None:
        """ConfigError if one of the settings `names` is below 1."""
        for name in names:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1")

    def check_choice(self, name: str, choices: Collection[str]) -> None:
        """ConfigError if the setting `name` is none of `choices`."""
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name}={getattr(self, name)}: choose {' or '.join(choices)}")

    def facts(self) -> dict[str, Any]:
        """What tells this model from others: its settings, but for later ones that change nothing.

        Random streams and the names of stored teachers hang on it, so a new setting leaves both as they were.
        """
        return {k: v for k, v in asdict(self).items() if k not in self.LATER or v != self.LATER[k]}

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in self.facts().items())})"

    @abstractmethod
    def __str__(self) -> str:
        """The model's shape in a few words."""

    def prepare(self) -> None:  # noqa: B027, most take nothing
        """Fetch what `build` takes from a network; ConfigError where that cannot be had."""

    @abstractmethod
    def architecture(self) -> "Model":
        """A model of this configuration, for weights that are at hand."""

    def build(self) -> "Model":
        """A model of this configuration as training begins with it, from PyTorch's global generator."""
        return self.architecture()


class Model(nn.Module, ABC):
    """A classifier that can say where it looks, if it has attention."""

    config: ModelConfig

    @abstractmethod
    def forward(self, images: Tensor, record: Collection[int] = (), factors: bool = False) -> ModelOutput:
        """Classify images [B, C, H, W] and record the scores of `record`'s blocks, or their `factors`."""


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


class Answer(NamedTuple):
    """What a teacher says of some images."""

    scores: Mapping[int, Scores]
    """block → its pre-softmax scores [*I, H, T, T], or their factors"""
    logits: Tensor | None = None
    """[*I, K], where they were asked for"""

    @property
    def predicted(self) -> Tensor:
        """Its classes [*I]."""
        assert self.logits is not None, "the teacher was not asked for classes"
        return self.logits.argmax(-1)
