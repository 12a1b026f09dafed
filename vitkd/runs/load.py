"""Load a finished run: config, student, teacher, distilled pairs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from vitkd.config.run import Config, parse, teacher_run
from vitkd.errors import ConfigError
from vitkd.models import Model, digest
from vitkd.models.output import OUTER
from vitkd.runs.checkpoints import load_any, load_from_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import contents_of
from vitkd.runs.results import read_pairs
from vitkd.runs.seeding import first_weights
from vitkd.runs.teacher_store import FINGERPRINT, fingerprint, given_teacher

log = logging.getLogger("vitkd")


@dataclass(frozen=True, eq=False)
class Run:
    """A loaded run."""

    path: Path
    config: Config
    student: Model
    teacher: Model | None
    pairs: Sequence[Mapping[str, Any]]
    """as in `pairs.json`; empty if no attention map was distilled"""
    epoch: str
    """of the student: best | last"""

    @property
    def outer_pairs(self) -> Sequence[Mapping[str, Any]]:
        """Those of attention among patches, of which explanations are made."""
        return [pair for pair in self.pairs if pair.get("part", OUTER) == OUTER]

    @property
    def is_alone(self) -> bool:
        """Whether the student learned from labels alone."""
        config = self.config
        distils = "alpha" in config.method.ignores or config.weighting.distils(config.alpha)
        return not (config.method.needs_teacher and distils)


def load_run(
    path: Path, epoch: str, *, teacher: str | None = None, data: str | None = None, root: str | None = None
) -> Run:
    """The run in `path` after its "best" or "last" epoch, in eval mode on the CPU.

    Args:
        teacher: its teacher's file or folder; None looks it up in the store.
        data, root: `paths.data` and `dataset.root`, if they have changed since training.

    Raises:
        ConfigError: there is no run, it is of another version of vitkd, nothing was trained yet, or the
            teacher is missing or of other data.
    """
    folder = RunFolder.existing(path)
    config = config_of(folder, data, root)
    student = load_student(folder, epoch)
    found = find_teacher(folder, config, teacher)
    pairs: Sequence[Mapping[str, Any]] = []
    if config.weighting.distils(config.alpha):
        part = config.granularity.part
        layouts = [model.config.attention_layouts(part) if model else () for model in (student, found)]
        student_heads, teacher_heads = ([layout.heads for layout in of_model] for of_model in layouts)
        try:
            pairs = read_pairs(folder.pairs, student_heads, teacher_heads, part)
        except ConfigError as error:
            if teacher is None:
                raise
            log.warning("warning: %s: maps are compared in the default order", error)
    return Run(path, config, student, found, pairs, epoch)


def load_student(folder: RunFolder, epoch: str) -> Model:
    """A run's student after its "best" or "last" epoch, in eval mode on the CPU.

    Raises ConfigError if nothing was trained yet, or its weights are damaged.
    """
    if epoch == "best" and folder.student.is_file():
        return load_any(folder.student)
    checkpoint = folder.last if epoch == "last" else folder.best
    if not checkpoint.is_file():
        raise ConfigError(f"run={folder.path}: has no checkpoint of the {epoch} epoch (it is {folder.state})")
    return load_from_checkpoint(checkpoint)[0]


def config_of(folder: RunFolder, data: str | None, root: str | None) -> Config:
    """A run's configuration, with `paths.data` and `dataset.root` if they have changed since training.

    Raises ConfigError if it cannot be read, or `root` is no folder.
    """
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"root={root}: there is no such folder; name the one with the run's images")
    settings = folder.read_config()
    settings["paths"]["data"] = data or settings["paths"]["data"]
    if root is not None:
        settings["dataset"]["root"] = root
    return parse(OmegaConf.create(settings))


def find_teacher(run: RunFolder, config: Config, given: str | None) -> Model | None:
    """The teacher of the run in a folder, or None if it had none and none is given."""
    if given is not None:
        return given_teacher(given, config.dataset, otherwise="")
    if not config.method.needs_teacher:
        return None
    teacher = given_teacher(config.teacher.checkpoint, config.dataset, otherwise="")
    teacher = teacher or _own_teacher(run, config)
    if run.read_inputs().get("teacher/weights") not in (None, digest(teacher)):
        log.warning("warning: %s was trained with a teacher of other weights than the one found", run.path)
    return teacher


def _own_teacher(run: RunFolder, config: Config) -> Model:
    """The teacher that the run trained, or left with random weights; ConfigError if it is missing."""
    if not config.teacher.trained:
        own = teacher_run(config)
        with torch.random.fork_rng(devices=[]):
            return first_weights(own.seed, own.student).eval()
    # As recorded: the images may have changed since, which makes another teacher.
    mark = str(run.read_inputs().get("teacher/fingerprint"))
    if not FINGERPRINT.fullmatch(mark):
        mark = fingerprint(teacher_run(config), contents_of(config, run))
    stored = Path("teachers", config.dataset.name, mark)
    for parent in run.path.resolve().parents:
        if (parent / stored).is_dir():
            return load_any(parent / stored)
    raise ConfigError(f"run={run.path}: its teacher ({stored}) is missing; set teacher.checkpoint=PATH")
