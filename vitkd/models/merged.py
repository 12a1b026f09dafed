"""Several trained students as one model, whose logits are the sum of theirs.

For students of `method=subspace` (Malik et al. 2020, arXiv 2004.03281) that is the paper's merged network:
the students' representations side by side, then one linear layer, of which each head is a share.

Shapes: B batch, C channels, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError, check, check_choice
from vitkd.models.base import CONFIGS, Model, ModelConfig, configuration, file_of
from vitkd.models.output import LOGITS, Output, Taps
from vitkd.models.weights import describe, load_model

FEATURES = ("pre_logits",)


@dataclass(repr=False)
class MergedConfig(ModelConfig):
    """Which students are merged, and what of them is trained then."""

    why_alone = "it is made of several students already"

    # None of these is in `repr`: the random numbers of a run depend on neither paths nor what is trained.
    runs: list[str] = field(repr=False)
    """their run folders or files; {seed} in one stands for `seed`"""
    trains: str = field(default="all", repr=False)
    """all: every weight | head: the last layer alone"""
    seed: int = field(default=0, repr=False)
    """of the runs"""
    parts: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """what builds each student's architecture, as `describe` says it; filled in by `build`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "trains", ("all", "head"))
        is_set = len({*self.runs}) == len(self.runs)
        check(self, "runs", is_set, "names a run twice")

    def __str__(self) -> str:
        return f"{len(self.runs or self.parts)} students merged, {self.trains} trained"

    @property
    def places(self) -> list[Path]:
        """The students' folders or files."""
        return [Path(run.replace("{seed}", str(self.seed))) for run in self.runs]

    @property
    def depth(self) -> int:
        """The blocks of all students; no file can have more than it has weights."""
        return sum(part["model"].get("depth", 0) for part in self.parts)

    def check_files(self) -> None:
        check(self, "runs", len(self.runs) > 0, "name the runs whose students are merged")
        for place in self.places:
            if not file_of(place).is_file():
                raise ConfigError(f"runs={place}: there is no trained student; give run folders or files")

    def prepare(self) -> None:
        self.read_students()

    def build(self) -> "Merged":
        students = self.read_students()
        return Merged(replace(self, parts=[describe(student) for student in students]), students)

    def architecture(self) -> "Merged":
        return Merged(self, [configuration(part).architecture() for part in self.parts])

    def read_students(self) -> list[Model]:
        """The trained students; ConfigError where one is missing or unfit to be merged."""
        self.check_files()
        return [self._read(place) for place in self.places]

    def _read(self, place: Path) -> Model:
        try:
            student = load_model(place)
        except ConfigError as error:
            raise ConfigError(f"runs={error}") from error
        if self._task(student.config) != self._task(self):
            raise ConfigError(f"runs={place}: was trained on other images, as {self._task(student.config)}")
        if student.classifier is None:
            raise ConfigError(f"runs={place}: its last layer is not a single linear one; merge others")
        return student

    @staticmethod
    def _task(config: ModelConfig) -> str:
        return f"image_size={config.image_size} channels={config.channels} num_classes={config.num_classes}"


class Merged(Model):
    """Adds up the logits of its students."""

    config: MergedConfig

    def __init__(self, config: MergedConfig, students: Sequence[Model]) -> None:
        super().__init__()
        self.config = config
        self.students = nn.ModuleList(students)
        if config.trains == "head":
            self.requires_grad_(False)
            for student in students:
                assert student.classifier is not None
                student.classifier.requires_grad_()

    def layers_above(self) -> dict[str, int]:
        return {
            f"students.{number}.{name}": above
            for number, student in enumerate(self.students)
            for name, above in student.layers_above().items()  # type: ignore[operator]
        }

    def train(self, mode: bool = True) -> Self:
        """As nn.Module has it, but students whose heads alone are trained stay in eval mode."""
        super().train(mode)
        if self.config.trains == "head":
            self.students.eval()
        return self

    def forward(self, images: Tensor, taps: Taps = LOGITS) -> Output:
        """Classify images [B, C, H, W]; "pre_logits" holds the students' representations side by side."""
        taps.assert_exist(0, FEATURES)
        outputs: list[Output] = [student(images, taps) for student in self.students]
        features = {name: torch.cat([each.features[name] for each in outputs], -1) for name in taps.features}
        logits = torch.stack([each.answer for each in outputs]).sum(0) if taps.logits else None
        return Output(logits, features=features)


def merge(students: Sequence[Model]) -> Merged:
    """Students of the same images as one model, all of whose weights are trained."""
    task = {name: getattr(students[0].config, name) for name in ("image_size", "channels", "num_classes")}
    return Merged(MergedConfig(**task, runs=[], parts=[describe(each) for each in students]), students)


# Models in files are among its settings, so `weights` cannot know it by itself.
CONFIGS[MergedConfig.__name__] = MergedConfig
