"""Decoded images, kept beside their files so that only the first start has to decode them."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import Tensor

import vitkd
from vitkd.data.staging import move_into_place, staging_folder

_PIXELS = "pixels.npy"

log = logging.getLogger(__name__)


def kept_pixels(
    folder: Path, paths: Sequence[str], shape: tuple[int, ...], decode: Callable[[], Tensor]
) -> Tensor:
    """What `decode` makes of the files at `paths`, relative to `folder`: uint8 of this shape.

    It is kept in a hidden folder beside `folder`, named after what it was made from; several processes that
    need it decode it once. A folder of older files, or of another shape, is removed. Where nothing can be
    written, it is decoded every time. Raises what `decode` does.
    """
    prefix = f".decoded-{folder.name}-"
    kept = folder.with_name(prefix + _key(folder, paths, shape))
    pixels = _read(kept, shape)
    if pixels is not None:
        return pixels
    try:
        with staging_folder(kept, "decoding") as stage:
            pixels = _read(kept, shape)  # another process may have been faster
            if pixels is None:
                log.info("decoding %s images in %s, once", f"{len(paths):,}", folder)
                pixels = decode()
                _write(pixels, stage / "decoded")
                for older in folder.parent.glob(f"{prefix}*"):
                    shutil.rmtree(older)
                move_into_place(stage / "decoded", kept)
    except OSError as error:
        log.info("%s: decoded images are not kept (%s)", kept, error.strerror)
    return decode() if pixels is None else pixels


def _key(folder: Path, paths: Sequence[str], shape: tuple[int, ...]) -> str:
    """A short hash of the shape, of the files' names, sizes and times, and of the code that decodes them."""
    statuses = ((path, (folder / path).stat()) for path in paths)
    files = [(path, status.st_size, status.st_mtime_ns) for path, status in statuses]
    facts = (shape, files, PIL.__version__, vitkd.__version__)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _read(folder: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The kept pixels; None if there are none, or they are damaged."""
    try:
        pixels = np.load(folder / _PIXELS)
    except (OSError, ValueError, EOFError):
        return None
    return torch.from_numpy(pixels) if (pixels.shape, pixels.dtype) == (shape, np.uint8) else None


def _write(pixels: Tensor, folder: Path) -> None:
    """Write to the disk itself: a power cut must not leave a complete name with incomplete content."""
    folder.mkdir()
    with (folder / _PIXELS).open("wb") as out:
        np.save(out, pixels.numpy())
        out.flush()
        os.fsync(out.fileno())
