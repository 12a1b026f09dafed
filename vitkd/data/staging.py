"""Downloads that appear whole or not at all, and once for all the processes that want them."""

import contextlib
import hashlib
import logging
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError

from filelock import AcquireReturnProxy, FileLock, Timeout

from vitkd.errors import ConfigError, one_line

TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
# What servers, networks, disks and archives raise; torchvision has RuntimeError for a wrong checksum.
_FAILURES = (HTTPException, OSError, EOFError, RuntimeError, ValueError, tarfile.TarError, zlib.error)

log = logging.getLogger(__name__)


class DownloadError(Exception):
    """A download that failed; the message says why, in one line."""


def filled(folder: Path) -> bool:
    """Whether there is a folder with anything in it."""
    return folder.is_dir() and any(folder.iterdir())


def unavailable(name: str, target: Path, files: str, reason: object) -> ConfigError:
    """That a data set cannot be had, why, and all that a person needs to mend it.

    Args:
        name: of the data set.
        target: the folder where it should be.
        files: which files of the web are to be unpacked where.
        reason: what was found.
    """
    damaged = filled(target)
    state = "damaged or incomplete" if damaged else "absent and could not be downloaded"
    return ConfigError(
        f"dataset {name}: {target} is {state} ({reason});{' remove it,' if damaged else ''} go online with"
        f" dataset.download=true, unpack {files} by hand, or set paths.data=DIR to where it is whole"
    )


def install(target: Path, fetch: Callable[[Path], Path]) -> None:
    """Have the folder `target` filled, unless it is.

    Args:
        target: which folder; processes that want the same one wait for the first of them.
        fetch: puts the data into the empty folder that it is given, and returns what becomes `target`.

    Raises:
        DownloadError: nothing was installed, and nothing is left behind.
    """
    try:
        with staging(target) as stage:
            if not filled(target):
                publish(fetch(stage), target)
    except _FAILURES as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        raise DownloadError(one_line(error)) from error


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, for one process at a time; on one file system, so a rename is atomic.

    Whatever a killed process left there is removed first. Afterwards the folder is gone; so are the parents
    that had to be made, if nothing was put there.
    """
    stage = target.with_name(f".download-{target.name}")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with _acquired(lock := FileLock(f"{stage}.lock"), target):
            try:
                if stage.exists():
                    shutil.rmtree(stage)
                stage.mkdir()
                yield stage
            finally:
                shutil.rmtree(stage, ignore_errors=True)
                with contextlib.suppress(OSError):
                    Path(lock.lock_file).unlink()
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _acquired(lock: FileLock, target: Path) -> AcquireReturnProxy:
    """The lock, taken; says so if another process has to finish first."""
    timeout = 0
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire(timeout)
        except Timeout:
            log.info("another process is downloading %s; waiting for it", target)
            timeout = -1
        except FileNotFoundError:
            continue  # the other one failed, and removed the folder that it had made


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder into place, atomically; if somebody was faster, theirs stays."""
    try:
        folder.rename(target)
    except OSError:
        if not filled(target):
            raise


@dataclass(frozen=True)
class Archive:
    """A tar file on the web that holds one folder of images.

    Args:
        url: where it is.
        size: in bytes.
        sha256: of the file, in hex.
        folder: what it holds at its top.
        images: how many are in that.
    """

    url: str
    size: int
    sha256: str
    folder: str
    images: int

    def __str__(self) -> str:
        return f"{self.url} (sha256 {self.sha256})"

    def install(self, root: Path) -> Path:
        """Download, check and unpack to `root/folder`, which is returned.

        Raises:
            DownloadError: nothing was installed, and nothing is left behind.
        """
        install(root / self.folder, self._unpack)
        return root / self.folder

    def _unpack(self, stage: Path) -> Path:
        log.info("downloading %s (%.0f MB)", self.url, self.size / 1e6)
        self._download(stage / "archive")
        with tarfile.open(stage / "archive") as tar:
            # Python before 3.11.4 has no such filter, hence `_plain`.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(stage / "unpacked", members=_plain(tar))
        return stage / "unpacked" / self.folder

    def _download(self, file: Path) -> None:
        digest = hashlib.sha256()
        with urllib.request.urlopen(self.url, timeout=TIMEOUT_SECONDS) as response, file.open("wb") as out:
            while chunk := response.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        if (received := file.stat().st_size) != self.size:
            raise DownloadError(f"the server sent {received:,} of {self.size:,} bytes")
        if digest.hexdigest() != self.sha256:
            raise DownloadError(f"sha256 is {digest.hexdigest()}, not the official {self.sha256}")


def _plain(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, all of them files and folders inside where they are unpacked; images need no links."""
    for member in tar:
        if not (member.isfile() or member.isdir()):
            raise DownloadError(f"its member {member.name!r} is a link or a device; refused")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DownloadError(f"its member {member.name!r} would lie outside its folder; refused")
        yield member
