"""Signals: what they do to a command, and that they wait until a run's state is safe on disk."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

log = logging.getLogger("vitkd")

# What ends a command, and how its last line calls that: Ctrl-C, a scheduler's request, a closed terminal.
STOPS = {
    int(getattr(signal, name)): words
    for name, words in {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}.items()
    if hasattr(signal, name)
}
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
# Besides, what SLURM and submitit send before a time limit.
POSTPONED = [*STOPS, *(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))]
_reported: set[int] = set()


def stop_at_once() -> None:
    """Make Ctrl-C and the like end this process with one line, where nothing is to be saved or removed.

    As in imports, where exceptions would be caught or printed. What is ignored, as under `nohup`, stays so.
    """
    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    if not _reported:
        with suppress(OSError):
            os.write(2, f"error: stopped by {STOPS[number]}\n".encode())
    os._exit(128 + number)


def exit_on_termination() -> None:
    """Make SIGTERM and SIGHUP orderly exits with codes 143 and 129, unless they have handlers already."""
    if not in_main_thread():
        return
    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, _end):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def orderly_stops(say: Callable[[str], object]) -> Iterator[None]:
    """While the body runs, a signal that ends the process unwinds it first; then `say` prints one line."""
    before = signal_handlers()
    try:
        try:
            exit_on_termination()
            yield
        finally:
            set_signal_handlers(before)
    except (KeyboardInterrupt, SystemExit) as end:
        code = INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code
        if isinstance(code, int) and code - 128 in STOPS:
            _reported.add(code)
            say(f"stopped by {STOPS[code - 128]}")
        sys.exit(code)


@contextmanager
def hidden_from_children() -> Iterator[None]:
    """Let processes that start in the body ignore what a terminal sends to all: this one ends them."""
    before = signal_handlers()
    set_signal_handlers({number: signal.SIG_IGN for number in STOPS if number != signal.SIGTERM})
    try:
        yield
    finally:
        set_signal_handlers(before)


def signal_handlers() -> dict[int, Any]:
    """The handler of each signal."""
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def set_signal_handlers(handlers: Mapping[int, Any]) -> None:
    """Restore signal handlers, in the main thread; others may not set them."""
    if not in_main_thread():
        return
    for number, handler in handlers.items():
        # None was not installed from Python, and cannot be.
        if handler is not None and handler != signal.getsignal(number):
            signal.signal(number, handler)


class PostponedSignals:
    """While entered, a signal with a handler waits until `deliver`; the same signal again does not."""

    def __init__(self) -> None:
        self.waiting: list[int] = []
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if in_main_thread():
            exit_on_termination()
            self._handlers = {
                number: handler for number in POSTPONED if callable(handler := signal.getsignal(number))
            }
        self.install()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.waiting and isinstance(error, Exception):
            log.error("error: %s", error)  # the run ends with the signal, not with this error
        if error_type is None or issubclass(error_type, Exception):
            self.deliver()

    def install(self) -> None:
        """Install the handlers, again if something else has replaced them meanwhile."""
        for number in self._handlers:
            signal.signal(number, self._note)

    def deliver(self) -> None:
        """Run the handler of every waiting signal; one that the process survives may be sent again."""
        while self.waiting:
            number = self.waiting.pop(0)
            self._handle(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self.waiting:
            self._handle(number, frame)
            return
        self.waiting.append(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        handler = self._handlers[number]
        assert callable(handler)
        handler(number, frame)


def in_main_thread() -> bool:
    """Whether this is the thread in which Python delivers signals and lets handlers be set."""
    return threading.current_thread() is threading.main_thread()
