"""What many tests start from."""

import contextlib
import gc
import io
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from vitkd.models import ViTConfig
from vitkd.process.isolation import freeze_gc

GET_MODE = Hydra.get_mode

# Tensors here are tiny: a second thread costs more than it brings, above all where other work runs beside.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have most slow tests: a long one begun last would leave a worker idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Commands collect garbage at their end, in this process as well; elsewhere there is little of it."""
    freeze_gc()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What a benchmark or a command switches on would print in the next test of the same worker."""
    with logging_as_before():
        yield


@pytest.fixture
def tiny() -> Callable[..., ViTConfig]:
    """Makes a small shape with 5 tokens; keyword arguments change it."""

    def make(**changes: object) -> ViTConfig:
        shape = {"image_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "embed_dim": 12}
        shape |= {"depth": 3, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
        return ViTConfig(**(shape | changes))

    return make


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session")
def command() -> Command:
    """command("train", "alpha=0.3") is `python -m vitkd.train alpha=0.3` without the seconds of imports."""

    def run(name: str, *arguments: str) -> Outcome:
        module = import_module(f"vitkd.{name}.__main__")
        out, err, code = io.StringIO(), io.StringIO(), 0
        streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with streams[0], streams[1], fresh_process(module.__name__, *arguments):
            try:
                module.main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Exception:
                code = 1
                traceback.print_exc()
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended well; whoever changes it works on a copy."""
    outputs = tmp_path_factory.mktemp("finished")
    briefly = [
        "trainer.max_epochs=1",
        "teacher.max_epochs=1",
        "trainer.limit_train_batches=1",
        "teacher.trainer.limit_train_batches=1",
    ]
    ended = command("train", *briefly, f"paths.outputs={outputs}", "name=run")
    assert ended.code == 0, ended.err
    return outputs / "digits" / "run"


@pytest.fixture(scope="session")
def process() -> Command:
    """As `command`, by a new interpreter; the keyword `cwd` is its working folder."""

    def run(name: str, *arguments: str, cwd: Path) -> Outcome:
        line = [sys.executable, "-m", f"vitkd.{name}", *arguments]
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@contextlib.contextmanager
def fresh_process(*argv: str) -> Iterator[None]:
    """What a command finds when it starts, and nothing of what it leaves in the process when it ends."""
    on_termination = signal.getsignal(signal.SIGTERM)
    with logging_as_before(), mock.patch.dict(os.environ), mock.patch.object(sys, "argv", [*argv]):
        # They write to where stdout was when they were made.
        logging.getLogger("vitkd").handlers.clear()
        GlobalHydra.instance().clear()
        try:
            with mock.patch.object(Hydra, "get_mode", mode_asked_for):
                yield
        finally:
            signal.signal(signal.SIGTERM, on_termination)
            GlobalHydra.instance().clear()


def mode_asked_for(hydra: Hydra, config_name: str, overrides: list[str]) -> RunMode | None:
    """For which Hydra composes everything once more, a third of many a test's time; few files set it."""
    may_be_set = any(override.startswith(("sweep", "experiment", "hydra", "+")) for override in overrides)
    return GET_MODE(hydra, config_name, overrides) if may_be_set else None


@contextlib.contextmanager
def logging_as_before() -> Iterator[None]:
    """Whatever happens to the loggers that a command sets up is undone at the end."""
    loggers = [logging.getLogger(name) for name in (None, "vitkd", "lightning.pytorch")]
    before = [(logger, logger.level, logger.propagate, [*logger.handlers]) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers[:] = handlers
