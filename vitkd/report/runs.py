"""Finds and reads run folders: settings, state and metrics.

PyTorch is not imported and a run takes a few milliseconds, so a report on hundreds of runs takes seconds.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vitkd.errors import ConfigError
from vitkd.report import parsing
from vitkd.report.parsing import Curves, Settings, number
from vitkd.report.settings import CONSTANT, comparable, option, weighting_of
from vitkd.runs.files import read_mapping
from vitkd.runs.folder import RunFolder, version_problem

FOLDERS_WITHOUT_RUNS = {"checkpoints", "stacks", "sweeps", "report", "explain"}
STORED_TEACHER = re.compile(r".*/teachers/[^/]+/[0-9a-f]{12}(\.unfinished(-\d+)?)?")
"""<outputs>/teachers/<data set>/<fingerprint>"""

METRICS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "acc_last": ("test/acc_last", parsing.percent),
    "acc_best": ("test/acc_best", parsing.percent),
    "agreement": ("test/teacher_agreement", parsing.percent),
    "wall_seconds": ("wall_seconds", number),
    "epochs": ("epochs", parsing.integer),
    "steps": ("steps", parsing.integer),
    "stacked": ("stack/students", parsing.integer),
    "teacher": ("teacher/weights", lambda value: parsing.one_line(value or "") or None),
    "teacher_acc": ("teacher/test_acc", parsing.percent),
}
"""Field of a finished `Run` → its key in metrics.json, and how it is read."""


class Fidelity(NamedTuple):
    """How far a student's attention is from its teacher's, as measured by `vitkd.explain`."""

    divergence: float
    """Jensen–Shannon divergence of the distilled maps, in nats a row"""
    epoch: str
    """of the student's weights: best | last"""


@dataclass(frozen=True)
class Run:
    """One run folder. Accuracies and agreements are in percent."""

    path: Path
    state: str
    """done | running | stopped (also if killed) | failed | damaged | incompatible | foreign"""
    problem: str = ""
    """why, where `state` is not enough"""
    settings: Settings = field(default_factory=dict)
    """dotted name → value, of all settings that may change a result, without the seed"""
    seed: int = 0
    dataset: str = ""
    method: str = ""
    granularity: str | None = None
    loss: str | None = None
    alpha: float | None = None
    weighting: str = CONSTANT
    acc_last: float | None = None
    """test accuracy at the last epoch"""
    acc_best: float | None = None
    """test accuracy at the epoch with the best validation accuracy"""
    agreement: float | None = None
    """with the teacher, on the test split, at the last epoch"""
    wall_seconds: float | None = None
    epochs: int | None = None
    steps: int | None = None
    stacked: int | None = None
    """number of students trained together; None for a run of its own"""
    teacher: str | None = None
    """digest of the teacher's weights"""
    teacher_acc: float | None = None
    finished: str = ""
    """time at which its state was written, ISO 8601"""
    fidelity: Fidelity | None = None
    """None if it was not measured"""
    is_teacher: bool = False
    """whether it belongs to the teacher store, and so to no arm"""

    @cached_property
    def curves(self) -> Curves:
        return parsing.read_curves(self.path / "metrics.csv")

    @property
    def attention_weight(self) -> float:
        """Weight of the attention loss beside another transfer loss; above 0 for method=token only."""
        return number(self.settings.get("method.attention_weight")) or 0.0

    @property
    def is_student_alone(self) -> bool:
        """Whether it learned from labels alone: no method, or alpha = 1 throughout."""
        return self.method == "none" or (self.alpha == 1 and self.weighting == CONSTANT)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in and below `folders`, each once, sorted by path.

    Raises ConfigError if one of the folders does not exist, or if there is no run at all.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            problem = "is a file; name a folder" if folder.exists() else "there is no such folder"
            raise ConfigError(f"{folder}: {problem}")
        for path in run_folders(folder):
            paths.setdefault(path.resolve(), path)
    if not paths:
        names = " ".join(map(str, folders))
        raise ConfigError(f"{names}: no runs in it; python -m vitkd.train makes some")
    return [read_run(path) for path in sorted(paths.values())]


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders in and below `top`, and those named by the job records of a sweep there."""
    for folder, subfolders, files in os.walk(top):
        path = Path(folder)
        if "config.yaml" in files:
            yield path
        if "status.json" in files or "metrics.json" in files:
            subfolders.clear()
        subfolders[:] = sorted(s for s in subfolders if s not in FOLDERS_WITHOUT_RUNS and s[0] != ".")
        yield from recorded_folders(path)


def recorded_folders(sweep: Path) -> Iterator[Path]:
    """The run folders of the jobs of a sweep, whose folder is <outputs>/sweeps/<time>."""
    for record in sorted(sweep.glob("job-*.json")):
        folder = read_mapping(record).get("folder")
        if not isinstance(folder, str):
            continue
        # Relative to where the sweep was started: the working directory, or the parent of its outputs.
        for start in (Path(), sweep.resolve().parent.parent.parent):
            if (start / folder / "config.yaml").is_file():
                yield start / folder
                break


def read_run(path: Path) -> Run:
    """The run in the folder `path`, in whatever state; `problem` says what cannot be read."""
    folder = RunFolder(path)
    config = read_mapping(folder.config, parsing.parse_yaml)
    problem = "" if parsing.is_of_a_run(config) else "config.yaml is cut or not a run's"
    if not (folder.status.is_file() or folder.metrics.is_file()):
        return Run(path, "foreign", problem or "no status.json")
    other_version = version_problem(config)
    if other_version and (not problem or "version" in config):
        return Run(path, "incompatible", other_version)
    if problem:
        return Run(path, "damaged", problem)
    settings, state = parsing.settings_of(config), folder.state
    contents = folder.read_inputs().get("contents")
    settings["dataset.contents"] = parsing.one_line(contents) if isinstance(contents, str) else None
    status = read_mapping(folder.status)
    metrics = read_mapping(folder.metrics) if state == "done" else {}
    run = Run(
        path,
        state,
        parsing.one_line(status.get("error", "")),
        settings=comparable(settings),
        seed=config["seed"],
        dataset=str(settings.get("dataset.name")),
        method=option(settings, "method"),
        granularity=option(settings, "granularity"),
        loss=option(settings, "loss"),
        alpha=number(settings.get("alpha")),
        weighting=weighting_of(settings),
        finished=str(status.get("time", "")),
        fidelity=read_fidelity(path / "explain" / "fidelity.json"),
        is_teacher=bool(STORED_TEACHER.fullmatch(path.resolve().as_posix())),
        **{name: read(metrics.get(key)) for name, (key, read) in METRICS.items()},
    )
    if run.state == "done" and run.acc_last is None:
        return replace(run, state="damaged", problem="metrics.json is cut or not a run's")
    return run


def read_fidelity(path: Path) -> Fidelity | None:
    """The fidelity in the file `path`; None without the file, or if it names no epoch."""
    content = read_mapping(path)
    summary, epoch = content.get("summary"), content.get("epoch")
    divergence = number(summary.get("js_distilled")) if isinstance(summary, dict) else None
    return None if divergence is None or epoch not in ("best", "last") else Fidelity(divergence, epoch)
