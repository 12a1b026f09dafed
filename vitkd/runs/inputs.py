"""What a run is made of besides its settings: images, classes and the weights of its teacher.

A run folder's `inputs.json` holds it from before training on. A run that is made of something else is neither
resumed nor "done before".
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vitkd.config.run import Config
from vitkd.data import ImageDataModule
from vitkd.data.contents import FileHashes
from vitkd.errors import ConfigError
from vitkd.models import Model, digest, read_header
from vitkd.runs.checkpoints import digest_at
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder
from vitkd.runs.teacher_store import store_of

log = logging.getLogger("vitkd")

HASHES = ".image_hashes.json"
"""The file below `paths.outputs` that keeps the hashes of image files."""


def contents_of(config: Config, run: RunFolder | None = None) -> str | None:
    """The data set's `contents`; the hashes of its files are kept if `paths.outputs` exists.

    Those of a `run` that was trained before are found wherever it lies now, and nothing is written.
    """
    folders = run.path.resolve().parents if run else [Path(config.paths.outputs)]
    known = next(filter(None, (_read_hashes(folder / HASHES) for folder in folders)), {})
    before = json.dumps(known)
    contents = config.dataset.contents(Path(config.paths.data), known)
    if not run and (text := json.dumps(known)) != before:
        with suppress(OSError):
            write_atomically(folders[0] / HASHES, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    return contents


def known_hashes(config: Config) -> FileHashes:
    """The hashes of image files that are kept for the run of a configuration."""
    return _read_hashes(Path(config.paths.outputs, HASHES))


def _read_hashes(place: Path) -> FileHashes:
    """The hashes in the file `place`; none if it is absent or damaged."""
    try:
        checksum, _, text = place.read_text().partition("\n") if place.is_file() else ("", "", "")
        return json.loads(text) if checksum == hashlib.sha256(text.encode()).hexdigest() else {}
    except (OSError, ValueError, RecursionError):
        return {}


def known_inputs(config: Config, contents: str | None) -> dict[str, Any]:
    """As much of `inputs_of` as tells runs apart and is known before the teacher is trained."""
    given = config.teacher.checkpoint if config.method.needs_teacher else None
    place = Path(given) if given else store_of(config, contents)
    return {"contents": contents, "teacher/weights": place and digest_at(place)}


def inputs_of(
    config: Config, data: ImageDataModule, contents: str | None, teacher: Model | None
) -> dict[str, Any]:
    """What `inputs.json` holds of a run on `data` with this teacher."""
    store = store_of(config, contents) if teacher else None
    return {
        "contents": contents,
        **{f"images/{split}": count for split, count in data.counts.items()},
        "class_names": data.class_names,
        "teacher/weights": digest(teacher) if teacher else None,
        "teacher/fingerprint": store.name if store else None,
    }


def class_names(inputs: Mapping[str, Any]) -> list[str]:
    """The class names in `inputs.json` or in a model's header, by label; empty if there are none."""
    names = inputs.get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def check_images(run: RunFolder, config: Config, data: ImageDataModule) -> bool:
    """Whether `data` holds the images that the run was made from; a warning says what differs.

    Raises ConfigError if its classes have other names, so that its labels would mean something else.
    """
    recorded, place = run.read_inputs(), getattr(config.dataset, "root", None) or config.dataset.name
    if other := _other_class(class_names(recorded), data.class_names):
        raise ConfigError(
            f"run={run.path}: in {place} {other}; name the images it was trained on by root=DIR"
        )
    contents = contents_of(config, run) if recorded.get("contents") else None
    if contents in (None, recorded.get("contents")):
        return True
    then = {split: recorded.get(f"images/{split}") for split in data.counts}
    counts = (", ".join(f"{n} {split}" for split, n in each.items()) for each in (then, data.counts))
    log.warning("warning: %s was made from other images: %s then, %s in %s", run.path, *counts, place)
    return False


def check_teacher_classes(config: Config, data: ImageDataModule) -> None:
    """Warn if the given teacher's classes are named otherwise than those of `data`."""
    if (given := config.teacher.checkpoint) is None or not config.method.needs_teacher:
        return
    if other := _other_class(class_names(read_header(Path(given))), data.class_names):
        log.warning("warning: teacher.checkpoint=%s: in %s %s", given, config.dataset.name, other)


def _other_class(names: Sequence[str], now: Sequence[str]) -> str | None:
    """The first class that has another name now, in words; None if there is none or `names` is empty."""
    pairs = enumerate(zip_longest(names, now)) if names else ()
    return next((f"class {i} is {new!r} and not {old!r}" for i, (old, new) in pairs if old != new), None)
