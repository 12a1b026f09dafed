"""Where the teacher comes from: a checkpoint, the store of teachers trained before, or training it now."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from vitkd.data import Dataset
from vitkd.errors import ConfigError
from vitkd.models import ViT
from vitkd.runs.checkpoints import load_any
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

# Raise it when a change to the code makes teachers trained before it different.
RECIPE_VERSION = 1

# What determines a trained teacher, less what says only where and how fast.
DETERMINING = ("student", "dataset", "optimizer", "schedule", "trainer", "seed")
IMMATERIAL = {
    "dataset": {"eval_batch_size", "resident_limit_gib", "workers", "download", "max_epochs"},
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "enable_progress_bar"},
}


def given_teacher(checkpoint: str | None, dataset: Dataset) -> ViT | None:
    """The teacher of `teacher.checkpoint`, or None if none was named.

    Raises ConfigError if it cannot be read or was made for other images or classes.
    """
    if checkpoint is None:
        return None
    model = load_any(Path(checkpoint))
    for name in ("num_classes", "image_size", "channels"):
        found, expected = getattr(model.config, name), getattr(dataset, name)
        if found != expected:
            raise ConfigError(
                f"teacher.checkpoint={checkpoint}: has {name}={found}, {dataset.name} has {expected}; "
                "name a teacher trained on this data set, or none to train one"
            )
    return model


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short hash of everything that determines the model which a run with these settings trains."""
    facts: dict[str, Any] = {"version": RECIPE_VERSION}
    for group in DETERMINING:
        node = settings[group]
        if isinstance(node, Mapping):
            node = {name: value for name, value in node.items() if name not in IMMATERIAL.get(group, ())}
        facts[group] = node
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def stored_teacher(store: Path, train: Callable[[RunFolder], object]) -> ViT:
    """The teacher in the folder `store`; if it is not there yet, `train` makes it first.

    A lock keeps parallel runs from training it twice. The folder gets its name only when it is complete, so
    an interrupted training never passes for a teacher.
    """
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{store.parent}: no folder can be made there ({error.strerror})") from error
    with FileLock(store.with_name(f"{store.name}.lock")):
        if not store.exists():
            log.info("no teacher yet: training it first, once; later runs reuse it")
            folder = RunFolder.claim(store.with_name(f"{store.name}.unfinished"))
            train(folder)
            folder.path.rename(store)
        else:
            log.info("teacher: reusing %s", store)
    return load_any(store)
