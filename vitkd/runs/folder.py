"""A run's folder on disk: its files, its state, and a lock so that one process at a time works in it.

PyTorch is imported only to write: the report reads folders without it.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import yaml
from filelock import FileLock, Timeout

import vitkd
from vitkd.config.roles import first_difference
from vitkd.errors import ConfigError, RunError
from vitkd.runs.files import parse_yaml, read_mapping, read_plain, write_atomically, write_problem
from vitkd.runs.results import are_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from vitkd.methods.maps.granularity import BlockPair

log = logging.getLogger("vitkd")

VERSION = "version"
"""The entry of `config.yaml` that says which version of vitkd made the folder: no other reads it."""
STATES = ("done", "running", "stopped", "failed")
MADE_FROM = {
    "contents": "was made from other images",
    "teacher/weights": "learned from a teacher of other weights",
}
"""Entries of `inputs.json` that make two runs different ones, and how that is said."""

# A process that only tests whether the lock is free holds it for no longer than this.
LOCK_TEST_SECONDS = 1


class RunFolder:
    """One run's folder and the names of the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.inputs = path / "inputs.json"
        self.status = path / "status.json"
        self.metrics = path / "metrics.json"
        self.csv = path / "metrics.csv"
        self.log = path / "run.log"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.student = path / "student.safetensors"
        self.predictions = path / "test_predictions.npz"
        self.details = path / "test_details.json"
        self.pictures = path / "attention.png"
        self.pairs = path / "pairs.json"
        self.command = path / "command.json"
        self.stack = path / "stack.json"
        self._lock = FileLock(path / ".lock", timeout=0)

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Make a new folder at `path`, or at `path`-2, -3, … if those exist.

        `mkdir` decides, so two runs started at the same instant never share one.
        """
        for candidate in numbered(path):
            try:
                candidate.mkdir(parents=True)
                return cls(candidate)
            except FileExistsError:
                continue
            except OSError as error:
                problem = f"no folder can be made there ({error.strerror})"
                raise ConfigError(f"{candidate}: {problem}; set paths.outputs=DIR") from error
        raise AssertionError("unreachable: numbers never end")

    @classmethod
    def latest(
        cls, path: Path, config: Mapping[str, Any], inputs: Mapping[str, Any] | None = None
    ) -> Self | None:
        """The newest of the folders at `path`, `path`-2, … with such a run, as `difference` has it."""
        found, other = None, None
        for candidate in numbered(path):
            if not candidate.is_dir():
                break
            folder = cls(candidate)
            if not folder.config.is_file():
                continue
            if (difference := folder.difference(config, inputs or {})) is None:
                found = folder
            else:
                other = f"{candidate} {difference}"
        if found is None and other is not None:
            log.info("%s: starting a new run in a folder beside it", other)
        return found

    def difference(self, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> str | None:
        """Why the run here is not one of `config` and `inputs` by this version, in words, or None if it is.

        What is not known of its inputs, or of `inputs`, does not count.
        """
        written = self._read_config()
        if problem := version_problem(written):
            return f"was {problem.partition(';')[0]}"
        if setting := first_difference(written, config):
            return f"has another {setting.removesuffix('._target_')}"
        recorded = self.read_inputs()
        for name, difference in MADE_FROM.items():
            if None not in (pair := [recorded.get(name), inputs.get(name)]) and pair[0] != pair[1]:
                return difference
        return None

    @classmethod
    def existing(cls, path: Path) -> Self:
        """The finished run in `path`; ConfigError if there is none."""
        folder = cls(path)
        if not folder.config.is_file():
            raise ConfigError(f"run={path}: not a run folder (it has no config.yaml)")
        return folder

    @property
    def state(self) -> str:
        """`running`, `done`, `failed` or `stopped`; a killed run is `stopped`."""
        written = self._written_state()
        if written != "running":
            return written
        if self.is_locked:
            return "running"
        # It may have finished since the status was read.
        return "stopped" if (written := self._written_state()) == "running" else written

    @property
    def is_unmeasured(self) -> bool:
        """Whether it is done, but its metrics are lost: resumed, it measures them again."""
        return self.state == "done" and not are_metrics(read_mapping(self.metrics))

    def _written_state(self) -> str:
        written = read_mapping(self.status).get("state")
        return written if written in STATES else "running"

    @property
    def is_locked(self) -> bool:
        """Whether a process, perhaps this one, is at work here; asking locks it for an instant."""
        if not Path(self._lock.lock_file).exists():
            return False
        try:
            with FileLock(self._lock.lock_file, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:
            return False  # no permission to lock it, and a process running there would hold it already

    @contextmanager
    def running(self, config: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Iterator[Self]:
        """Keep `status.json` and `run.log` while the body runs: running, then done, failed or stopped.

        What it is made of is written first. Of a run's processes only the first writes. Raises ConfigError if
        another run is at work here, RunError if the disk takes no more or the folder is removed.
        """
        from vitkd.process.distributed import is_first  # imports PyTorch

        if not is_first():
            yield self
            return
        try:
            with self._lock.acquire(timeout=LOCK_TEST_SECONDS), self._recorded(config, inputs):
                yield self
        except Timeout as error:
            raise ConfigError(f"{self.path}: another process is at work there; let it finish") from error
        except OSError as error:
            if (problem := write_problem(error, self.path)) is None:
                raise
            raise RunError(f"{problem}, then resume by the same command with resume=auto") from error

    @contextmanager
    def _recorded(self, config: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> Iterator[None]:
        for partial in self.path.glob(".*.tmp"):
            partial.unlink()  # of an attempt that was killed while it wrote
        if inputs is not None:
            write_atomically(self.inputs, json.dumps(inputs, indent=2) + "\n")
        stamped = {VERSION: vitkd.__version__, **config}
        write_atomically(self.config, yaml.safe_dump(stamped, sort_keys=False, allow_unicode=True))
        handler = LogFile(self.log, encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        try:
            self._set_status("running")
            yield
            self.config.stat()  # a checkpoint makes a folder again that was removed
            self._set_status("done")
        except BaseException as error:
            if isinstance(error, Exception) and self._was_removed(error):
                lost = "was removed, or files in it, during the run; what they held is lost"
                raise RunError(f"{self.path}: {lost}, the same command trains it again") from error
            # On a full disk this cannot be written either; the first error is the one to report.
            with suppress(OSError):
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self._set_status("stopped")
                else:
                    self._set_status("failed", error=f"{type(error).__name__}: {error}")
            raise
        finally:
            log.removeHandler(handler)
            with suppress(OSError):
                handler.close()

    def _was_removed(self, error: Exception) -> bool:
        missing = error if isinstance(error, FileNotFoundError) else error.__cause__
        if isinstance(missing, FileNotFoundError) and missing.filename:
            return self.path in Path(os.fsdecode(missing.filename)).parents
        return not self.config.exists()

    def read_config(self) -> dict[str, Any]:
        """The run's resolved configuration.

        Raises ConfigError if it cannot be read or is of another version of vitkd.
        """
        config = self._read_config()
        if problem := version_problem(config):
            raise ConfigError(f"run={self.path}: {problem}")
        return {key: value for key, value in config.items() if key != VERSION}

    def _read_config(self) -> dict[str, Any]:
        problem = f"{self.config}: cannot be read as a run's configuration"
        try:
            config = read_plain(self.config, parse_yaml)
        except (OSError, ValueError) as error:
            raise ConfigError(problem) from error
        if not isinstance(config, dict) or not isinstance(config.get("paths"), dict):
            raise ConfigError(f"{problem}, it is cut or not vitkd's")
        return config

    def read_inputs(self) -> dict[str, Any]:
        """What the run is made of besides its settings, as `vitkd.runs.inputs` has it; empty if unknown."""
        return read_mapping(self.inputs)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the flat `metrics.json`."""
        # JSON has no NaN.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        write_atomically(self.metrics, json.dumps(plain, indent=2, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """The metrics of a finished run; ConfigError if it has none."""
        try:
            metrics = read_plain(self.metrics)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.metrics}: cannot be read; has the run finished?") from error
        if not are_metrics(metrics):
            raise ConfigError(f"{self.metrics}: cannot be read as a run's metrics, it is not vitkd's")
        return dict(metrics)

    def write_pairs(self, pairs: "Sequence[BlockPair]") -> None:
        """Write which student map learned from which teacher maps."""
        write_atomically(self.pairs, json.dumps([asdict(pair) for pair in pairs], indent=2) + "\n")

    def write_details(self, details: Mapping[str, Any]) -> None:
        """Write how the student does on each class and at each confidence (`vitkd.evaluate.measure`)."""
        write_atomically(self.details, json.dumps(details, allow_nan=False) + "\n")

    def write_predictions(self, predictions: "Mapping[str, Tensor]") -> None:
        """Write the classes [N] of all test images by each model and by label, in the split's order."""
        arrays: dict[str, Any] = {name: p.numpy().astype(np.int32) for name, p in predictions.items()}
        np.savez_compressed(self.predictions, **arrays)

    def _set_status(self, state: str, **more: str) -> None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "pid": os.getpid(), "time": time, **more}
        write_atomically(self.status, json.dumps(status, indent=2) + "\n")


class LogFile(logging.FileHandler):
    """Drops lines that a full disk does not take: the next write that matters reports the error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Nothing; logging would print a traceback a line."""


def version_problem(config: Mapping[str, Any]) -> str | None:
    """Why the run of a configuration in a run folder cannot be read, or None if this version made it."""
    made_by = config.get(VERSION)
    if made_by == vitkd.__version__:
        return None
    if made_by is None:
        return f"made by a vitkd that left no version, this is {vitkd.__version__}; train it again to read it"
    made_by = " ".join(str(made_by).split())[:20]
    return f"made by vitkd {made_by}, this is {vitkd.__version__}; install that version to read it"


def numbered(path: Path) -> Iterator[Path]:
    """`path`, `path`-2, `path`-3, …"""
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")
