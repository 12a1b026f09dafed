"""Signals that wait until a run's state is safe on disk."""

import logging
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

log = logging.getLogger("vitkd")

TERMINATED = 128 + signal.SIGTERM
# Ctrl-C; a scheduler's request to end; what SLURM and submitit send before a time limit.
POSTPONED = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]


def exit_on_termination() -> None:
    """Make SIGTERM an orderly exit with code 143, unless it has a handler already."""
    if in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(TERMINATED))


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
