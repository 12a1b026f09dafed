"""The report's experiment on CIFAR-100 with several seeds, in stages that fit into the time there is.

python -m benchmarks.evidence --data data --minutes 8.5 --epochs fit --export results

Each stage is one command line of `vitkd.train`, printed before it runs:

teacher      the report's teacher, one a seed (--teachers); none with --teacher FILE
students-T   what learns from the teacher of seed T, as one stack: granularity × loss × alpha × seed. Among it
             are the student alone (alpha=1) and the report's cells. ce is left out: it trains just as kl
protocol-…   both once more, as the report measures: it reads as choosing the best epoch on the test images

With --minutes, no stage is begun that cannot finish: some steps of its very students are timed first, and a
line says what it would take and how many epochs fit. --epochs N trains students for fewer, `fit` for as many
as fit: at the report's constant learning rate, and only then, they are the first N of the whole training, and
the table says so. --in-parts begins a stage all the same, and stops it in time: the same command on the same
machine resumes it. After each stage --export has what is worth keeping (`benchmarks.evidence_table`).

The exit code is 0 when all is done, 75 when there is more to do, 1 when a stage failed. --quick runs all in
miniature, on digits. KEY=VALUE goes to every stage.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.command import as_typed, environment, train_command
from benchmarks.evidence_table import LOG, PROTOCOL, TEACHER, export, run_folders
from benchmarks.evidence_time import Axes, Cost, compose, measure
from benchmarks.studies import head, write_note
from vitkd.cli.console import start_logging
from vitkd.errors import ConfigError, RunError
from vitkd.models import digest
from vitkd.optim import Constant
from vitkd.runs.checkpoints import load_any

CELL = "experiment=report/block_kl"  # all cells are alike in their other settings
GRID = "granularity=head,block,encoder loss=mse,kl alpha=0.00015,0.015,0.5,1"
PROTOCOL_DATASET = "dataset=cifar100_report_protocol"
QUICK = ("dataset=digits", "trainer.limit_train_batches=3", "student=small")
# A row of metrics.csv an epoch, and the gradients' norms now and then: the files are to be kept.
HABITS = ("log_every_n_steps=1000", "pictures_every_n_epochs=0", "checkpoint_minutes=3")
FIT = 0
DONE = "done.txt"  # commands that have ended well: to ask vitkd.train takes seconds of imports
UNFINISHED, TERMINATED = 75, 128 + signal.SIGTERM  # sysexits.h: EX_TEMPFAIL, try again
RESERVE = 20.0  # seconds before the end at which a stage is stopped, to save, and the export written


@dataclass(frozen=True)
class Stage:
    """One command line of `vitkd.train`."""

    name: str
    settings: tuple[str, ...]
    axes: Axes
    epochs: int | None  # None for all, FIT for as many as fit

    @property
    def overrides(self) -> tuple[str, ...]:
        length = (f"trainer.max_epochs={self.epochs}",) if self.epochs else ()
        swept = (f"{name}={','.join(values)}" for name, values in self.axes.items())
        return ("-m", "hydra/launcher=stacked", *self.settings, *length, *swept)


def stages(options: Namespace) -> Iterator[Stage]:
    """The stages in order; one that needs a teacher which is not there yet is left out."""
    seeds = {"seed": tuple(map(str, range(options.teachers)))}
    quick = QUICK if options.quick else ()
    habits = (*HABITS, place("paths.data", options.data), *quick, *options.overrides)
    for prefix, own in {"": ()}.items() if options.quick else {"": (), PROTOCOL: (PROTOCOL_DATASET,)}.items():
        name = f"{prefix}{TEACHER}"
        if prefix or not options.teacher:
            outputs = place("paths.outputs", options.outputs / name)
            settings = ("experiment=report/teacher", *own, outputs, *habits)
            yield Stage(name, settings, seeds, options.teacher_epochs)
        for seed, teacher in teachers_of(options, name).items():
            name = f"{prefix}students-{seed}"
            outputs = place("paths.outputs", options.outputs / name)
            settings = (CELL, *own, place("teacher.checkpoint", teacher), outputs, *habits)
            yield Stage(name, settings, options.axes, options.epochs)


def place(setting: str, path: Path) -> str:
    """The setting as one types it: relative to where the command runs, if the path lies below.

    It becomes part of folders' names, and of what is exported.
    """
    here = Path.cwd()
    return f"{setting}={path.relative_to(here) if path.is_relative_to(here) else path}"


def teachers_of(options: Namespace, stage: str) -> dict[int, Path]:
    """Seed → the run folder of a stage's teacher, as far as they are done; or the file that was given."""
    if options.teacher and stage == TEACHER:
        return {0: options.teacher}
    done = (run for run in run_folders(options.outputs / stage) if run.state == "done")
    return dict(sorted((run.read_config()["seed"], run.path) for run in done))


def run_stages(options: Namespace) -> int:
    """Run what is not done yet until all is, one fails or the time is up; returns the exit code."""
    failed = set[str]()
    while waiting := next_stage(options, failed):
        # So short a rest would go into starting and saving alone.
        admitted = admit(options, waiting) if left(options) > RESERVE else None
        code = run_stage(options, admitted) if admitted else None
        if code is None:
            return UNFINISHED
        if code:
            failed.add(waiting.name)
        else:
            with (options.outputs / DONE).open("a", encoding="utf-8") as file:
                file.write(f"{waiting.overrides}\n")
            export(options.outputs, options.export)
    return 1 if failed else 0


def next_stage(options: Namespace, failed: set[str]) -> Stage | None:
    """The first stage that is neither done nor among those that failed."""
    path = options.outputs / DONE
    done = path.read_text("utf-8").splitlines() if path.exists() else []
    waiting = (s for s in stages(options) if s.name not in failed and str(s.overrides) not in done)
    return next(waiting, None)


def left(options: Namespace) -> float:
    """Seconds until a stage has to be asked to stop."""
    return float(options.end - RESERVE - time.monotonic())


def admit(options: Namespace, stage: Stage) -> Stage | None:
    """The stage with the epochs that it is to have; None, and a line, if it cannot finish in time."""
    config = compose([*stage.settings, *(f"{name}={values[0]}" for name, values in stage.axes.items())])
    whole: int = config.dataset.max_epochs
    if stage.epochs is not None and stage.epochs < whole and not isinstance(config.schedule, Constant):
        name = type(config.schedule).__name__
        raise ConfigError(f"--epochs: by {name} they are no part of {whole} epochs; set schedule=constant")
    if options.in_parts or math.isinf(options.end):
        return replace(stage, epochs=stage.epochs or whole)
    return fitted(options, stage, measure(stage.settings, stage.axes), whole)


def fitted(options: Namespace, stage: Stage, cost: Cost, whole: int) -> Stage | None:
    """The stage if it finishes in time; a line says what was measured and what fits."""
    seconds = max(left(options), 0)
    room = cost.epochs_in(seconds)
    epochs = min(max(room, 1), whole) if stage.epochs == FIT else stage.epochs or whole
    needed = (cost.fixed + epochs * cost.epoch) / 60
    line = f"{stage.name}: {cost}, {needed:,.1f} min for {epochs} of {whole}; {seconds / 60:.1f} min left"
    say(options, line if epochs <= room else f"{line}, room for {room}: not begun")
    return replace(stage, epochs=epochs) if epochs <= room else None


def run_stage(options: Namespace, stage: Stage) -> int | None:
    """Run a stage's command; its exit code, or None if it was stopped before it had ended."""
    command = train_command(*stage.overrides)
    say(options, f"{stage.name}: python {shlex.join(command[1:])}")
    start, code = time.monotonic(), None
    is_endless = math.isinf(options.end)
    with subprocess.Popen(command, env=environment()) as process:
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(None if is_endless else max(left(options), 0))
        finally:
            stop(process, None if is_endless else RESERVE / 2)
    outcome = "out of time" if code is None else f"ended with {code}"
    say(options, f"{stage.name}: {outcome} after {time.monotonic() - start:.0f} s")
    return code


def stop(process: "subprocess.Popen[bytes]", patience: float | None) -> None:
    """Let a stage that has not ended save and end, or kill it: it resumes from an earlier save."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()


def say(options: Namespace, line: str) -> None:
    """Print a line, and keep it for the export."""
    print(line, flush=True)
    options.outputs.mkdir(parents=True, exist_ok=True)
    with (options.outputs / LOG).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    epochs = {"type": lambda text: FIT if text == "fit" else int(text), "metavar": "N"}
    data, directory = Path(os.environ.get("VITKD_DATA", "data")), {"type": Path, "metavar": "DIR"}
    parser.add_argument("--data", **directory, default=data, help=f"holds the images ({data})")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no stage that takes longer")
    parser.add_argument("--in-parts", action="store_true", help="begin it, stop in time, resume next time")
    parser.add_argument("--teachers", type=int, default=1, help="seeds of teachers (1)")
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="a run folder or .safetensors instead")
    parser.add_argument("--seeds", type=int, default=3, help="of the students of each teacher (3)")
    parser.add_argument("--grid", default=GRID, help="what the students are swept over, in quotes")
    parser.add_argument("--epochs", **epochs, help="of the students, or fit (all)")
    parser.add_argument("--teacher-epochs", **epochs, help="of the teachers, or fit (all)")
    parser.add_argument("--outputs", **directory, help="run folders (outputs/evidence)")
    parser.add_argument("--export", **directory, help="what is worth keeping (OUTPUTS/export)")
    parser.add_argument("--note", default="", help="kept too, such as the commit where there is no .git")
    parser.add_argument("--quick", action="store_true", help="in miniature, on digits: does it work?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every stage")
    options = parser.parse_intermixed_args(argv)
    if options.teacher and options.teachers > 1:
        parser.error("--teacher is one teacher: leave --teachers out")
    options.end = time.monotonic() + options.minutes * 60
    outputs = options.outputs or Path("outputs", "evidence-quick" if options.quick else "evidence")
    options.outputs, options.data = outputs.resolve(), options.data.resolve()
    options.export = options.export or options.outputs / "export"
    options.teacher = options.teacher and options.teacher.resolve()
    axes = dict(axis.split("=", 1) for axis in options.grid.split())
    options.axes = {name: tuple(values.split(",")) for name, values in axes.items()}
    options.axes["seed"] = tuple(map(str, range(options.seeds)))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, then print the table; returns the exit code."""
    options = read_arguments(argv)
    start_logging()
    command = as_typed("benchmarks.evidence", argv)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        say(options, f"{time.strftime('%Y-%m-%d %H:%M')} {command}")
        if options.teacher:
            say(options, f"teacher: weights {digest(load_any(options.teacher))}, of {options.teacher}")
        code = run_stages(options)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    finally:
        signal.signal(signal.SIGTERM, before)
        table = export(options.outputs, options.export)
    if done := [run for run in run_folders(options.outputs) if run.state == "done"]:
        write_note(options.export, [command], done, options.note or head())
    print(f"{table}\n{options.export}{': the same command does the rest' if code == UNFINISHED else ''}")
    return code


if __name__ == "__main__":
    sys.exit(main())
