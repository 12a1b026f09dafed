"""Where a run's curves go besides metrics.csv: what every option in conf/logger/ is."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitkd.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


class LoggedRun(NamedTuple):
    """What a logger learns about the run that it is opened for."""

    folder: Path
    name: str
    """the folder below `paths.outputs`"""
    settings: Mapping[str, Any]
    """all of them, resolved and nested, as in config.yaml"""
    start: int
    """the step to resume from, 0 for a new run"""
    rows: Mapping[int, Mapping[str, float]]
    """step → the values of its curves up to `start`"""
    logged: Mapping[int, Collection[str]]
    """step → the curves that an interrupted attempt has logged after `start`"""


@dataclass
class LoggerOption(ABC):
    """One logger of a run; its fields are the keys of its file in `conf/logger/`."""

    def check_ready(self) -> None:  # noqa: B027, most need nothing
        """ConfigError if it cannot log on this machine, as it is set."""

    @abstractmethod
    def open(self, run: LoggedRun) -> "Logger":
        """The logger of a run, which may be a resumed one."""


def check_installed(option: str, package: str) -> None:
    """ConfigError unless `package`, which `logger=option` stands on, can be imported."""
    spec = find_spec(package)
    # A folder of that name is a package without origin.
    if spec is None or spec.origin is None:
        raise ConfigError(f"logger={option}: needs {package}, which is absent; pip install 'vitkd[{option}]'")
