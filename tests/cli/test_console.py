"""A console that cannot show something loses it; no run, job, report or measurement stops for that."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import fresh_process

TINY = [
    *("method=none", "student.depth=1", "trainer=cpu", "trainer.max_epochs=1", "pictures_every_n_epochs=0"),
    "+trainer.limit_train_batches=1",
]
Run = Callable[..., int]


@pytest.fixture
def to_nobody() -> Iterator[Run]:
    """Runs a command whose stdout and stderr are pipes that nobody reads; returns its exit code."""
    reader, writer = os.pipe()
    os.close(reader)

    def run(name: str, *arguments: str) -> int:
        module = import_module(f"vitkd.{name}.__main__")
        with ExitStack() as ends:
            for redirect in (redirect_stdout, redirect_stderr):
                ends.enter_context(redirect(ends.enter_context(os.fdopen(os.dup(writer), "w"))))
            ends.enter_context(fresh_process(module.__name__, *arguments))
            try:
                module.main()
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    yield run
    os.close(writer)


def states(outputs: Path) -> list[str]:
    return [json.loads(file.read_text())["state"] for file in outputs.glob("digits/*/status.json")]


@pytest.mark.parametrize(
    ("jobs", "code"),
    [
        ([], 0),
        (["-m", "seed=0,1"], 0),
        (["-m", "seed=-1,0"], 1),
        (["-m", "hydra/launcher=stacked", "seed=0,1"], 0),
    ],
    ids=["one run", "a sweep", "a sweep with an error", "a stack"],
)
def test_no_run_and_no_later_job_stops_because_nobody_reads(jobs, code, to_nobody, tmp_path):
    assert to_nobody("train", *TINY, f"paths.outputs={tmp_path}", *jobs) == code

    assert states(tmp_path) == ["done"] * (2 if jobs and not code else 1)


@pytest.mark.parametrize(
    ("name", "arguments", "code"),
    [
        ("train", ["--help"], 0),
        ("train", ["--cfg", "job"], 0),
        ("train", ["alhpa=1"], 2),
        ("evaluate", ["--help"], 0),
        ("evaluate", ["run=RUN"], 0),
        ("explain", ["run=nowhere"], 2),
    ],
)
def test_a_command_ends_as_ever_where_nobody_reads(name, arguments, code, to_nobody, finished):
    assert to_nobody(name, *(argument.replace("RUN", str(finished)) for argument in arguments)) == code


def test_a_path_is_no_markup(command, tmp_path):
    """rich would take [red] for a colour, fail on [/bold] and draw a beetle."""
    outputs = tmp_path / "[red]x[/bold]:beetle:"
    names = "name='a[b]:bug:',c"

    trained = command("train", *TINY, "name='a[bold]'", f"paths.outputs='{outputs}'")
    swept = command("train", "-m", *TINY, names, f"paths.outputs='{outputs}'")
    reported = command("report", str(outputs))

    assert (trained.code, swept.code, reported.code) == (0, 0, 0), (trained.err, swept.err)
    lines = [*trained.out.splitlines(), *swept.out.splitlines(), *reported.out.splitlines()]
    places = {line.split(maxsplit=1)[1] for line in lines if line.startswith(("run ", "folders "))}
    assert places >= {f"{outputs}/digits", *map(str, outputs.glob("digits/*"))}
    assert any(line.startswith("0 name='a[b]:bug:'") and line.endswith("a[b]:bug:") for line in lines)
    assert any(str(outputs / "report" / "report.html") in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "environment"),
    [
        (">&-", {}),
        ("2>&-", {}),
        ("<&- >&- 2>&-", {}),
        ("| true", {}),
        ("2>&1 | head -c 1", {}),
        ("", {"PYTHONIOENCODING": "ascii"}),
        ("", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    ],
    ids=str,
)
def test_a_process_trains_on_any_console(to, environment, tmp_path):
    program = f"{sys.executable} -m vitkd.train {' '.join(TINY)}"
    line = ["bash", "-o", "pipefail", "-c", f"{program} {to}"]

    done = subprocess.run(line, cwd=tmp_path, env=os.environ | environment, capture_output=True, check=False)

    assert (done.returncode, done.stderr) == (0, b""), done
    assert states(tmp_path / "outputs") == ["done"]


def test_a_report_is_written_where_its_terminal_knows_ascii_only(finished, tmp_path):
    line = [sys.executable, "-m", "vitkd.report", str(finished), "--out", str(tmp_path / "out")]

    done = subprocess.run(
        line, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out" / "report.html").exists()
