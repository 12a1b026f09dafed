"""The models to explain, and the runs and data that they come from."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.explain.maps.hooks import timm_model
from vitkd.explain.maps.recording import has_maps
from vitkd.explain.maps.subjects import TEACHER
from vitkd.explain.settings import Settings
from vitkd.models import digest
from vitkd.runs.checkpoints import load_any
from vitkd.runs.load import Run, load_run

log = logging.getLogger("vitkd")

# Settings of a data set that change its test images, or how a model sees them.
SAME_IMAGES = ("source", "root", "image_size", "channels", "mean", "std", "num_classes", "split_seed")


@dataclass(frozen=True, eq=False)
class Sources:
    """What is explained."""

    models: Mapping[str, nn.Module]
    """name → model in eval mode on the device, the teacher first if there is one"""
    device: torch.device
    runs: Mapping[str, Run]
    """student's name → its run; none for a single model"""
    data: ImageDataModule | None
    """of the first run"""

    @property
    def first(self) -> Run:
        """The first run."""
        return next(iter(self.runs.values()))

    @property
    def title(self) -> str:
        *others, last = [name for name, model in self.models.items() if has_maps(model)]
        return f"Where {', '.join(others)} and {last} look" if others else f"Where {last} looks"

    @property
    def shown_blocks(self) -> dict[str, int]:
        """Model → the last block that its run distilled; the teacher's is the first such run's."""
        pairs = {name: run.pairs[-1] for name, run in self.runs.items() if run.pairs}
        shown = {name: pair["student_block"] for name, pair in pairs.items()}
        return shown | ({TEACHER: next(iter(pairs.values()))["teacher_block"]} if pairs else {})

    def notes(self) -> list[str]:
        """What to know of a teacher that has no attention maps."""
        teacher = self.models.get(TEACHER)
        if teacher is None or has_maps(teacher):
            return []
        note = f"The teacher ({teacher.config}) has no attention maps: only its predictions are shown."
        log.info("%s", note)
        return [note]


@contextmanager
def open_sources(settings: Settings, device: torch.device) -> Iterator[Sources]:
    """Load the models that `settings` name; ConfigError where that cannot be done."""
    if settings.model is not None:
        model = _single_model(settings.model, settings.pretrained)
        name = settings.model.removeprefix("timm:") if settings.model.startswith("timm:") else "student"
        yield Sources({name: model.to(device).eval()}, device, {}, None)
        return
    runs = _load_runs(settings)
    config = runs[0].config
    names = ["student"] if len(runs) == 1 else ["student A", "student B"]
    teachers = [run.teacher for run in runs if run.teacher is not None]
    models = {TEACHER: teachers[0]} if teachers else {}
    models |= {name: run.student for name, run in zip(names, runs, strict=True)}
    models = {name: model.to(device).eval() for name, model in models.items()}
    with closing(ImageDataModule(config.dataset, config.paths.data, 0)) as data:
        data.setup()
        yield Sources(models, device, dict(zip(names, runs, strict=True)), data)


def _single_model(name: str, pretrained: bool) -> nn.Module:
    if Path(name, "config.yaml").is_file():
        raise ConfigError(f"model={name}: is a run, which says how its images are made; write run={name}")
    return timm_model(name, pretrained) if name.startswith("timm:") else load_any(Path(name))


def _load_runs(settings: Settings) -> list[Run]:
    """The runs, whose students have attention maps, the same test images and one teacher if any."""
    where = {"data": settings.paths.get("data"), "root": settings.root}
    teacher = settings.teacher.get("checkpoint")
    runs = [load_run(path, settings.epoch, teacher=teacher, **where) for path in settings.runs]
    for run in runs:
        if not has_maps(run.student):
            what = f"its student ({run.student.config}) has no attention maps"
            raise ConfigError(f"run={run.path}: {what}; name a run whose student is a ViT")
    _check_same_images(runs)
    if len({digest(run.teacher) for run in runs if run.teacher is not None}) > 1:
        raise ConfigError(
            "run=[A,B]: learned from different teachers; name the one to compare both with by "
            "teacher.checkpoint=PATH"
        )
    return runs


def _check_same_images(runs: Sequence[Run]) -> None:
    """ConfigError unless all runs have the same test images."""
    first, *others = (run.config.dataset for run in runs)
    for other in others:
        for name in SAME_IMAGES:
            mine, its = getattr(first, name, None), getattr(other, name, None)
            if type(first) is not type(other) or mine != its:
                what = f"{first.name} and {other.name} differ in {name} ({mine}, {its})"
                raise ConfigError(f"run=[A,B]: {what}; compare runs on the same test images")
