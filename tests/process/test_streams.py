"""What a terminal, a pipe or a disk does not take is lost; whoever prints never hears of it."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from vitkd.process.streams import SIMILAR, protect_streams


@pytest.fixture
def stdout(monkeypatch) -> Iterator[Callable[..., None]]:
    """stdout(file_descriptor, encoding) makes that the protected stdout."""
    streams = [sys.stdout, sys.stderr]

    def install(number: int, encoding: str = "utf-8") -> None:
        sys.stdout = os.fdopen(number, "w", encoding=encoding, closefd=False)
        protect_streams()

    yield install
    sys.stdout, sys.stderr = streams


def unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


BROKEN = {
    "a pipe that nobody reads": unread_pipe,
    "a full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "opened for reading": lambda: os.open(os.devnull, os.O_RDONLY),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_nothing_that_is_printed_raises(broken, stdout):
    number = BROKEN[broken]()
    stdout(number)

    print("a line")
    print("x" * 100_000, flush=True)
    sys.stdout.flush()

    os.close(number)
    print("and when it is closed later", flush=True)


def test_a_reader_who_is_slow_and_will_not_be_waited_for_loses_text(stdout):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stdout(writer)

    for _ in range(100):
        print("x" * 10_000, flush=True)

    assert os.read(reader, 5) == b"xxxxx"


def printed(stdout: Callable[..., None], encoding: str, text: str) -> str:
    reader, writer = os.pipe()
    stdout(writer, encoding)
    print(text, end="", flush=True)
    os.close(writer)
    with os.fdopen(reader, encoding=encoding) as file:
        return file.read()


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", "8x8 pixels, 1 - alpha, a.b, 1-2, 3+-4, a->b, 5..."),
        ("latin-1", "8×8 pixels, 1 - alpha, a·b, 1-2, 3±4, a->b, 5..."),
        ("utf-8", "8×8 pixels, 1 − alpha, a·b, 1–2, 3±4, a→b, 5…"),
    ],
)
def test_what_an_encoding_lacks_becomes_something_alike(encoding, text, stdout):
    assert printed(stdout, encoding, "8×8 pixels, 1 − alpha, a·b, 1–2, 3±4, a→b, 5…") == text


def test_a_name_that_an_encoding_lacks_is_escaped_so_that_it_can_be_told(stdout):
    assert printed(stdout, "ascii", "Blüten/花") == r"Bl\xfcten/\u82b1"
    assert printed(stdout, "utf-8", "Blüten/\udcff") == r"Blüten/\udcff"


@pytest.mark.parametrize("character", SIMILAR)
def test_what_is_alike_is_ascii(character):
    assert SIMILAR[character].isascii()


def test_a_stream_in_memory_degrades_too(monkeypatch):
    memory = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(memory, "ascii"))
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    protect_streams()
    print("8×8", flush=True)

    assert memory.getvalue() == b"8x8\n"


def test_once_protected_it_stays_the_same_stream(stdout):
    stdout(unread_pipe())
    before = sys.stdout, sys.stderr

    protect_streams()

    assert (sys.stdout, sys.stderr) == before


def test_a_stream_of_text_is_left_alone(monkeypatch):
    """As a notebook's, and the one in which these tests find what a command printed."""
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", text)

    protect_streams()

    assert sys.stdout is text


def test_no_file_gets_the_number_of_a_stream_that_is_closed():
    """Else what a library prints would end up in a checkpoint."""
    program = (
        "import os; from vitkd.process.streams import protect_streams; protect_streams(); print('lost');"
        "assert os.open(os.devnull, os.O_RDONLY) > 2"
    )
    line = ["sh", "-c", f'exec {sys.executable} -c "{program}" <&- >&- 2>&-']

    assert subprocess.run(line, check=False).returncode == 0
