"""The report's experiment on CIFAR-100, with several seeds: ready to run on one GPU, in stages.

python -m benchmarks.evidence --data data
python -m benchmarks.evidence --data data --minutes 9

Both are the same experiment. The second stops in time: what trains then is saved, and the same command goes
on from there, as often as it takes. It ends with exit code 0 when all is done, 75 when there is more to do,
and 1 when a stage failed. All that is needed is that `vitkd` and what it needs can be imported (PYTHONPATH
may say from where; nothing has to be installed), and DIR/cifar-100-python. Call it from the same folder each
time.

Each stage is one command line of `vitkd.train`, printed before it runs:

teacher    the report's teacher, one a seed; the students learn from that of the first seed
cells      the student alone and the report's three cells, `experiment=report/…`
protocol-… teacher and cells once more, as the report measures
grid       granularity × loss × alpha

The grid leaves out loss=ce, which trains exactly as kl beside a frozen teacher, and alpha=1, the student
alone; --grid takes other axes. After the stages, or as many as there was time for, the figures of every
finished run are copied to benchmarks/evidence/DEVICE/runs (metrics.json, and metrics.csv in six digits), and
a table is written beside them: see `benchmarks.evidence_table` for what its columns are.

The report reads as choosing the best epoch on the test images. A run never does that by itself; the stages
protocol-… need a data set for it, cifar100_report_protocol in conf/dataset, and are left out where it is not.

--quick runs everything in miniature on digits. KEY=VALUE goes to every stage: trainer.precision=bf16-mixed
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.command import ROOT, environment, train_command
from benchmarks.evidence_table import PROTOCOL, TEACHER, collect, read_config, run_folders, state_of

STACKED = ("-m", "hydra/launcher=stacked")
CELLS = "experiment=report/student_alone,report/encoder_mse,report/block_mse,report/block_kl"
GRID = ("granularity=head,block,encoder", "loss=mse,kl", "alpha=0.00015,0.015,0.5")
PROTOCOL_DATASET = "cifar100_report_protocol"
QUICK = ("dataset=digits", "trainer.limit_train_batches=3", "student=small")
UNFINISHED = 75  # sysexits.h: EX_TEMPFAIL, try again
TERMINATED = 128 + signal.SIGTERM
# A row of metrics.csv an epoch, and the gradients' norms now and then: the files are to be kept.
LOG_EVERY = 1000


@dataclass(frozen=True)
class Stage:
    """One command line of `vitkd.train`."""

    name: str
    overrides: tuple[str, ...]

    def is_done(self, outputs: Path) -> bool:
        """Whether just this command has ended well."""
        mark = self._mark(outputs)
        return mark.exists() and mark.read_text("utf-8") == self._text

    def mark_done(self, outputs: Path) -> None:
        """Remember that it has: to find out from `vitkd.train` takes seconds of imports."""
        self._mark(outputs).write_text(self._text, "utf-8")

    @property
    def _text(self) -> str:
        return "\n".join(self.overrides) + "\n"

    def _mark(self, outputs: Path) -> Path:
        return outputs / self.name / "done.txt"


class Deadline:
    """When to stop, and how long before that a stage is asked to stop, so that it can save.

    Args:
        minutes: from now on; None for never.
    """

    def __init__(self, minutes: float | None) -> None:
        seconds = math.inf if minutes is None else minutes * 60
        self._end = time.monotonic() + seconds
        self.reserve = min(60.0, seconds / 4)

    @property
    def left(self) -> float:
        """Seconds until a stage has to be asked to stop."""
        return self._end - self.reserve - time.monotonic()


class Stopped(SystemExit):
    """The driver itself was asked to end."""


def stages(options: argparse.Namespace, teachers: dict[str, Path]) -> list[Stage]:
    """The stages in order; one that needs a teacher which is not there yet is left out.

    Args:
        options: the command line's.
        teachers: stage → the run folder of its first teacher, of those that are done.
    """
    found = teaching_and_cells(options, "", teachers)
    if has_protocol() and not options.quick:
        found += teaching_and_cells(options, f"{PROTOCOL}-", teachers, f"dataset={PROTOCOL_DATASET}")
    if teacher := teachers.get(TEACHER):
        grid = ("experiment=report/block_kl", *options.grid, f"teacher.checkpoint={teacher}")
        found.append(Stage("grid", command_of(options, "grid", options.grid_seeds, *grid)))
    return found


def teaching_and_cells(
    options: argparse.Namespace, prefix: str, teachers: dict[str, Path], *own: str
) -> list[Stage]:
    """A stage of teachers, and one of the report's cells, which learn from the first of them."""
    name, seeds = f"{prefix}{TEACHER}", options.seeds
    found = [Stage(name, command_of(options, name, seeds, "experiment=report/teacher", *own))]
    if teacher := teachers.get(name):
        learn, name = f"teacher.checkpoint={teacher}", f"{prefix}cells"
        found.append(Stage(name, command_of(options, name, seeds, CELLS, learn, *own)))
    return found


def command_of(options: argparse.Namespace, stage: str, seeds: int, *own: str) -> tuple[str, ...]:
    """The overrides of a stage."""
    seed = f"seed={','.join(map(str, range(seeds)))}"
    habits = (f"log_every_n_steps={LOG_EVERY}", "pictures_every_n_epochs=0", "checkpoint_minutes=3")
    places = (f"paths.data={options.data}", f"paths.outputs={options.outputs / stage}")
    length = f"trainer.max_epochs={options.epochs}"
    quick = QUICK if options.quick else ()
    return (*STACKED, *own, seed, *places, *habits, length, *quick, *options.overrides)


def has_protocol() -> bool:
    """Whether there is a data set that validates with the test images."""
    return (ROOT / "conf" / "dataset" / f"{PROTOCOL_DATASET}.yaml").is_file()


def first_teachers(outputs: Path) -> dict[str, Path]:
    """Stage → the run folder of the teacher of seed 0, where it is done."""
    return {
        stage: path
        for stage in (TEACHER, f"{PROTOCOL}-{TEACHER}")
        for path in run_folders(outputs / stage)
        if state_of(path) == "done" and read_config(path)["seed"] == 0
    }


def run_stages(options: argparse.Namespace, deadline: Deadline) -> int:
    """Run what is not done yet until all is, one fails or the time is up; returns the exit code."""
    failed = set[str]()
    while stage := next_stage(options, failed):
        # So short a rest would go into starting and saving alone.
        if deadline.left < deadline.reserve:
            return UNFINISHED
        code = run_stage(stage, deadline)
        if code is None:
            return UNFINISHED
        if code:
            failed.add(stage.name)
        else:
            stage.mark_done(options.outputs)
    return 1 if failed else 0


def next_stage(options: argparse.Namespace, failed: set[str]) -> Stage | None:
    """The first stage that is neither done nor among those that failed."""
    known = stages(options, first_teachers(options.outputs))
    waiting = (s for s in known if s.name not in failed and not s.is_done(options.outputs))
    return next(waiting, None)


def run_stage(stage: Stage, deadline: Deadline) -> int | None:
    """Run a stage's command; its exit code, or None if it was asked to stop before it had ended."""
    command = train_command(*stage.overrides)
    print(f"\n{stage.name}: {' '.join(command[1:])}", flush=True)
    with subprocess.Popen(command, cwd=Path.cwd(), env=environment()) as process:
        try:
            return process.wait(None if math.isinf(deadline.left) else max(deadline.left, 0))
        except subprocess.TimeoutExpired:
            print(f"{stage.name}: out of time; saving", flush=True)
            stop(process, deadline.reserve)
            return None
        except BaseException:
            stop(process, deadline.reserve)
            raise


def stop(process: "subprocess.Popen[bytes]", patience: float) -> None:
    """Let a stage save and end; what does not end is killed, and resumes from an earlier save."""
    process.terminate()
    try:
        process.wait(patience if math.isfinite(patience) else None)
    except subprocess.TimeoutExpired:
        process.kill()


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = Path(os.environ.get("VITKD_DATA", "data"))
    parser.add_argument("--data", type=Path, default=data, metavar="DIR", help=f"holds the images ({data})")
    parser.add_argument("--minutes", type=float, help="stop in time; the same command resumes")
    parser.add_argument("--seeds", type=int, default=5, help="of teacher and cells (5)")
    parser.add_argument("--grid-seeds", type=int, default=3, help="of the grid (3)")
    parser.add_argument("--grid", default=" ".join(GRID), help="its axes, in quotes")
    parser.add_argument("--epochs", type=int, help="100; with --quick 2")
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="run folders (outputs/evidence)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="figures and table (benchmarks/evidence)")
    parser.add_argument("--quick", action="store_true", help="in miniature, on digits: does it work?")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every stage")
    options = parser.parse_intermixed_args(argv)
    outputs = Path("outputs", "evidence-quick" if options.quick else "evidence")
    options.epochs = options.epochs or (2 if options.quick else 100)
    options.outputs = (options.outputs or outputs).resolve()
    options.results = options.results or (
        outputs / "results" if options.quick else ROOT / "benchmarks" / "evidence"
    )
    options.data, options.grid = options.data.resolve(), tuple(options.grid.split())
    if options.quick:
        options.seeds, options.grid_seeds = min(options.seeds, 2), min(options.grid_seeds, 2)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, then say where the table is; returns the exit code."""
    options = read_arguments(argv)

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        code = run_stages(options, Deadline(options.minutes))
    finally:
        signal.signal(signal.SIGTERM, before)
        table = collect(options.outputs, options.results)
    if table:
        print(f"\n{table.read_text('utf-8')}\n{table}")
    if code == UNFINISHED:
        print("unfinished: the same command resumes")
    return code


if __name__ == "__main__":
    sys.exit(main())
