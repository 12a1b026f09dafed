"""Decoded pixels that are kept: the same ones, decoded once, and again if the files are others."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitkd.data import decoded
from vitkd.data.decoded import kept_pixels

PATHS = ["a/1.jpg", "b/2.jpg"]
SHAPE = (2, 3, 4, 4)


class Decoder:
    """Makes other pixels each time, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Tensor:
        self.count += 1
        return torch.full(SHAPE, self.count, dtype=torch.uint8)


@pytest.fixture
def decode() -> Decoder:
    return Decoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in PATHS:
        file = tmp_path / "photos" / path
        file.parent.mkdir(parents=True)
        file.write_text(path)
    return tmp_path / "photos"


def test_they_are_decoded_once(folder: Path, decode: Decoder) -> None:
    first = kept_pixels(folder, PATHS, SHAPE, decode)
    again = kept_pixels(folder, PATHS, SHAPE, decode)
    assert torch.equal(first, again)
    assert decode.count == 1
    again.add_(1)  # a caller may change its own
    assert torch.equal(kept_pixels(folder, PATHS, SHAPE, decode), first)


def touch(folder: Path) -> None:
    os.utime(folder / PATHS[0], (1, 1))


def grow(folder: Path) -> None:
    status = (folder / PATHS[0]).stat()
    (folder / PATHS[0]).write_text("a longer text")
    os.utime(folder / PATHS[0], ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, grow])
def test_a_changed_file_is_decoded_anew_and_the_old_pixels_go(
    change: Callable[[Path], None], folder: Path, decode: Decoder
) -> None:
    kept_pixels(folder, PATHS, SHAPE, decode)
    change(folder)
    assert kept_pixels(folder, PATHS, SHAPE, decode).unique().tolist() == [2]
    assert decode.count == 2
    assert len([*folder.parent.iterdir()]) == 2, "the photos and what is kept of them"


def test_other_files_or_another_shape_are_something_else(folder: Path, decode: Decoder) -> None:
    kept_pixels(folder, PATHS, SHAPE, decode)
    kept_pixels(folder, PATHS[::-1], SHAPE, decode)
    with pytest.raises(AssertionError):
        kept_pixels(folder, PATHS, (2, 3, 8, 8), _never)


def _never() -> Tensor:
    raise AssertionError


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"something else", None])
def test_damaged_pixels_are_decoded_again(content: bytes | None, folder: Path, decode: Decoder) -> None:
    kept_pixels(folder, PATHS, SHAPE, decode)
    (file,) = folder.parent.rglob("pixels.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if content is None else content)
    assert kept_pixels(folder, PATHS, SHAPE, decode).unique().tolist() == [2]
    assert kept_pixels(folder, PATHS, SHAPE, decode).unique().tolist() == [2]
    assert decode.count == 2


def test_where_nothing_can_be_written_they_are_decoded_each_time(
    folder: Path, decode: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decoded, "_write", full)
    with caplog.at_level("INFO", "vitkd.data"):
        assert kept_pixels(folder, PATHS, SHAPE, decode).unique().tolist() == [1]
    assert decode.count == 1
    assert "not kept (No space left on device)" in caplog.text
    assert [*folder.parent.iterdir()] == [folder]


def test_what_decoding_raises_is_raised_and_nothing_is_left(folder: Path) -> None:
    with pytest.raises(AssertionError):
        kept_pixels(folder, PATHS, SHAPE, _never)
    assert [*folder.parent.iterdir()] == [folder]


def test_who_needs_them_at_the_same_time_waits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoding, waited = threading.Event(), threading.Event()
    results = []

    def slowly() -> Tensor:
        decoding.set()
        assert waited.wait(30)
        return torch.full(SHAPE, 7, dtype=torch.uint8)

    def need(decode: Callable[[], Tensor]) -> None:
        results.append(kept_pixels(folder, PATHS, SHAPE, decode))

    class Waiting(decoded.logging.Handler):
        def emit(self, record: decoded.logging.LogRecord) -> None:
            if "waiting for it" in record.getMessage():
                waited.set()

    handler = Waiting()
    decoded.logging.getLogger("vitkd.data").addHandler(handler)
    with caplog.at_level("INFO", "vitkd.data"):
        first = threading.Thread(target=need, args=[slowly])
        first.start()
        assert decoding.wait(30)
        second = threading.Thread(target=need, args=[_never])
        second.start()
        first.join()
        second.join()
    decoded.logging.getLogger("vitkd.data").removeHandler(handler)
    assert [pixels.unique().tolist() for pixels in results] == [[7], [7]]
