"""The whole grid by the real command: how long it takes, and what share of the machine's peak it uses.

python -m benchmarks.grid --data data

runs `python -m vitkd.train -m hydra/launcher=stacked granularity=… loss=… alpha=… seed=…` with the report's
models on CIFAR-100 for one epoch, beside a teacher of one epoch that is trained first. On CUDA that is the
grid of 108 jobs; on a CPU nine jobs and a few batches, unless asked otherwise. The table says what was run.

What it takes besides the options of every benchmark:

--data DIR       where `cifar-100-python` lies; default $VITKD_DATA or data. Without it digits stand in, with
                 the same models and the same 17 tokens, and the teacher asked at every step.
--teacher PATH   a run folder, instead of training a teacher.
KEY=VALUE        more overrides, also of the axes: alpha=0.5,1 seed=0 trainer.limit_train_batches=null

`training` is the time of steps alone, `fit` has validation and checkpoints too, and `whole command` also what
comes before and after: imports, the test split, each run's files. The projection takes training and
validation for as many epochs, everything else once.

The share of the peak counts the matrix products of all students, and of the teacher once for each seed. The
peak is the maker's figure for the precision that the overrides ask for; a CPU's is the rate of large float32
products, measured here.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import flops
from benchmarks.command import ROOT, environment, train_command
from benchmarks.harness import Row, Settings, row
from benchmarks.harness import main as run
from benchmarks.subject import TINY
from vitkd.data.library_sets import FOLDERS
from vitkd.models import ViTConfig
from vitkd.process.isolation import set_matmul_precision
from vitkd.runs.folder import RunFolder
from vitkd.runs.provenance import device_name

WHOLE = {
    "granularity": "head,block,encoder",
    "loss": "mse,ce,kl",
    "alpha": "0.00015,0.015,0.5,1",
    "seed": "0,1,2",
}
ON_CPU = WHOLE | {"alpha": "0.5", "seed": "0", "trainer.limit_train_batches": "30"}
QUICK = ON_CPU | {"granularity": "head,block", "loss": "kl", "trainer.limit_train_batches": "2"}
QUICK |= {"trainer.limit_val_batches": "1"}
EPOCHS = 100
TRAINING_IMAGES = 45_000
"""of the report's data set, less what is held out for validation"""


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    settings: Settings
    overrides: dict[str, str]
    """the axes, and what else was set"""
    data: Path
    teacher: Path | None

    @property
    def has_images(self) -> bool:
        """Whether the report's data set is there."""
        return (self.data / FOLDERS["CIFAR100"]).is_dir()

    def shared(self, outputs: Path) -> list[str]:
        """What the teacher's run and the grid have in common."""
        dataset = ["dataset=cifar100"] if self.has_images else ["dataset=digits", "teacher.cache=off"]
        tiny = [setting for setting in TINY if self.settings.quick and setting.startswith("dataset.")]
        accelerator = "cpu" if self.settings.on_cpu else "gpu"
        places = [f"paths.data={self.data}", f"paths.outputs={outputs}", f"trainer.accelerator={accelerator}"]
        return [*dataset, *tiny, *places, "trainer.max_epochs=1"]

    def model(self, role: str, option: str) -> list[str]:
        """The overrides that make `option` the teacher or the student."""
        sizes = [setting.partition(".")[2] for setting in TINY if setting.startswith(f"{role}.")]
        return [f"student={option}", *(f"student.{size}" for size in sizes if self.settings.quick)]

    def limits(self) -> list[str]:
        """How little of an epoch is run."""
        return [f"{key}={value}" for key, value in self.overrides.items() if key.startswith("trainer.limit")]

    def in_words(self) -> str:
        """The grid in one line."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Run:
    """One job's figures."""

    images: int
    """trained on"""
    images_per_second: float
    fit_seconds: float
    students: int
    """of its stack"""
    seed: int


def measure(settings: Settings, plan: Plan) -> list[Row]:
    """Run the grid once a round, and the teacher before."""
    precision = {"matmul_precision": "highest" if settings.on_cpu else "high"}
    plan = replace(plan, settings=settings, overrides=axes(settings) | precision | plan.overrides)
    set_matmul_precision(plan.overrides["matmul_precision"], settings.device)
    images = "CIFAR-100" if plan.has_images else "digits, for CIFAR-100 is not there"
    print(f"grid: {plan.in_words()}; {images}")
    with tempfile.TemporaryDirectory() as folder:
        teacher_seconds = [] if plan.teacher else [train_teacher(plan, Path(folder))]
        teacher = plan.teacher or Path(folder, "teacher")
        rounds = [run_grid(plan, teacher, Path(folder, f"round-{n}")) for n in range(settings.rounds)]
        models = [ViTConfig(**shape) for shape in shapes(Path(folder, "round-0"), teacher)]
    return [
        *([row("teacher, 1 epoch: whole command", teacher_seconds, "s")] if teacher_seconds else []),
        *rows(plan, [whole for whole, _ in rounds], [runs for _, runs in rounds], models[0], models[1]),
    ]


def axes(settings: Settings) -> dict[str, str]:
    """What is run unless asked otherwise."""
    return QUICK if settings.quick else ON_CPU if settings.on_cpu else WHOLE


def train_teacher(plan: Plan, outputs: Path) -> float:
    """Seconds to train a teacher of one epoch, left in outputs/teacher."""
    model = plan.model("teacher", "report_teacher")
    seconds = call([*plan.shared(outputs), *plan.limits(), *model, "method=none", "name=teacher"])
    (found,) = outputs.glob("*/teacher")
    found.rename(outputs / "teacher")
    return seconds


def run_grid(plan: Plan, teacher: Path, outputs: Path) -> tuple[float, list[Run]]:
    """Seconds of the whole command, and its runs."""
    asked = [f"{key}={value}" for key, value in plan.overrides.items()]
    shared = [*plan.shared(outputs), *plan.model("student", "report"), f"teacher.checkpoint={teacher}"]
    seconds = call(["-m", "hydra/launcher=stacked", *shared, *asked])
    return seconds, [read_run(path.parent) for path in outputs.glob("*/*/metrics.json")]


def call(overrides: Sequence[str]) -> float:
    """Seconds that the command takes; its output is shown if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        train_command(*overrides), cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nvitkd.train ended with {done.returncode}")
    return time.perf_counter() - start


def read_run(folder: Path) -> Run:
    """What a run folder says."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    config = RunFolder(folder).read_config()
    return Run(
        metrics["steps"] * config["dataset"]["batch_size"],
        metrics["images_per_second"],
        metrics["wall_seconds"],
        metrics.get("stack/students", 1),
        metrics["seed"],
    )


def shapes(outputs: Path, teacher: Path) -> list[Mapping[str, Any]]:
    """The settings of the student's and the teacher's model."""
    student = next(outputs.glob("*/*/metrics.json")).parent
    nodes = [RunFolder(folder).read_config()["student"] for folder in (student, teacher)]
    return [{k: v for k, v in node.items() if k in ViTConfig.__dataclass_fields__} for node in nodes]


def rows(
    plan: Plan,
    whole: Sequence[float],
    rounds: Sequence[Sequence[Run]],
    student: ViTConfig,
    teacher: ViTConfig,
) -> list[Row]:
    """The table; one sample a round."""
    training = [sum(r.images / r.images_per_second / r.students for r in runs) for runs in rounds]
    fits = [sum(r.fit_seconds / r.students for r in runs) for runs in rounds]
    rates = [sum(r.images for r in runs) / s for runs, s in zip(rounds, training, strict=True)]
    work = [operations(runs, student, teacher) / s for runs, s in zip(rounds, training, strict=True)]
    label, peak = peak_of(plan)
    first = rounds[0]
    return [
        row("students", [float(len(runs)) for runs in rounds], ""),
        row("images a student", [float(first[0].images)], ""),
        row("whole command", whole, "s"),
        row("fit: training, validation, checkpoints", fits, "s"),
        row("training", training, "s"),
        row("images × students a second", rates, "/s"),
        row("matrix products", [rate / 1e9 for rate in work], "GFLOP/s"),
        row(f"share of {label}, {peak / 1e12:.3g} TFLOP/s", [100 * rate / peak for rate in work], "%"),
        row(
            f"projected: {EPOCHS} epochs, whole command", projected(plan, whole, fits, training, first), "min"
        ),
    ]


def operations(runs: Sequence[Run], student: ViTConfig, teacher: ViTConfig) -> float:
    """Of all students, and of the teacher, which is asked for its last scores once a seed and stack."""
    own = flops.training_flops(student) * sum(r.images for r in runs)
    stacks = {(r.seed, r.students, r.images_per_second): r.images for r in runs}
    return own + flops.scores_flops(teacher, teacher.depth - 1) * sum(stacks.values())


def projected(
    plan: Plan, whole: Sequence[float], fits: Sequence[float], training: Sequence[float], runs: Sequence[Run]
) -> list[float]:
    """Minutes for all epochs on all images; validation is taken to last as long each time."""
    epochs = TRAINING_IMAGES / runs[0].images * EPOCHS
    return [
        (steps * epochs + (fit - steps) * EPOCHS + total - fit) / 60
        for total, fit, steps in zip(whole, fits, training, strict=True)
    ]


def peak_of(plan: Plan) -> tuple[str, float]:
    """What the machine can do, and how that is known."""
    device, precision = plan.settings.device, precision_of(plan.overrides)
    name = device_name(device)
    if not plan.settings.on_cpu and (peak := flops.known_peak(name, precision)):
        return f"{name}'s {precision} peak", peak
    return "the rate of large float32 products here", flops.measured_peak(
        device, size=256 if plan.settings.quick else flops.SIZE
    )


def precision_of(overrides: Mapping[str, str]) -> str:
    """In what the overrides have matrices multiplied."""
    if any(overrides.get(f"{plus}trainer.precision", "").startswith("bf16") for plus in ("", "+", "++")):
        return "bf16"
    return "float32" if overrides.get("matmul_precision", "highest") == "highest" else "tf32"


def read_arguments(argv: Sequence[str] | None) -> tuple[Plan, list[str]]:
    """The plan without its settings, and the arguments that are every benchmark's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VITKD_DATA", "data")))
    parser.add_argument("--teacher", type=Path)
    own, others = parser.parse_known_args(argv)
    own_overrides = [argument for argument in others if re.match(r"\+?[\w./@]+=", argument)]
    rest = [argument for argument in others if argument not in own_overrides]
    overrides = dict(argument.split("=", 1) for argument in own_overrides)
    nothing_yet = Settings(torch.device("cpu"), quick=False, rounds=1)
    teacher = own.teacher and own.teacher.resolve()
    return Plan(nothing_yet, overrides, own.data.resolve(), teacher), rest


def main(argv: Sequence[str] | None = None) -> list[Row]:
    plan, rest = read_arguments(argv)
    return run("grid", __doc__, partial(measure, plan=plan), rest, rounds=1)


if __name__ == "__main__":
    main()
