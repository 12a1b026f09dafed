"""A command that is stopped before or after all it has to do says so in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vitkd

ROOT = Path(vitkd.__file__).parents[1]
STOPS = [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")]
STARTED = """
import atexit, os, signal
from vitkd.process.start import start

start("__main__")
"""


def run(*arguments: str, path: Path = ROOT) -> tuple[int, str]:
    """The exit code and stderr of a new interpreter that looks for packages in `path` first."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    line = [sys.executable, *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def package_that_strikes(folder: Path, name: str, number: int) -> Path:
    """A folder with a package that sends a signal to the process that imports it."""
    (folder / f"{name}.py").write_text(
        f"import os, signal\nos.kill(os.getpid(), {int(number)})\nsignal.pause()\n"
    )
    return folder


@pytest.mark.parametrize(("number", "code", "name"), STOPS)
def test_a_signal_during_imports_is_one_line(number, code, name, tmp_path):
    path = package_that_strikes(tmp_path, "torch", number)

    assert run("-m", "vitkd.train", "--help", path=path) == (code, f"error: stopped by {name}\n")


@pytest.mark.parametrize(
    ("command", "package"),
    [("evaluate", "torch"), ("explain", "torch"), ("export", "torch"), ("report", "rich")],
)
def test_so_it_is_in_every_command_and_by_its_script(command, package, tmp_path):
    path = package_that_strikes(tmp_path, package, signal.SIGINT)
    script = f"from vitkd.process.start import {command}; {command}()"

    assert run("-m", f"vitkd.{command}", path=path) == (130, "error: stopped by Ctrl-C\n")
    assert run("-c", script, path=path) == (130, "error: stopped by Ctrl-C\n")


def test_at_exit_too():
    strike = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"

    assert run("-c", STARTED + strike) == (130, "error: stopped by Ctrl-C\n")


def test_what_a_thread_cannot_write_is_left_to_who_waits_for_it():
    program = """
import threading
def fail(error):
    thread = threading.Thread(target=lambda: exec("raise error", {"error": error}))
    thread.start()
    thread.join()
fail(OSError("no space left"))
fail(KeyError("a mistake"))
"""

    code, err = run("-c", STARTED + program)

    assert code == 0
    assert "no space left" not in err
    assert "a mistake" in err


def test_an_import_changes_nothing(monkeypatch):
    monkeypatch.setattr("vitkd.process.start.stop_at_once", pytest.fail)
    from vitkd.process.start import start

    start("vitkd.train.__main__")
