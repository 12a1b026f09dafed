"""Commands that are run in a process of their own and killed at a chosen point.

The processes are forked from a clean server that has imported vitkd already, so that one takes as long as
its training and not as long as its imports.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from vitkd.process.start import start as start_process

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vitkd.train.__main__", "tests.crashes"])


class Ended(NamedTuple):
    """How a process ended, and what it printed."""

    code: int
    """negative: the signal that killed it"""
    out: str
    err: str


class Strike(NamedTuple):
    """Sends this process a signal when a function is called for the nth time.

    Args:
        where: the function, as `module:Class.name`.
        nth: from 1.
        number: the signal.
        after: strike when the function has returned.
    """

    where: str
    nth: int = 1
    number: int = signal.SIGKILL
    after: bool = False


def start(
    arguments: list[str],
    folder: Path,
    *strikes: Strike,
    command: str = "train",
    environment: dict[str, str] | None = None,
) -> Any:
    """Start `python -m vitkd.COMMAND ARGUMENTS` with `folder` as working folder; returns the process."""
    folder.mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=_run, args=(command, arguments, folder, strikes, environment or {}))
    process.start()
    return process


def run(arguments: list[str], folder: Path, *strikes: Strike, **more: Any) -> Ended:
    """As `start`, and wait for its end."""
    return end(start(arguments, folder, *strikes, **more), folder)


def end(process: Any, folder: Path) -> Ended:
    """Wait for the end of a process that `start` returned."""
    process.join(300)
    assert process.exitcode is not None, "it hangs"
    name = process.pid
    return Ended(process.exitcode, (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text())


def _run(
    command: str,
    arguments: list[str],
    folder: Path,
    strikes: tuple[Strike, ...],
    environment: dict[str, str],
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [f"vitkd.{command}", *arguments]
    import torch

    torch.set_num_threads(1)
    for strike in strikes:
        _arm(strike)
    name = os.getpid()
    with ExitStack() as streams:
        for kind, redirect in (("out", redirect_stdout), ("err", redirect_stderr)):
            # Line by line: a killed process flushes nothing.
            file = streams.enter_context(Path(f"{name}.{kind}").open("a", buffering=1))
            streams.enter_context(redirect(file))
            # What it starts itself, and Python on its way out, print there too.
            os.dup2(file.fileno(), {"out": 1, "err": 2}[kind])
        start_process("__main__")
        import_module(f"vitkd.{command}.__main__").main()


def _arm(strike: Strike) -> None:
    module, _, path = strike.where.partition(":")
    *owners, name = path.split(".")
    owner: Any = import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == strike.nth and not strike.after:
            os.kill(os.getpid(), strike.number)
        result = original(*args, **kwargs)
        if calls == strike.nth and strike.after:
            os.kill(os.getpid(), strike.number)
        return result

    setattr(owner, name, struck)
