"""How a command starts: safe to interrupt and to print before its imports, which take seconds.

The installed scripts (`vitkd-train`) run the same modules as `python -m`.
"""

import runpy
import threading
from functools import partial

from vitkd.process.signals import stop_at_once
from vitkd.process.streams import protect_streams


def start(module: str) -> None:
    """Prepare the process if `module` is what it runs, and not imported by something else."""
    if module != "__main__":
        return
    protect_streams()
    stop_at_once()
    report = threading.excepthook
    # TensorBoard's thread fails when the disk does, and so does the next write of the run, which reports it.
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else report(args)


def run(command: str) -> None:
    """Run `python -m vitkd.COMMAND` in this process."""
    runpy.run_module(f"vitkd.{command}", run_name="__main__", alter_sys=True)


COMMANDS = ("train", "evaluate", "explain", "export", "report")
train, evaluate, explain, export, report = (partial(run, command) for command in COMMANDS)
