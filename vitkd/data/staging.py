"""Downloads that appear whole or not at all."""

import contextlib
import hashlib
import logging
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30

log = logging.getLogger(__name__)


class DownloadError(Exception):
    """A download that failed; the message says why, in one line."""


@contextlib.contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A temporary folder inside `root`, on its file system so that a rename out of it is atomic.

    It is gone afterwards; so is `root`, with the parents that had to be made, if nothing was put there.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as stage:
            yield Path(stage)
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@dataclass(frozen=True)
class Archive:
    """A tar file on the web that holds one folder.

    Args:
        url: where it is.
        size: in bytes.
        sha256: of the file, in hex.
        folder: what it holds at its top.
    """

    url: str
    size: int
    sha256: str
    folder: str

    def install(self, root: Path) -> Path:
        """Download, check and unpack to `root/folder`, which is returned.

        Raises:
            DownloadError: nothing was installed, and nothing is left behind.
        """
        target = root / self.folder
        try:
            with staging(root) as stage:
                log.info("downloading %s (%.0f MB) to %s", self.url, self.size / 1e6, root)
                archive = stage / "archive"
                self._fetch(archive)
                with tarfile.open(archive) as tar:
                    tar.extractall(stage / "unpacked", filter="data")
                publish(stage / "unpacked" / self.folder, target)
        except (tarfile.TarError, EOFError, zlib.error, HTTPException, OSError) as error:
            if isinstance(error, HTTPError):
                error.close()  # it holds the connection
            raise DownloadError(" ".join(str(error).split()) or type(error).__name__) from error
        return target

    def _fetch(self, file: Path) -> None:
        digest = hashlib.sha256()
        with urllib.request.urlopen(self.url, timeout=_TIMEOUT_SECONDS) as response, file.open("wb") as out:
            while chunk := response.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        if (received := file.stat().st_size) != self.size:
            raise DownloadError(f"the server sent {received:,} of {self.size:,} bytes")
        if digest.hexdigest() != self.sha256:
            raise DownloadError(f"sha256 is {digest.hexdigest()}, not the official {self.sha256}")


def publish(folder: Path, target: Path) -> None:
    """Rename a finished folder into place, atomically; if another process was faster, its folder stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
