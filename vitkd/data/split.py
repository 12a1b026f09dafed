"""The images of one official split, in memory or as files, and how to hold some of them out."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitkd.data.hashing import fold, key_of
from vitkd.errors import ConfigError

_DECODING_THREADS = 8


@dataclass
class Split:
    """Images whose pixels are at hand.

    Args:
        labels: [N] int64.
        class_names: what each label means.
        images: [N, C, H, W] uint8.
    """

    labels: Tensor
    class_names: list[str]
    images: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def resident(self) -> bool:
        """True: there is no other way to have them."""
        return True

    def read_all(self) -> Tensor:
        """[N, C, H, W] uint8."""
        return self.images

    def lots(self, seed: int) -> Tensor:
        """[N] int64, a fixed random number for each image, by its position."""
        return fold(key_of(seed), torch.arange(len(self)))


@dataclass
class FileSplit:
    """Images that are read from files, turned to greyscale or RGB, resized and centre-cropped.

    Args:
        labels: [N] int64.
        class_names: what each label means.
        folder: what `paths` start from.
        paths: N relative paths with forward slashes.
        channels: 1 or 3.
        image_size: height and width in pixels of what is read.
        resident_limit_gib: the memory that all pixels may take.
        workers: processes that decode batch by batch if they would take more.
    """

    labels: Tensor
    class_names: list[str]
    folder: Path
    paths: list[str]
    channels: int
    image_size: int
    resident_limit_gib: float
    workers: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def resident(self) -> bool:
        """Whether all pixels may lie in memory."""
        return len(self) * self.channels * self.image_size**2 <= self.resident_limit_gib * 2**30

    def read(self, positions: Sequence[int]) -> Tensor:
        """[len(positions), C, H, W] uint8.

        Raises:
            ConfigError: a file is no readable image.
        """
        return torch.stack([self._decode(self.folder / self.paths[position]) for position in positions])

    def read_all(self) -> Tensor:
        """[N, C, H, W] uint8, decoded by a pool of threads; raises as `read` does."""
        pixels = torch.empty(len(self), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        files = (self.folder / path for path in self.paths)
        with ThreadPoolExecutor(_DECODING_THREADS) as pool:
            for position, image in enumerate(pool.map(self._decode, files)):
                pixels[position] = image
        return pixels

    def lots(self, seed: int) -> Tensor:
        """[N] int64, a fixed random number for each image, by its path: other files do not disturb it."""
        digests = (hashlib.sha256(f"{seed}/{path}".encode()).digest() for path in self.paths)
        return torch.tensor([int.from_bytes(digest[:8], "big", signed=True) for digest in digests])

    def subset(self, positions: Tensor) -> "FileSplit":
        """The images at `positions` ([M] int64), in that order, as a split of their own."""
        paths = [self.paths[position] for position in positions.tolist()]
        return replace(self, labels=self.labels[positions], paths=paths)

    def _decode(self, file: Path) -> Tensor:
        size, mode = (self.image_size, self.image_size), "L" if self.channels == 1 else "RGB"
        try:
            with Image.open(file) as image:
                image.draft(mode, size)  # lets the JPEG decoder skip detail that the resize would drop
                upright = ImageOps.exif_transpose(image).convert(mode)
                fitted = ImageOps.fit(upright, size, Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{file} cannot be read as an image ({reason}); mend or remove the file"
            ) from error
        return torch.from_numpy(np.array(fitted).reshape(*size, self.channels)).permute(2, 0, 1)


def hold_out(labels: Tensor, lots: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split positions into (kept, held out), the same share of every class.

    Each class of n images gives round(fraction·n) of them, those with the lowest lots; at least one when
    the fraction is not 0 and n ≥ 2, and never all.

    Args:
        labels: [N] int64.
        lots: [N] int64, a random number for each image.
        fraction: 0 ≤ fraction < 1.

    Returns:
        Two sorted int64 tensors that share no position and together have all.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique() if fraction > 0 else ():
        members = (labels == label).nonzero().flatten()
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[lots[members].argsort(stable=True)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()
