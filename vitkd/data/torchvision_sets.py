"""The classics, as torchvision downloads, checks and reads them."""

import contextlib
import io
import logging
import socket
from collections.abc import Iterator
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

# Torchvision's class → the folder below paths.data where it keeps its files.
FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}
# What its readers raise on damaged files: a RuntimeError where a checksum is wrong, else almost anything.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AssertionError, PickleError)

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Torchvision(Dataset):
    """A data set of `torchvision.datasets`.

    Args:
        source: its class there: MNIST, FashionMNIST, CIFAR10 or CIFAR100.
        download: fetch the data when absent.
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
            # CIFAR's files are pickles; torchvision compares their checksums before it reads them.
            official = self._official(root, train=train)
            pixels = torch.as_tensor(np.asarray(official.data))
            labels = torch.as_tensor(official.targets, dtype=torch.int64)
        except _DAMAGE as error:
            raise self._unavailable(root, error) from error
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return self._checked(Split(labels, list(official.classes), images))

    def _ensure(self, root: Path) -> None:
        """Download what is absent; what is there but damaged is the user's to remove."""
        target = root / FOLDERS[self.source]
        if staging.filled(target):
            return
        try:
            if not self.download:
                raise staging.DownloadError("dataset.download=false")
            staging.install(target, self._fetch)
        except staging.DownloadError as error:
            raise self._unavailable(root, error) from error

    def _fetch(self, stage: Path) -> Path:
        log.info("downloading %s", self.source)
        with _hushed():
            self._official(stage, download=True)
        return stage / FOLDERS[self.source]

    def _unavailable(self, root: Path, error: Exception) -> ConfigError:
        target, official = root / FOLDERS[self.source], self._official
        if hasattr(official, "url"):
            files = f"{official.url} (md5 {official.tgz_md5}) in {root}"
        else:
            parts = (f"{official.mirrors[0]}{name} (md5 {md5})" for name, md5 in official.resources)
            files = f"{', '.join(parts)} in {target}"
        reason = one_line(error).removesuffix(" You can use download=True to download it")
        return staging.unavailable(self.name, target, files, reason)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep torchvision's prints and bars off the terminal, and its sockets from waiting for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(staging.TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
