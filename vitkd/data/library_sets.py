"""Scikit-learn's digits, and torchvision's MNIST, Fashion-MNIST and CIFAR.

Of these torchvision names, checks and reads the files; `staging` downloads them.
Torchvision up to 0.29 unpacks archives without a filter, so a member could be written outside their folder.
"""

import gzip
import logging
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torch
import torchvision

from vitkd.data import staging
from vitkd.data.spec import Dataset
from vitkd.data.split import Split, hold_out
from vitkd.errors import ConfigError, check_choice, one_line

# Torchvision's class → the folder below paths.data that has its files.
FOLDERS = {
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
}
# Its readers raise these for damaged files: RuntimeError for a wrong checksum, otherwise almost anything.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, TypeError, LookupError, AssertionError, PickleError)

_DIGITS_TEST_FRACTION = 0.2
_DIGITS_TEST_SEED = 0

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels; a fixed, stratified fifth is the test split."""

    def load(self, root: Path) -> dict[str, Split]:
        spec = find_spec("sklearn")
        assert spec is not None
        assert spec.origin is not None, "scikit-learn is a dependency"
        # scikit-learn's `load_digits` reads the same file, but importing it takes most of a second.
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        # A pixel counts the dark dots in a 4×4 cell: 0 to 16.
        images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        labels = torch.from_numpy(table[:, -1].astype(np.int64))
        names = [str(digit) for digit in range(10)]
        order = Split(labels, names, images).random_keys(_DIGITS_TEST_SEED)
        train, test = hold_out(labels, order, _DIGITS_TEST_FRACTION)
        splits = {"train": train, "test": test}.items()
        return {name: self._checked(Split(labels[i], names, images[i])) for name, i in splits}


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
        check_choice(self, "source", FOLDERS)

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
        try:
            staging.install(root / FOLDERS[self.source], self._fetch, self.download)
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
                # Whatever name its header has.
                unpacked = folder / name.removesuffix(".gz")
                with gzip.open(stage / name) as content, unpacked.open("wb") as out:
                    shutil.copyfileobj(content, out)
        self._official(stage)  # raises if anything is missing
        return folder

    def _unavailable_error(self, root: Path, error: Exception) -> ConfigError:
        target, files = root / FOLDERS[self.source], self._remote_files
        in_archive = any(name.endswith(".tar.gz") for name in files)  # the archive includes the folder
        manual = f"{', '.join(map(str, files.values()))} in {root if in_archive else target}"
        reason = one_line(error).removesuffix(" You can use download=True to download it")
        return staging.unavailable_error(self.name, target, manual, reason)
