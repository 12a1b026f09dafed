"""The images of one official split, in memory or as files, and how to hold out a part of them."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vitkd.data.decoded import kept_pixels
from vitkd.data.decoding import decode
from vitkd.data.hashing import fold, key_of

_DECODING_THREADS = 8
# Images that a thread decodes before another has its turn: small ones take less time than to change turns.
_AT_ONCE = 16


@dataclass
class Split:
    """Images in memory.

    Args:
        labels: [N] int64.
        class_names: the name of each class, by label.
        images: [N, C, H, W] uint8.
    """

    labels: Tensor
    class_names: list[str]
    images: Tensor

    resident = True
    """Whether all pixels are kept in memory."""

    def __len__(self) -> int:
        return len(self.labels)

    def read_all(self) -> Tensor:
        """[N, C, H, W] uint8."""
        return self.images

    def random_keys(self, seed: int) -> Tensor:
        """[N] int64: a random number for each image, from its position in the split."""
        return fold(key_of(seed), torch.arange(len(self)))


@dataclass
class FileSplit:
    """Images in files, which are converted to greyscale or RGB, resized and centre-cropped when read.

    Args:
        labels: [N] int64.
        class_names: the name of each class, by label.
        folder: the folder that `paths` are relative to.
        paths: N relative paths with forward slashes.
        channels: 1 (greyscale) or 3 (RGB).
        image_size: height and width after resizing, in pixels.
        resident_limit_gib: the most memory that all pixels may take, in GiB.
        workers: processes that decode each batch if the pixels would take more.
        keeps_pixels: whether all pixels, once decoded, are kept in a file beside `folder`.
    """

    labels: Tensor
    class_names: list[str]
    folder: Path
    paths: list[str]
    channels: int
    image_size: int
    resident_limit_gib: float
    workers: int
    keeps_pixels: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def resident(self) -> bool:
        """Whether all pixels are kept in memory."""
        return math.prod(self.shape) <= self.resident_limit_gib * 2**30

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, C, H and W."""
        return len(self), self.channels, self.image_size, self.image_size

    def read(self, positions: Sequence[int]) -> Tensor:
        """Decode the images at `positions`: [len(positions), C, H, W] uint8.

        Raises:
            ConfigError: a file cannot be read as an image.
        """
        return torch.stack([self._decode(self.folder / self.paths[position]) for position in positions])

    def read_all(self) -> Tensor:
        """Decode all images, unless their pixels are kept: [N, C, H, W] uint8; raises as `read` does."""
        if self.keeps_pixels:
            return kept_pixels(self.folder, self.paths, self.shape, self._decode_all)
        return self._decode_all()

    def _decode_all(self) -> Tensor:
        """Decode all images in a pool of threads."""
        pixels = torch.empty(self.shape, dtype=torch.uint8)
        parts = [range(len(self))[start : start + _AT_ONCE] for start in range(0, len(self), _AT_ONCE)]
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            for part, images in zip(parts, pool.map(self.read, parts), strict=True):
                pixels[part.start : part.stop] = images
        return pixels

    def random_keys(self, seed: int) -> Tensor:
        """[N] int64: a random number for each image, from its path, so that other files do not change it."""
        digests = (hashlib.sha256(f"{seed}/{printable(path)}".encode()).digest() for path in self.paths)
        return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests])

    def subset(self, positions: Tensor) -> "FileSplit":
        """A split of the images at `positions` ([M] int64), in that order."""
        paths = [self.paths[position] for position in positions.tolist()]
        return replace(self, labels=self.labels[positions], paths=paths, keeps_pixels=False)

    def _decode(self, file: Path) -> Tensor:
        return decode(file, self.image_size, self.channels)


def printable(name: str) -> str:
    """A file's name, with bytes that are no text written as backslash and number."""
    return name.encode(errors="backslashreplace").decode()


def hold_out(labels: Tensor, random_keys: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split the positions 0..N−1 into (kept, held out), stratified by class.

    Of each class with n images, the round(fraction·n) with the lowest keys are held out; at least one if
    the fraction is not 0 and n ≥ 2, and never all.

    Args:
        labels: [N] int64.
        random_keys: [N] int64, a random number for each image.
        fraction: 0 ≤ fraction < 1.

    Returns:
        Two sorted int64 tensors, disjoint, which together have all positions.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for members in classes_by_key(labels, random_keys) if fraction > 0 else ():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[:count]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def share_of_each_class(labels: Tensor, random_keys: Tensor, fraction: float) -> Tensor:
    """The positions of a share of the images 0..N−1, stratified by class and sorted: [M] int64.

    Of each class with n images, it is the max(round(fraction·n), 1) with the lowest keys, so a smaller share
    is a part of every larger one.

    Args:
        labels: [N] int64.
        random_keys: [N] int64, a random number for each image.
        fraction: 0 < fraction ≤ 1.
    """
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for members in classes_by_key(labels, random_keys):
        kept[members[: max(round(fraction * len(members)), 1)]] = True
    return kept.nonzero().flatten()


def classes_by_key(labels: Tensor, random_keys: Tensor) -> Iterator[Tensor]:
    """The positions of each class's images ([n] int64), lowest key first."""
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        yield members[random_keys[members].argsort(stable=True)]
