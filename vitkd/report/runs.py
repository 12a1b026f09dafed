"""Finds and reads run folders: settings, state and metrics.

PyTorch is not imported and a run takes a few milliseconds, so a report on hundreds of runs takes seconds.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vitkd.errors import ConfigError
from vitkd.report import parsing
from vitkd.report.parsing import Curves, Details, Settings, number
from vitkd.report.settings import CONSTANT, comparable, option, weighting_of
from vitkd.runs.files import parse_yaml, read_mapping, read_plain
from vitkd.runs.folder import RunFolder, version_problem

STORED_TEACHER = re.compile(r".*/teachers/[^/]+/[0-9a-f]{12}(\.unfinished(-\d+)?)?")
"""<outputs>/teachers/<data set>/<fingerprint>"""

METRICS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "acc_last": ("test/acc_last", parsing.percent),
    "acc_best": ("test/acc_best", parsing.percent),
    "acc_top5": ("test/acc_top5", parsing.percent),
    "f1_macro": ("test/f1_macro", parsing.percent),
    "ece": ("test/ece", parsing.percent),
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
    """done | running | stopped (also if killed) | failed | damaged | incompatible | foreign | debug"""
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
    acc_top5: float | None = None
    """test accuracy of the five likeliest classes at the last epoch; None for five classes or fewer"""
    f1_macro: float | None = None
    """mean F1 of the classes at the last epoch, in percent"""
    ece: float | None = None
    """expected calibration error at the last epoch, in percentage points"""
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
    command: tuple[str, ...] | None = None
    """arguments of `python -m vitkd.train` that started it, if they are known"""
    is_teacher: bool = False
    """whether it belongs to the teacher store, and so to no arm"""

    @cached_property
    def curves(self) -> Curves:
        return parsing.read_curves(self.path / "metrics.csv")

    @cached_property
    def details(self) -> Details | None:
        """By class and by confidence; None for a run that left none."""
        return parsing.read_details(self.path / "test_details.json")

    @property
    def attention_weight(self) -> float:
        """Weight of the attention loss beside another transfer loss; above 0 for method=token only."""
        return number(self.settings.get("method.attention_weight")) or 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Of method=together: its parts and their weights."""
        names = parsing.entries(self.settings.get("method.parts"))
        weights = parsing.entries(self.settings.get("method.weights")) or [1.0] * len(names)
        return {parsing.one_line(n): number(w) or 0.0 for n, w in zip(names, weights, strict=False)}

    @property
    def is_merged(self) -> bool:
        """Whether it is made of several students that were trained before."""
        return option(self.settings, "student") == "merged"

    @property
    def is_student_alone(self) -> bool:
        """Whether it is one student that had labels alone: no method, or alpha = 1 throughout.

        Neither copies nor ViTs of regions depend on alpha.
        """
        is_taught = self.method in ("copy", "regions") or self.alpha != 1 or self.weighting != CONSTANT
        return not self.is_merged and (self.method == "none" or not is_taught)


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
    """The run folders in and below `top`, and those named by the job records of a sweep there.

    Whatever its name is, a folder with a configuration and a state or metrics is one; with a configuration
    alone it is named as foreign, unless it is hidden or in a run: programs keep settings of their own there.
    """
    runs: set[str] = set()
    for folder, subfolders, files in os.walk(top):
        path, names = Path(folder), {*files, *subfolders}
        parent, name = os.path.split(folder)
        if "config.yaml" in names:
            if names & {"status.json", "metrics.json"}:
                runs.add(folder)
                yield path
            elif parent not in runs and not name.startswith("."):
                yield path
        # Weights & Biases keeps a config.yaml of its own below a run.
        subfolders[:] = sorted(name for name in subfolders if (name, folder in runs) != ("wandb", True))
        yield from recorded_folders(path)


def recorded_folders(sweep: Path) -> Iterator[Path]:
    """The run folders of the jobs of a sweep, whose folder is <outputs>/sweeps/<time>."""
    for record in sorted(sweep.glob("job-*.json")):
        folder = read_mapping(record).get("folder")
        if not isinstance(folder, str):
            continue
        # Relative to where the sweep was started: the working directory, or the parent of its outputs.
        for start in (Path(), sweep.resolve().parent.parent.parent):
            # Path.is_file raises for a name that is too long.
            if os.path.isfile(start / folder / "config.yaml"):  # noqa: PTH113
                yield start / folder
                break


def read_run(path: Path) -> Run:
    """The run in the folder `path`, in whatever state; `problem` says what cannot be read."""
    folder = RunFolder(path)
    config = read_mapping(folder.config, parse_yaml)
    problem = "" if parsing.is_of_a_run(config) else "config.yaml is cut or not a run's"
    if not (os.path.lexists(folder.status) or os.path.lexists(folder.metrics)):
        return Run(path, "foreign", problem or "no status.json")
    other_version = version_problem(config)
    if other_version and (not problem or "version" in config):
        return Run(path, "incompatible", other_version)
    if problem:
        return Run(path, "damaged", problem)
    if config.get("debug"):
        return Run(path, "debug", f"debug={parsing.one_line(config['debug'])} is no result")
    settings, state, place = parsing.settings_of(config), folder.state, path.resolve().as_posix()
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
        command=read_command(folder.command),
        # A run may have been given such a name.
        is_teacher=config.get("name") != path.name and bool(STORED_TEACHER.fullmatch(place)),
        **{name: read(metrics.get(key)) for name, (key, read) in METRICS.items()},
    )
    if run.state == "done" and run.acc_last is None:
        return replace(run, state="damaged", problem="metrics.json is cut or not a run's")
    return run


def read_command(path: Path) -> tuple[str, ...] | None:
    """The arguments in the file `path`; None without it, or if something else is in it."""
    with suppress(OSError, ValueError):
        arguments = read_plain(path)
        if isinstance(arguments, list) and all(isinstance(a, str) and a.isprintable() for a in arguments):
            return tuple(arguments)
    return None


def read_fidelity(path: Path) -> Fidelity | None:
    """The fidelity in the file `path`; None without the file, or if it names no epoch."""
    content = read_mapping(path)
    summary, epoch = content.get("summary"), content.get("epoch")
    divergence = number(summary.get("js_distilled")) if isinstance(summary, dict) else None
    return None if divergence is None or epoch not in ("best", "last") else Fidelity(divergence, epoch)
