"""The classics, as torchvision downloads, checks and reads them."""

import contextlib
import io
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError

import numpy as np
import torch
import torchvision

from vitkd.data.spec import Dataset
from vitkd.data.split import Split
from vitkd.data.staging import publish, staging
from vitkd.errors import ConfigError

# Torchvision's class → the folder below paths.data where it keeps its files.
FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}
_TIMEOUT_SECONDS = 30
# What its readers raise on damaged files, beside the RuntimeError of a failed checksum.
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

    def _present(self, root: Path) -> bool:
        folder = root / FOLDERS[self.source]
        return folder.is_dir() and any(folder.iterdir())

    def _read(self, root: Path, train: bool) -> Split:
        try:
            official = getattr(torchvision.datasets, self.source)(root, train=train)
            pixels = torch.as_tensor(np.asarray(official.data))
            labels = torch.as_tensor(official.targets, dtype=torch.int64)
        except _DAMAGE as error:
            state = "damaged or incomplete" if self._present(root) else "absent"
            raise self._unavailable(root, state, error) from error
        images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return self._checked(Split(labels, list(official.classes), images))

    def _ensure(self, root: Path) -> None:
        """Download what is absent; what is there but damaged is the user's to remove."""
        if self.download and not self._present(root):
            self._download(root)

    def _download(self, root: Path) -> None:
        log.info("downloading %s to %s", self.source, root)
        folder = FOLDERS[self.source]
        try:
            with staging(root) as stage:
                with _hushed():
                    getattr(torchvision.datasets, self.source)(stage, download=True)
                publish(stage / folder, root / folder)
        except _DAMAGE as error:
            raise self._unavailable(root, "absent and could not be downloaded", error) from error

    def _unavailable(self, root: Path, state: str, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split()).removesuffix(" You can use download=True to download it")
        folder = root / FOLDERS[self.source]
        return ConfigError(
            f"dataset {self.name}: {folder} is {state} ({reason or type(error).__name__}); remove it and go"
            f" online with dataset.download=true, put {self.source}'s files there by hand, or set"
            " paths.data=DIR to where they are"
        )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep torchvision's prints and bars off the terminal, and its sockets from waiting for ever."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout)
