"""MNIST, Fashion-MNIST and CIFAR: torchvision names, checks and reads the files; `staging` downloads them.

Torchvision up to 0.29 unpacks archives without a filter, so a member could be written outside their folder.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
import torchvision

from vitkd.data import staging
from vitkd.data.spec import Dataset
from vitkd.data.split import Split
from vitkd.errors import ConfigError, one_line

# Torchvision's class → the folder below paths.data that has its files.
FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}
# Its readers raise these for damaged files: RuntimeError for a wrong checksum, otherwise almost anything.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AssertionError, PickleError)

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Torchvision(Dataset):
    """A data set of `torchvision.datasets`.

    Args:
        source: torchvision's class: MNIST, FashionMNIST, CIFAR10 or CIFAR100.
        download: whether to download the data if it is absent.
    """

    source: str
    download: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("source", self.source in FOLDERS, f"one of {', '.join(FOLDERS)}")

    def inspect(self, root: Path) -> int:
        self._ensure(root)
        return len(self._read(root, train=False).class_names)

    def load(self, root: Path) -> dict[str, Split]:
        self._ensure(root)
        return {"train": self._read(root, train=True), "test": self._read(root, train=False)}

    @property
    def _official(self) -> Any:
        """Torchvision's class."""
        return getattr(torchvision.datasets, self.source)

    def _read(self, root: Path, train: bool) -> Split:
        try:
            # CIFAR's files are pickles; torchvision compares their checksums before it unpickles them.
            official = self._official(root, train=train)
            pixels = torch.as_tensor(np.asarray(official.data))
            labels = torch.as_tensor(official.targets, dtype=torch.int64)
        except _DAMAGE as error:
            raise self._unavailable_error(root, error) from error
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return self._checked(Split(labels, list(official.classes), images))

    def _ensure(self, root: Path) -> None:
        """Download the data if it is absent; damaged files are left for the user to remove."""
        target = root / FOLDERS[self.source]
        if staging.has_files(target):
            return
        try:
            if not self.download:
                raise staging.DownloadError("dataset.download=false")
            staging.install(target, self._fetch)
        except staging.DownloadError as error:
            raise self._unavailable_error(root, error) from error

    @property
    def _remote_files(self) -> dict[str, staging.RemoteFile]:
        """The official files by name: one tar archive, or gzip files."""
        official = self._official
        if hasattr(official, "url"):
            return {official.filename: staging.RemoteFile((official.url,), "md5", official.tgz_md5)}
        return {
            name: staging.RemoteFile(tuple(f"{mirror}{name}" for mirror in official.mirrors), "md5", md5)
            for name, md5 in official.resources
        }

    def _fetch(self, stage: Path) -> Path:
        """Download, check and unpack in the empty folder `stage`; returns the folder with the data."""
        log.info("downloading %s", self.source)
        folder = stage / FOLDERS[self.source]
        folder.mkdir(parents=True)
        for name, file in self._remote_files.items():
            file.download(stage / name)
            if name.endswith(".tar.gz"):
                staging.unpack_tar(stage / name, stage)
            else:
                staging.unpack_gzip(stage / name, folder / name.removesuffix(".gz"))
        self._official(stage)  # raises if anything is missing
        return folder

    def _unavailable_error(self, root: Path, error: Exception) -> ConfigError:
        target, files = root / FOLDERS[self.source], self._remote_files
        in_archive = any(name.endswith(".tar.gz") for name in files)  # the archive includes the folder
        manual = f"{', '.join(map(str, files.values()))} in {root if in_archive else target}"
        reason = one_line(error).removesuffix(" You can use download=True to download it")
        return staging.unavailable_error(self.name, target, manual, reason)
