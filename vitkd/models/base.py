"""What every model is to the rest of the code: images in, and out what was asked for.

Shapes: S stacked students (absent for one model), B batch, C channels, H height, W width, T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from vitkd.errors import check_at_least
from vitkd.models.output import LOGITS, OUTER, AttentionLayout, Output, Taps
from vitkd.process.plugins import import_plugin, is_plugin


class Trace(NamedTuple):
    """Everything that an explanation needs of a forward pass, in the autograd graph."""

    logits: Tensor
    """[*S, B, classes]"""
    weights: tuple[Tensor, ...]
    """per block: [*S, B, heads, Q, K], the very tensors that multiplied the values"""
    tokens: tuple[Tensor, ...]
    """per block: [*S, B, T, embed_dim] after it"""


@dataclass(repr=False)
class ModelConfig(ABC):
    """What every model's configuration says, whatever the architecture."""

    image_size: int
    channels: int
    num_classes: int

    REST: ClassVar[str | None] = None
    """the field, a dict, that takes settings which are no fields"""
    why_alone: ClassVar[str | None] = "only vitkd's own ViTs can be stacked"
    """why parameters may not carry a leading axis, a student each; None if they may"""

    is_named: ClassVar[bool] = True
    """whether the text of `str` begins with the architecture's name"""

    def __post_init__(self) -> None:
        check_at_least(1, self, "channels", "num_classes")
        check_at_least(1, self, "image_size", most=2**16)

    def __repr__(self) -> str:
        """The settings as code; keyword-only ones, variants of an architecture, only if they are not default.

        Seeds are made from it (`vitkd.runs.seeding`), so a new variant leaves those of other models alone.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        default = {f.name for f in fields(self) if f.kw_only and values.get(f.name) == f.default}
        shown = [f"{name}={value!r}" for name, value in values.items() if name not in default]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    @abstractmethod
    def __str__(self) -> str:
        """The model's shape in a few words."""

    def prepare(self) -> None:  # noqa: B027, most take nothing
        """Fetch what `build` takes from a network; ConfigError where that is unavailable."""

    def check_files(self) -> None:  # noqa: B027, most read none
        """ConfigError where a file or folder that `build` reads is missing; none is read."""

    @property
    def weights_file(self) -> str | None:
        """The file with the weights that training begins with, if it begins with those of a file."""
        return None

    def check_source(self, teacher: "ModelConfig | None") -> None:  # noqa: B027, most begin at random
        """ConfigError where first weights come from those of a `teacher` that is missing or unfit."""

    def untrained(self) -> str:
        """Which weights training begins with, in words; ConfigError if they are of no use without it."""
        return "random weights"

    @property
    def min_batch_size(self) -> int:
        """A model cannot train on fewer images a step."""
        return 1

    @property
    def least_bytes(self) -> int:
        """What training it takes in memory, at the very least."""
        return 4 * self.channels * self.image_size**2

    @property
    def drops(self) -> bool:
        """Whether training draws dropout masks."""
        return False

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """By block, how probable it is that an image's branches are left out in training (stochastic depth).

        Empty for a model that cannot leave out those which another one does.
        """
        return ()

    @property
    def has_distillation_token(self) -> bool:
        """Whether a second token with a head of its own can learn from a teacher."""
        return False

    @property
    def takes_scores(self) -> bool:
        """Whether its blocks can attend by scores that are given to them."""
        return False

    @property
    def num_stages(self) -> int:
        """How many stages a convolutional network has: features "stage1", … are [B, channels, h, w]."""
        return 0

    def attention_layouts(self, part: str = OUTER) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention; empty for a model that has no attention maps of this part."""
        return ()

    @abstractmethod
    def architecture(self) -> "Model":
        """A model of this configuration, to load weights into."""

    def build(self) -> "Model":
        """A model of this configuration as training begins with it, from PyTorch's global generator."""
        return self.architecture()


class Model(nn.Module, ABC):
    """A classifier that returns its attention scores and features, where it is asked for them."""

    config: ModelConfig

    @property
    def attention(self) -> tuple[AttentionLayout, ...]:
        """The layout of each block's attention; empty for a model that has no attention maps."""
        return self.config.attention_layouts()

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear layer that makes logits of "pre_logits"; None where it takes more, or no such layer."""
        return None

    def layers_in_order(self) -> list[nn.Module]:
        """What lies between embedding and head, in order: by default `self.blocks`.

        Of a model without blocks, all children but the last.
        """
        return [*getattr(self, "blocks", ())] or [*self.children()][:-1]

    def layers_above(self) -> dict[str, int]:
        """Each parameter's name → how many layers lie above it.

        That is 0 in the head and one more than there are layers in the embedding. A parameter of no layer
        belongs to the next one, in the order of `named_parameters`: before all layers to the embedding, after
        them to the head.
        """
        named, layers = [*self.named_parameters()], self.layers_in_order()
        number = {id(p): place for place, layer in enumerate(layers, start=1) for p in layer.parameters()}
        first = next((place for place, (_, p) in enumerate(named) if id(p) in number), 0)
        above, current = {}, len(layers) + 1
        for place, (name, parameter) in reversed([*enumerate(named)]):
            current = number.get(id(parameter), current) if place >= first else 0
            above[name] = len(layers) + 1 - current
        return above

    def undecayed(self) -> set[str]:
        """The names of the parameters that usual recipes spare weight decay: all but weights of matrices.

        That is norms, biases, positions and tokens.
        """
        return {name for name, parameter in self.named_parameters() if not is_matrix(name, parameter)}

    @abstractmethod
    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [*S, B, C, H, W], and return what `taps` asks for at the least cost."""

    def trace(self, images: Tensor) -> Trace:
        """Classify images [*S, B, C, H, W] and keep every block's attention weights and tokens."""
        raise NotImplementedError(f"{type(self).__name__} has no attention maps")


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter, of one model and no stack, is the weight of a linear map or a convolution."""
    return name.endswith("weight") and parameter.ndim >= 2


def file_of(place: Path) -> Path:
    """The file of the model in a run folder, or the file that `place` is itself."""
    return place / "student.safetensors" if place.is_dir() else place


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


CONFIGS: dict[str, type[ModelConfig]] = {}
"""name → class of the configurations that files may name; `weights` fills it"""


def configuration(described: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a file's header holds, or what `describe` says of a model."""
    return config_class(described["config"])(**described["model"])


def config_class(name: str) -> type[ModelConfig]:
    """The configuration class that a header names: one of vitkd's, or `module.Class` of a plugin."""
    module, _, plugin_class = name.rpartition(".")
    if not is_plugin(module):
        return CONFIGS[name]
    found = getattr(import_plugin(module), plugin_class)
    assert issubclass(found, ModelConfig)
    return cast(type[ModelConfig], found)
