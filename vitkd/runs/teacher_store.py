"""Where the teacher comes from: a checkpoint, the store of teachers trained before, or training it now."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from filelock import AcquireReturnProxy, BaseFileLock, FileLock, Timeout

from vitkd.data import Dataset
from vitkd.errors import ConfigError
from vitkd.models import Model, ModelConfig
from vitkd.optim import AdamW, Schedule
from vitkd.process.distributed import agree, is_first
from vitkd.runs.checkpoints import load_any
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

# Raise it when a change to the code makes teachers trained before it different.
RECIPE_VERSION = 1

# Settings that say where and how fast, not what is learned.
IMMATERIAL = {"eval_batch_size", "resident_limit_gib", "workers", "download", "max_epochs", "root"}
IMMATERIAL_TO_TRAINER = {"accelerator", "strategy"}


class TeacherRun(Protocol):
    """The part of the configuration of a teacher's own run that determines the teacher."""

    student: ModelConfig
    dataset: Dataset
    optimizer: AdamW
    schedule: Schedule
    trainer: dict[str, Any]
    matmul_precision: str
    seed: int


def given_teacher(
    checkpoint: str | None, dataset: Dataset, otherwise: str = ", or none to train one"
) -> Model | None:
    """The teacher of `teacher.checkpoint`, or None if none was named.

    Raises ConfigError, whose advice ends in `otherwise`, if it cannot be read or was made for other images or
    classes.
    """
    if checkpoint is None:
        return None
    model = load_any(Path(checkpoint))
    for name in ("num_classes", "image_size", "channels"):
        found, expected = getattr(model.config, name), getattr(dataset, name)
        if found != expected:
            raise ConfigError(
                f"teacher.checkpoint={checkpoint}: has {name}={found}, {dataset.name} has {expected}; "
                f"name a teacher trained on this data set{otherwise}"
            )
    return model


def fingerprint(run: TeacherRun, contents: str | None) -> str:
    """A short hash of everything that determines the teacher that `run` trains.

    `contents` stands for the images themselves, where the data set's name does not.
    """
    data = {key: value for key, value in asdict(run.dataset).items() if key not in IMMATERIAL}
    facts = {
        "version": RECIPE_VERSION,
        "seed": run.seed,
        "model": run.student.facts(),
        "dataset": data | {"contents": contents},
        "optimizer": [type(run.optimizer).__name__, asdict(run.optimizer)],
        "schedule": [type(run.schedule).__name__, asdict(run.schedule)],
        "trainer": {k: v for k, v in run.trainer.items() if k not in IMMATERIAL_TO_TRAINER},
    }
    if run.matmul_precision != "highest":
        # Otherwise left out: the teachers trained before there was a choice keep their name.
        facts["matmul_precision"] = run.matmul_precision
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def stored_teacher(store: Path, settings: Mapping[str, Any], train: Callable[[RunFolder], object]) -> Model:
    """The teacher in the folder `store`; if it is not there yet, `train` makes it first.

    A lock keeps parallel runs from training it twice. The folder gets its name only when it is complete, so
    an interrupted training never passes for a teacher; the next run goes on with it, if `settings`, the
    teacher's own resolved configuration, are still the same.
    """
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{store.parent}: no folder can be made there ({error.strerror})") from error
    lock = FileLock(store.with_name(f"{store.name}.lock"))
    with acquired(lock) if is_first() else nullcontext():
        if agree(store.exists):
            log.info("teacher: reusing %s", store)
        else:
            log.info("no teacher yet: training it first, once; later runs reuse it")
            folder = RunFolder(agree(lambda: attempt(store, settings)))
            train(folder)
            agree(lambda: folder.path.rename(store))
        agree(lambda: remove_attempts(store))
    return load_any(store)


def attempt(store: Path, settings: Mapping[str, Any]) -> Path:
    """The folder to train in: that of an attempt that was cut off, else a new one."""
    unfinished = store.with_name(f"{store.name}.unfinished")
    return (RunFolder.latest(unfinished, settings) or RunFolder.claim(unfinished)).path


def remove_attempts(store: Path) -> None:
    """Remove what attempts at a teacher that is there by now have left."""
    for folder in store.parent.glob(f"{store.name}.unfinished*"):
        shutil.rmtree(folder)


def acquired(lock: BaseFileLock) -> AcquireReturnProxy:
    """The lock, taken; says so if another run has to finish first."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("teacher: another run is training it; waiting")
        return lock.acquire()
