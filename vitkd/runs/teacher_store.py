"""Where the teacher comes from: a checkpoint, the store of trained teachers, or training it now."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, BaseFileLock, FileLock, Timeout

import vitkd
from vitkd.config.roles import ABSENT, Separates, relevant
from vitkd.config.run import Config, name_in_job, teacher_run
from vitkd.data import Dataset
from vitkd.data.spec import differences
from vitkd.errors import ConfigError, naming
from vitkd.models import Model
from vitkd.process.distributed import agree, is_first
from vitkd.runs.checkpoints import load_any
from vitkd.runs.files import file_digest
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

FINGERPRINT = re.compile("[0-9a-f]{12}")
STORED = f"{'[0-9a-f]' * 12}/student.safetensors"
MOST_NAMED = 3
"""Settings that the line about a new teacher names; more follow as a number."""


def given_teacher(
    checkpoint: str | None, dataset: Dataset, otherwise: str = ", or none to train one"
) -> Model | None:
    """The teacher of `teacher.checkpoint`, or None if none was named.

    Raises ConfigError, which ends in `otherwise`, if it cannot be read or is for other images or classes.
    """
    if checkpoint is None:
        return None
    with naming("teacher.checkpoint="):
        model = load_any(Path(checkpoint))
    for name, found, expected in differences(dataset, model.config):
        raise ConfigError(
            f"teacher.checkpoint={checkpoint}: has {name}={found}, {dataset.name} has {expected}; "
            f"name a teacher trained on this data set{otherwise}"
        )
    return model


def fingerprint(run: Config, contents: str | None) -> str:
    """A short hash of everything that determines the teacher that `run` trains, the version of vitkd too.

    `contents` stands for the images themselves, where the data set's name does not; a hash does so for a file
    with weights to begin with, wherever that lies.
    """
    facts = {"settings": determining(run.resolved), "contents": contents, "version": vitkd.__version__}
    if run.student.weights_file is not None:
        facts["weights"] = file_digest(Path(run.student.weights_file))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def uses_store(config: Config) -> bool:
    """Whether a run learns from a stored teacher, which is trained first if need be."""
    source = config.teacher
    return config.method.needs_teacher and source.checkpoint is None and source.trained


def store_of(config: Config, contents: str | None) -> Path | None:
    """The folder of the stored teacher of a run, trained or not yet; None if it learns from no such one."""
    if not uses_store(config):
        return None
    own = teacher_run(config)
    return Path(config.outputs, "teachers", own.dataset.name, fingerprint(own, contents))


def determining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a teacher's own settings that determine it, by `group.key`; 0 and 0.0 are one value.

    How many devices there are is one, for each trains on batches of its own; which devices is none.
    """
    values = relevant(settings, Separates.TEACHERS)
    devices = values.get("trainer.devices")
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        values["trainer.devices"] = len(devices)
    return {name: float(value) if type(value) is int else value for name, value in values.items()}


def stored_teacher(store: Path, settings: Mapping[str, Any], train: Callable[[RunFolder], object]) -> Model:
    """The teacher in the folder `store`; if it does not exist yet, `train` makes it first.

    A lock keeps parallel runs from training it twice. The folder gets its name when it is complete, so an
    interrupted training is never taken for a teacher; the next run that needs this teacher resumes it,
    whatever its student learns. `settings` are the teacher's own resolved configuration.
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
            new = what_is_new(settings, stored_settings(store.parent))
            if not new and any(store.parent.glob(STORED)):
                new = f" of vitkd {vitkd.__version__}"
            log.info("no teacher yet%s: training it first, once; later runs reuse it", new)
            # The store's name is the fingerprint: whatever was begun here is the same teacher.
            folder = RunFolder(store.with_name(f"{store.name}.unfinished"))
            agree(lambda: folder.path.mkdir(exist_ok=True))
            train(folder)
            agree(lambda: folder.path.rename(store))
    return load_any(store)


def stored_settings(place: Path) -> list[dict[str, Any]]:
    """The settings of the teachers stored in the folder `place`, of those that can be read."""
    found = []
    for path in sorted(place.glob(STORED)):
        with suppress(ConfigError):
            found.append(RunFolder(path.parent).read_config())
    return found


def what_is_new(settings: Mapping[str, Any], stored: Iterable[Mapping[str, Any]]) -> str:
    """In which settings a teacher differs from the stored one that is most like it; empty without any."""
    wanted = ABSENT | determining(settings)
    others = [ABSENT | determining(each) for each in stored]
    if not others:
        return ""
    differing = [[n for n in {**wanted, **other} if wanted.get(n) != other.get(n)] for other in others]
    names, nearest = min(zip(differing, others, strict=True), key=lambda pair: len(pair[0]))
    if not names:
        return " for these images"
    # Where its class differs, settings that only the other has follow from that.
    names = [n for n in names if n in wanted] or names
    shown = [
        f"{name_in_job(n.removesuffix('._target_'))}={shown_value(wanted.get(n))}" for n in names[:MOST_NAMED]
    ]
    before = [shown_value(nearest.get(n)) for n in names[:MOST_NAMED]]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f" with {', '.join(shown)}{more} (the nearest stored one has {', '.join(before)})"


def shown_value(value: Any) -> str:
    """A setting's value as typed; of a class its name."""
    if isinstance(value, str):
        return value.rpartition(".")[2] if value.startswith("vitkd.") else value
    return f"{value:g}" if type(value) is float else json.dumps(value)


def acquired(lock: BaseFileLock) -> AcquireReturnProxy:
    """The lock, acquired; logs a line if another run has to finish first."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        log.info("teacher: another run is training it; waiting")
        return lock.acquire()
