"""Checkpoints that survive a crash, a full disk and a flipped bit; nothing is ever unpickled.

A checkpoint is written to a temporary file, flushed to disk and renamed; the previous one is kept. The
folder's SHA256SUMS (in sha256sum's format) is written before the renames, so at every instant some file holds
a complete checkpoint whose digest is listed, under either name.
"""

import hashlib
import io
import logging
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from vitkd.errors import ConfigError, RunError
from vitkd.models import Model, build_from_header, digest, load_model, read_header
from vitkd.models.base import file_of
from vitkd.runs.files import (
    NO_ROOM,
    file_digest,
    force_names_to_disk,
    force_to_disk,
    read_limited,
    write_atomically,
)

log = logging.getLogger("vitkd")

SUMS = "SHA256SUMS"


class DurableCheckpointIO(CheckpointIO):
    """How Lightning's Trainer writes and reads checkpoints here."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *_: Any, **__: Any) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def previous(path: Path) -> Path:
    """Where the checkpoint that `path` replaced is kept."""
    return path.with_name(f"previous-{path.name}")


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Put `content` at `path`, keeping what was there as `previous(path)`.

    Raises RunError if the disk does not take it; then `path` is as it was.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            force_to_disk(file)
        listed, old = _read_sums(path.parent), file_digest(path)
        sums = {name: digest for name, digest in listed.items() if path.with_name(name).exists()}
        # The file's own digest: an interrupted write may have listed one that never got its name.
        kept = old if path.name not in listed or old in listed.values() else None
        if kept:
            sums[previous(path).name] = kept
        sums[path.name] = hashlib.sha256(data).hexdigest()
        lines = (f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        write_atomically(path.with_name(SUMS), "".join(lines))
        if kept:
            path.replace(previous(path))
        temporary.replace(path)
        force_names_to_disk(path.parent)
    except OSError as error:
        fix = "make room" if error.errno in NO_ROOM else "fix that"
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); the previous checkpoint is valid: {fix}, and the"
            " same command with resume=auto resumes from it"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Raises ConfigError if it is absent, damaged, or holds anything but plain data and tensors.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    sums = _read_sums(path.parent)
    if path.name in sums and hashlib.sha256(data).hexdigest() not in sums.values():
        raise ConfigError(f"{path}: is damaged, its sha256 is not in {SUMS} beside it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # Foreign bytes make the unpickler raise almost anything.
    except Exception as error:
        raise ConfigError(f"{path}: refused, it is damaged or holds code instead of plain weights") from error
    parts = {"model": dict, "state_dict": dict, "epoch": int}
    if not isinstance(content, dict) or not all(isinstance(content.get(k), t) for k, t in parts.items()):
        raise ConfigError(f"{path}: is not a checkpoint of vitkd's")
    return content


def newest_good(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint at `path`, else the one that it replaced, else None.

    A damaged one is renamed, with a warning, so that it never replaces a valid one.
    """
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            return candidate, read_checkpoint(candidate)
        except ConfigError as error:
            digest = file_digest(candidate)
            if digest is None or digest in _read_sums(path.parent).values():
                raise  # the file is complete: the problem is elsewhere and may be temporary
            renamed = candidate.replace(candidate.with_name(f"{candidate.name}.damaged"))
            log.warning("warning: %s; it is now %s", error, renamed.name)
    return None


def load_from_checkpoint(path: Path) -> tuple[Model, int]:
    """The trained model of a checkpoint, in eval mode, and the epoch (from 1) after which it was saved."""
    content = read_checkpoint(path)
    named = [(str(name).partition("model."), value) for name, value in content["state_dict"].items()]
    weights = {name: value for (before, prefix, name), value in named if prefix and not before}
    return build_from_header(content["model"], path, weights).float().eval(), content["epoch"] + 1


def load_any(path: Path) -> Model:
    """The model in a run folder, a .safetensors file or a .ckpt file, in eval mode on the CPU."""
    file = model_file(path)
    return load_model(file) if file.suffix == ".safetensors" else load_from_checkpoint(file)[0]


def model_file(path: Path) -> Path:
    """The file that `load_any` reads; ConfigError if it is missing."""
    file = file_of(path)
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; give a run folder, a .safetensors or a .ckpt file")
    return file


def digest_at(path: Path) -> str | None:
    """The digest of the model that `load_any` reads from `path`; None if there is none."""
    with suppress(ConfigError):
        return read_header(path).get("digest") or digest(load_any(path))
    return None


def _read_sums(folder: Path) -> dict[str, str]:
    """File name → digest; empty if there is no list, or none that can be read."""
    try:
        text = read_limited(folder / SUMS).decode(errors="replace")
    except OSError:
        return {}
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {line[1].strip(): line[0] for line in lines if len(line) == 2}
