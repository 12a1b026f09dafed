"""Run folders, read from outside: what was set, what came of it, and which folders are none.

Reads config.yaml, status.json and metrics.json, a few milliseconds a run, and nothing of PyTorch: a report on
hundreds of runs takes seconds.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from filelock import FileLock, Timeout

from vitkd.errors import ConfigError
from vitkd.runs.older import completed

Value: TypeAlias = str | int | float | bool | None
Setting: TypeAlias = dict[str, Value]

# As vitkd.runs.folder has it, whose import takes PyTorch with it.
IMMATERIAL = {"paths", "name", "resume", "sweep", "checkpoint_minutes", "pictures_every_n_epochs"}

# How fast and how closely watched, not what is learned.
HOW = {
    *("log_every_n_steps", "cuda_graph", "compile"),
    *("trainer.accelerator", "trainer.strategy", "trainer.deterministic"),
    *("teacher.cache", "teacher.cache_gib"),
    *("dataset.eval_batch_size", "dataset.resident_limit_gib", "dataset.workers", "dataset.download"),
    # What trainer.max_epochs and teacher.max_epochs are unless told otherwise.
    "dataset.max_epochs",
}
NO_RUNS_INSIDE = {"checkpoints", "stacks", "sweeps", "report", "explain"}
GROUPS = ("dataset", "student", "method", "trainer")
STATES = ("done", "running", "stopped", "failed")

STORED_TEACHER = re.compile(r"[0-9a-f]{12}(\.unfinished(-\d+)?)?")
RECORD = "job-*.json"

MOST_SETTINGS = 2_000
"""Real configurations have a hundred; YAML's aliases can say more than fits into memory."""

MOST_BYTES = 1 << 20

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Fidelity(NamedTuple):
    """How far a student's attention lies from its teacher's own maps, as `vitkd.explain` measured it."""

    divergence: float
    """Jensen–Shannon, of the distilled maps, in nats a row"""
    epoch: str
    """of the student that was looked at: best | last"""


@dataclass(frozen=True)
class Run:
    """One run folder. Accuracies and agreements are in percent."""

    path: Path
    state: str
    """done | running | stopped, which a killed one is too | failed | damaged | foreign"""
    problem: str = ""
    """in words, where `state` is not enough"""
    setting: Setting = field(default_factory=dict)
    """dotted name → value: everything that is set and changes figures, but the seed"""
    seed: int = 0
    dataset: str = ""
    method: str = ""
    granularity: str | None = None
    loss: str | None = None
    alpha: float | None = None
    acc_last: float | None = None
    """on the test split, at the last epoch"""
    acc_best: float | None = None
    """on the test split, at the epoch that was best on validation"""
    agreement: float | None = None
    """with the teacher, on the test split, at the last epoch"""
    wall_seconds: float | None = None
    epochs: int | None = None
    steps: int | None = None
    stacked: int | None = None
    """how many students trained together, if it was not alone"""
    teacher: str | None = None
    """a digest of its weights"""
    teacher_acc: float | None = None
    parameters: int | None = None
    finished: str = ""
    """when its state was written, ISO 8601"""
    fidelity: Fidelity | None = None
    """where somebody measured it"""
    is_teacher: bool = False
    """of the teacher store: no arm of any experiment"""

    @property
    def curves(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def is_done(self) -> bool:
        return self.state == "done"

    @property
    def attention_weight(self) -> float:
        """How much where the teacher looks counts beside what it says; above 0 for method=token alone."""
        return number(self.setting.get("method.attention_weight")) or 0.0

    @property
    def is_student_alone(self) -> bool:
        """Whether it trained on labels alone: without a method, or with all of the weight on them."""
        return self.method == "none" or self.alpha == 1


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs in and below `folders`, each once, in the order of their paths.

    Raises ConfigError if one of the folders does not exist, or if there is no run at all.
    """
    folders = list(folders)
    paths: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            what = "is a file; name a folder" if folder.exists() else "there is no such folder"
            raise ConfigError(f"{folder}: {what}")
        for path in run_folders(folder):
            paths.setdefault(path.resolve(), path)
    if not paths:
        raise ConfigError(f"{' '.join(map(str, folders))}: no runs in it; python -m vitkd.train makes some")
    return [read_run(path) for path in sorted(paths.values())]


def run_folders(top: Path) -> Iterator[Path]:
    """The run folders in and below `top`, and those that the records of a sweep there name."""
    for place, inside, files in os.walk(top):
        path = Path(place)
        if "config.yaml" in files:
            yield path
        if "status.json" in files or "metrics.json" in files:
            inside.clear()
        inside[:] = sorted(name for name in inside if name not in NO_RUNS_INSIDE and name[0] != ".")
        if any(Path(name).match(RECORD) for name in files):
            yield from folders_on_record(path)


def folders_on_record(sweep: Path) -> Iterator[Path]:
    """The run folders of the jobs of a sweep, which lies in <outputs>/sweeps/<time>."""
    for record in sorted(sweep.glob(RECORD)):
        told = read_json(record).get("folder")
        if not isinstance(told, str):
            continue
        # As seen from where the sweep was started: here, or where its outputs lie.
        for start in (Path(), sweep.resolve().parent.parent.parent):
            if (start / told / "config.yaml").is_file():
                yield start / told
                break


def read_run(path: Path) -> Run:
    """The run in the folder `path`, in whatever state; what cannot be read says so in its `problem`."""
    config = read_config(path / "config.yaml")
    written = any((path / name).is_file() for name in ("status.json", "metrics.json"))
    if config is None or not written:
        why = "has no status.json" if config else "its config.yaml is cut or not a run's"
        return Run(path, "foreign" if not written else "damaged", why)
    setting = flatten(completed(config))
    assert setting is not None
    status = read_json(path / "status.json")
    run = Run(
        path,
        state_of(path, status),
        one_line(status.get("error", "")),
        setting=material(setting),
        seed=config["seed"],
        dataset=str(setting.get("dataset.name")),
        method=option(setting, "method"),
        granularity=option(setting, "granularity"),
        loss=option(setting, "loss"),
        alpha=number(setting.get("alpha")),
        finished=str(status.get("time", "")),
        is_teacher=is_stored_teacher(path),
    )
    if not run.is_done:
        return run
    metrics = read_json(path / "metrics.json")
    if (last := percent(metrics.get("test/acc_last"))) is None:
        return replace(run, state="damaged", problem="its metrics.json is cut or not a run's")
    return replace(
        run,
        acc_last=last,
        acc_best=percent(metrics.get("test/acc_best")),
        agreement=percent(metrics.get("test/teacher_agreement")),
        wall_seconds=number(metrics.get("wall_seconds")),
        epochs=whole(metrics.get("epochs")),
        steps=whole(metrics.get("steps")),
        stacked=whole(metrics.get("stack/students")),
        teacher=one_line(metrics.get("teacher/weights") or "") or None,
        teacher_acc=percent(metrics.get("teacher/test_acc")),
        parameters=whole(metrics.get("student/parameters")),
        fidelity=read_fidelity(path / "explain" / "fidelity.json"),
    )


def read_config(path: Path) -> dict[str, Any] | None:
    """A run's resolved configuration; None if the file holds anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(config, dict) or not all(isinstance(config.get(name), dict) for name in GROUPS):
        return None
    alpha, seed = config.get("alpha"), config.get("seed")
    is_run = type(seed) is int and (alpha is None or number(alpha) is not None)
    return config if is_run and flatten(config) is not None else None


def flatten(config: Mapping[Any, Any]) -> Setting | None:
    """Nested settings as dotted names → values, lists as JSON; None for more than any run has."""
    flat: Setting = {}
    waiting: list[tuple[str, Any]] = [("", config)]
    looked_at = 0
    while waiting:
        prefix, node = waiting.pop()
        if (looked_at := looked_at + 1) > MOST_SETTINGS:
            return None
        if isinstance(node, Mapping):
            waiting += [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
        elif isinstance(node, list):
            try:
                text = json.dumps(node, default=str)
            except (ValueError, RecursionError):
                return None
            if len(text) > MOST_BYTES:
                return None
            flat[prefix] = text
        else:
            flat[prefix] = node if isinstance(node, Value) else str(node)
    return flat


def material(setting: Setting) -> Setting:
    """What changes figures, but the seed.

    Null is as good as not being there: a run of an earlier version lacks what is null by default since.
    """
    kept = {
        name: value
        for name, value in setting.items()
        if value is not None and name.partition(".")[0] not in IMMATERIAL | {"seed"} and name not in HOW
    }
    return dict(sorted(kept.items()))


def option(setting: Setting, group: str) -> str:
    """What is chosen in a group, as typed: `reverse_kl` for vitkd.methods.maps.losses.ReverseKL."""
    name = str(setting.get(f"{group}._target_", "")).rpartition(".")[2]
    name = name.removesuffix("Distillation") if group == "method" else name
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return "none" if group == "method" and words == "no" else words


def is_stored_teacher(path: Path) -> bool:
    """Whether the folder is one of <outputs>/teachers/<data set>/<fingerprint>."""
    place = path.resolve()
    return place.parent.parent.name == "teachers" and bool(STORED_TEACHER.fullmatch(place.name))


def state_of(path: Path, status: Mapping[str, Any]) -> str:
    """As vitkd.runs.folder: `running` only while a process holds the folder's lock."""
    written = status.get("state")
    if written in STATES and written != "running":
        return str(written)
    return "running" if is_locked(path / ".lock") else "stopped"


def is_locked(lock: Path) -> bool:
    """Whether a process is at work; looking takes the lock for an instant, which runs allow for."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # not ours to lock: whoever runs there would have locked it


def read_fidelity(path: Path) -> Fidelity | None:
    """What the file `path` says; None without it, and where it tells not of which epoch it speaks."""
    told = read_json(path)
    summary, epoch = told.get("summary"), told.get("epoch")
    divergence = number(summary.get("js_distilled")) if isinstance(summary, dict) else None
    return None if divergence is None or epoch not in ("best", "last") else Fidelity(divergence, epoch)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one for a file that is absent, cut or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    return value if type(value) is int else None


def percent(value: Any) -> float | None:
    """A share in 0..1 as a percentage; None for anything else."""
    share = number(value)
    return 100 * share if share is not None and 0 <= share <= 1 else None


def one_line(value: Any) -> str:
    """Text on one line, at most a terminal's."""
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:199]}…"
