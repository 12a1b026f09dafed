"""Downloads that are installed complete or not at all, and only once when several processes need them."""

import contextlib
import hashlib
import logging
import shutil
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError

from filelock import AcquireReturnProxy, FileLock, Timeout

from vitkd.errors import ConfigError, one_line

TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
# Raised by servers, networks, disks and archives; torchvision raises RuntimeError for a wrong checksum.
_FAILURES = (
    *(HTTPException, OSError, EOFError, RuntimeError, ValueError),
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error),
)

log = logging.getLogger(__name__)


class DownloadError(Exception):
    """A failed download; the message gives the reason in one line."""


def has_files(folder: Path) -> bool:
    """Whether `folder` exists and is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def unavailable_error(name: str, target: Path, files: str, reason: object) -> ConfigError:
    """The error for a data set that is missing or damaged: the reason, and every way to fix it.

    Args:
        name: the data set's name.
        target: the folder where it belongs.
        files: which URLs to unpack by hand, and in which folder.
        reason: why it is unavailable.
    """
    damaged = has_files(target)
    state = "damaged or incomplete" if damaged else "absent and could not be downloaded"
    return ConfigError(
        f"dataset {name}: {target} is {state} ({reason});{' remove it,' if damaged else ''} go online with"
        f" dataset.download=true, unpack {files} by hand, or set paths.data=DIR to where a complete copy is"
    )


def install(target: Path, fetch: Callable[[Path], Path], download: bool = True) -> None:
    """Fill the folder `target`, unless it has files already.

    Args:
        target: the folder; other processes that need it wait for the first one.
        fetch: fills the empty staging folder it is given, and returns the folder to rename to `target`.
        download: the setting `dataset.download`, whether it may be filled.

    Raises:
        DownloadError: nothing was installed, and nothing is left behind.
    """
    if has_files(target):
        return
    if not download:
        raise DownloadError("dataset.download=false")
    try:
        with staging_folder(target) as stage:
            if not has_files(target):
                move_into_place(fetch(stage), target)
    except _FAILURES as error:
        raise DownloadError(one_line(error)) from error


@contextlib.contextmanager
def staging_folder(target: Path, doing: str = "downloading") -> Iterator[Path]:
    """An empty folder beside `target`, locked against other processes, which say what this one is `doing`.

    It is on the file system of `target`, so that renaming is atomic. What a killed process left in it is
    removed first. On exit it is removed, and so are the parents that were made, if they are still empty.
    """
    stage = target.with_name(f".download-{target.name}")
    new_parents = [folder for folder in target.parents if not folder.exists()]
    try:
        with _acquire(lock := FileLock(f"{stage}.lock"), target, doing):
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
            for folder in new_parents:
                folder.rmdir()


def _acquire(lock: FileLock, target: Path, doing: str) -> AcquireReturnProxy:
    """Take the lock; log a line if another process holds it."""
    timeout = 0
    while True:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            return lock.acquire(timeout)
        except Timeout:
            log.info("another process is %s %s; waiting for it", doing, target)
            timeout = -1
        except FileNotFoundError:
            continue  # the other process failed, and removed the parent folder it had made


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`, atomically; a `target` with files in it is kept."""
    try:
        folder.rename(target)
    except OSError:
        if not has_files(target):
            raise


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web and its official checksum.

    Args:
        urls: the servers that have it, tried in this order.
        algorithm: of the checksum, "md5" or "sha256".
        checksum: in hex.
        size: in bytes; None if it is not published.
    """

    urls: tuple[str, ...]
    algorithm: str
    checksum: str
    size: int | None = None

    def __str__(self) -> str:
        return f"{self.urls[0]} ({self.algorithm} {self.checksum})"

    def download(self, file: Path) -> None:
        """Download to `file` and compare the checksum.

        Raises:
            DownloadError: no server sent the official file; the message gives each server's reason.
        """
        reasons = []
        for url in self.urls:
            try:
                return self._download_from(url, file)
            except (DownloadError, *_FAILURES) as error:
                reasons.append(one_line(error))
                if isinstance(error, HTTPError):
                    error.close()  # it holds the connection
        raise DownloadError("; ".join(dict.fromkeys(reasons)))

    def _download_from(self, url: str, file: Path) -> None:
        digest = hashlib.new(self.algorithm, usedforsecurity=False)
        request = urllib.request.Request(url, headers={"User-Agent": "vitkd"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, file.open("wb") as out:
            while chunk := response.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        received = file.stat().st_size
        if self.size not in (None, received):
            raise DownloadError(f"the server sent {received:,} of {self.size:,} bytes")
        if digest.hexdigest() != self.checksum:
            raise DownloadError(
                f"the server sent {received:,} bytes with {self.algorithm} {digest.hexdigest()},"
                f" not the official {self.checksum}"
            )


@dataclass(frozen=True, kw_only=True)
class Archive(RemoteFile):
    """A tar or zip file on the web with one folder of images.

    Args:
        folder: at its top.
    """

    size: int
    folder: str

    def install(self, root: Path, download: bool = True) -> Path:
        """Download, check and unpack to `root/folder`, which is returned.

        Raises:
            DownloadError: nothing was installed, and nothing is left behind.
        """
        install(root / self.folder, self._fetch, download)
        return root / self.folder

    def _fetch(self, stage: Path) -> Path:
        log.info("downloading %s (%.0f MB)", self.urls[0], self.size / 1e6)
        self.download(stage / "archive")
        unpack = unpack_zip if self.urls[0].endswith(".zip") else unpack_tar
        unpack(stage / "archive", stage / "unpacked")
        return stage / "unpacked" / self.folder


def unpack_tar(archive: Path, folder: Path) -> None:
    """Write an archive's files below `folder`; nothing is ever written outside it.

    Names and contents are all that is taken from the archive: no links, devices, owners or permissions.
    That does not depend on `tarfile`'s extraction filters, which Python has since 3.11.4.

    Args:
        archive: a tar file, compressed or not.
        folder: a new folder, or one without links.

    Raises:
        DownloadError: a member is a link or a device, or its path leads outside `folder`.
        OSError, EOFError, tarfile.TarError, zlib.error: the archive is damaged, or the disk is full.
    """
    with tarfile.open(archive) as tar:
        for member in tar:
            target = folder / _checked_path(member.name, member.isfile() or member.isdir())
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            content = tar.extractfile(member)
            assert content is not None, "only links and devices have no content"
            _write(content, target)


def unpack_zip(archive: Path, folder: Path) -> None:
    """As `unpack_tar`, of a zip file; raises zipfile.BadZipFile if that is damaged."""
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            target = folder / _checked_path(member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            _write(members.open(member), target)


def _checked_path(name: str, is_plain: bool) -> PurePosixPath:
    """A member's path, relative and without `..`; it is a file or a folder."""
    if not is_plain:
        raise DownloadError(f"its member {name!r} is a link or a device; refused")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DownloadError(f"its member {name!r} would lie outside its folder; refused")
    return path


def _write(content: IO[bytes], target: Path) -> None:
    with content:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as out:
            shutil.copyfileobj(content, out, _CHUNK_BYTES)
