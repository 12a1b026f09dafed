"""What tests of a run's files start from."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of so many KiB; skips where that is not allowed."""
    place = tmp_path / "disk"

    def make(kib: int) -> Path:
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "vitkd-test", str(place)]
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only the superuser can mount a small disk")
        return place

    yield make
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)
