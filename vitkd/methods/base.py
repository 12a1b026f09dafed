"""What every method is: an `Objective` compares student and teacher, a `Method` builds it.

Shapes: S stacked students (absent for one), B batch, C classes, P values an image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.methods.maps.granularity import BlockPair, Granularity
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.models import Model, ModelConfig, Output, Taps

Terms = Mapping[str, Tensor]
"""name → [*S, B, P]: how far a student is from its teacher, image by image"""
NONE = torch.empty(0, dtype=torch.int64)


class DataFacts(NamedTuple):
    """What an objective may learn about the training data when it is built."""

    num_images: int
    num_classes: int
    calibration: Callable[[], Tensor]
    """gives a batch of training images [B, channels, height, width]"""
    labels: Callable[[], tuple[Tensor, Tensor]] = lambda: (NONE, NONE)
    """gives the positions, as a batch's `index` counts, and the labels of all training images: [N] int64"""
    seed: int = 0
    """of what is drawn for an image as its order and view are, by (seed, epoch, index)"""


class MapSettings(Protocol):
    """The settings of a run by which maps are paired and compared."""

    granularity: Granularity
    loss: AttentionLoss


class Objective(nn.Module, ABC):
    """What a student learns from its teacher besides labels.

    Its parameters are trained with the student's; its buffers may be written in training only.
    """

    pairs: tuple[BlockPair, ...] = ()
    """which student maps learn from which teacher maps, if any do"""
    student_taps = Taps()
    """what the student is asked for; always for its logits too"""
    teacher_taps = Taps(logits=False)
    """what the teacher is asked for in training; in validation for its logits too"""
    min_images = 1
    """the fewest images of a batch for which there is a comparison"""
    shares_drop_path = False
    """whether the teacher leaves out the branches that the student leaves out (stochastic depth)"""
    curves: tuple[str, ...] = ()
    """a curve's name for each of the terms' values; none where the transfer loss says it all"""

    stage = "compared"
    """what is computed in this epoch; a CUDA graph holds the steps of one stage"""
    validates = True
    """whether validation images can be compared; a bank of training images has none of them"""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for epoch `epoch`, counted from 0, of `epochs`."""

    def can_validate(self, batch: Batch) -> bool:
        """Whether the images of a validation batch can be compared."""
        return self.validates and len(batch.label) >= self.min_images

    @property
    def stack_key(self) -> Any:
        """Equal for objectives of which a stack of students needs but one; else each has a key of its own."""
        return id(self)

    def shared_by(self, objectives: Sequence["Objective"]) -> "Objective":
        """One for a stack of all their students: `objectives`, this one first, have equal stack keys."""
        return self

    def class_logits(self, student: Output) -> Tensor:
        """The student's logits [*S, B, C] that learn the labels."""
        return student.answer

    @abstractmethod
    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        """How far apart the two are, image by image; the teacher's tensors may lack the axis S."""

    def transfer(self, terms: Terms) -> Tensor:
        """The transfer loss of each image [*S, B]: the sum of all terms' values."""
        return torch.cat([*terms.values()], dim=-1).sum(-1)

    def curve_values(self, terms: Terms) -> Tensor:
        """The mean over images of each value that `curves` names [*S, P], without gradient."""
        means = [values.detach().mean(-2) for values in terms.values()]
        return torch.cat(means, dim=-1) if len(means) > 1 else means[0]


@dataclass
class Method(ABC):
    """A way to train a student; its fields are the keys of its file in `conf/method/`."""

    needs_teacher: ClassVar[bool] = True

    @property
    def trains_parameters(self) -> bool:
        """Whether its objective has parameters of its own, which a stack of students cannot train."""
        return False

    @property
    def min_batch_size(self) -> int:
        """The fewest training images a step from which this can be learned."""
        return 1

    @property
    def ignores(self) -> tuple[str, ...]:
        """Settings without effect under this method: setting one on the command line earns a warning."""
        return ()

    @property
    def why_alone(self) -> str | None:
        """Why a stack of students cannot be trained this way; None if it can."""
        return (
            "its method trains parameters of its own, which a stack does not"
            if self.trains_parameters
            else None
        )

    @property
    def why_unmixed(self) -> str | None:
        """Why images that are mixed of two (mixup, CutMix) teach nothing this way; None if they do."""
        return None

    @property
    def why_unrepeated(self) -> str | None:
        """Why views of one image may not be side by side in a batch; None if they may."""
        return None

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:  # noqa: B027
        """Raise ConfigError if the student cannot learn from the teacher this way; as a rule it can."""

    def check_data(self, data: DataFacts) -> None:  # noqa: B027
        """Log what it takes to learn from these images; ConfigError, before a teacher trains, if too much."""

    def trained(self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts) -> Model:
        """What is trained and kept in the student's place; as a rule the student itself."""
        return student

    def set_first_weights(self, student: Model, teacher: Model) -> None:  # noqa: B027
        """Let a student whose transfer loss counts begin with weights of its teacher; as a rule with none."""

    @abstractmethod
    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> Objective | None:
        """What the student learns from the teacher; None if nothing."""
