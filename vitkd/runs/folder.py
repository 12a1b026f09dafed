"""What a run leaves on disk, and the promise that a half-written file never looks like a whole one."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from vitkd.errors import ConfigError

log = logging.getLogger("vitkd")


class RunFolder:
    """One run's folder and the names of the files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.status = path / "status.json"
        self.metrics = path / "metrics.json"
        self.log = path / "run.log"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.student = path / "student.safetensors"
        self.predictions = path / "test_predictions.npz"
        self.pictures = path / "attention.png"
        self.pairs = path / "pairs.json"

    @classmethod
    def claim(cls, path: Path) -> Self:
        """Make a new folder at `path`, or at `path`-2, -3, … where others have been before.

        `mkdir` decides, so two runs started in the same instant never share one.
        """
        number = 1
        while True:
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                candidate.mkdir(parents=True)
                return cls(candidate)
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ConfigError(f"{candidate}: no folder can be made there ({error.strerror})") from error

    @classmethod
    def existing(cls, path: Path) -> Self:
        """The finished run in `path`; ConfigError if there is none."""
        folder = cls(path)
        if not folder.config.is_file():
            raise ConfigError(f"run={path}: not a run folder (it has no config.yaml)")
        return folder

    @contextmanager
    def running(self, config: Mapping[str, Any]) -> Iterator[Self]:
        """Keep `status.json` and `run.log` while the body runs: running, then done, failed or stopped."""
        write_atomically(self.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
        self._set_status("running")
        try:
            yield self
        except (KeyboardInterrupt, SystemExit):
            # Lightning turns an interrupt into an exit.
            self._set_status("stopped")
            raise
        except BaseException as error:
            self._set_status("failed", error=f"{type(error).__name__}: {error}")
            raise
        else:
            self._set_status("done")
        finally:
            log.removeHandler(handler)
            handler.close()

    def read_config(self) -> dict[str, Any]:
        """The run's resolved configuration; ConfigError if it cannot be read."""
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"{self.config}: cannot be read as a run's configuration") from error
        if not isinstance(config, dict) or not isinstance(config.get("paths"), dict):
            raise ConfigError(f"{self.config}: cannot be read as a run's configuration, it is cut or foreign")
        return config

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write the flat `metrics.json`."""
        # JSON has no NaN.
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        write_atomically(self.metrics, json.dumps(plain, indent=2, allow_nan=False) + "\n")

    def read_metrics(self) -> dict[str, Any]:
        """The metrics of a finished run; ConfigError if it has none."""
        try:
            metrics = json.loads(self.metrics.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.metrics}: cannot be read; has the run finished?") from error
        if not isinstance(metrics, dict):
            raise ConfigError(f"{self.metrics}: cannot be read as a run's metrics, it is foreign")
        return metrics

    def _set_status(self, state: str, **more: str) -> None:
        status = {
            "state": state,
            "pid": os.getpid(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **more,
        }
        write_atomically(self.status, json.dumps(status, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
