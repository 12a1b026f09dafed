"""What a step costs besides its arithmetic, and how long a command takes to get to its first step.

Steps: a model so small that the arithmetic is next to nothing, alone and beside a teacher, on digits.
`bare loop` computes the same losses on the same batches, with backward and fused AdamW, and nothing else.
`own work` adds what vitkd does at every step: the check for NaN, the curves' means, the learning rate.
`Lightning` trains by a Trainer without loggers or callbacks. `run` is `vitkd.train.fit.fit` with all
that a run has: TensorBoard, metrics.csv, checkpoints, signals. The first steps and what comes at an epoch's
end (validation, checkpoints) are left out. The last three are shown less the bare loop of the same round.

Curves: what it takes to add a step's three losses and its accuracy to their means, by vitkd's meter and by
torchmetrics' `MeanMetric` and `MulticlassAccuracy`, whose checks for NaN and of arguments are switched off.
The ratio is to the meter.

Start: `python -m vitkd.train` in a new process, the teacher stored already and every setting the default,
from before the process begins until the student's first training step; and the imports' part of it.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from benchmarks import subject
from benchmarks.harness import Bar, Row, Settings, divided, in_turns, interleave, row, synchronize
from benchmarks.harness import main as run
from vitkd.cli.console import start_logging
from vitkd.config.run import Config, Paths
from vitkd.data import Batch
from vitkd.methods.base import DataFacts
from vitkd.optim import trained_by
from vitkd.runs.folder import RunFolder
from vitkd.train.build import build_module
from vitkd.train.fit import fit
from vitkd.train.logged import Meter
from vitkd.train.losses import share_equal
from vitkd.train.module import DistillModule
from vitkd.train.student import load_data

ROOT = Path(__file__).parents[1]
STEP_BAR, START_BAR = Bar(0.15), Bar(5)
WARMUP_STEPS = 20
SIZES = ("embed_dim=8", "head_dim=4", "depth=1")
SMALL = [f"{model}.{size}" for model in ("teacher", "student") for size in SIZES]

Step = Callable[[Batch], object]


def measure(settings: Settings) -> list[Row]:
    """A step's extra milliseconds, for a model alone and for a distilled student, and a start's seconds."""
    with quiet():
        per_step = [*steps(settings, "alone", "none"), *steps(settings, "distilled", "attention")]
    return per_step + curves(settings) + start(settings)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what a run tells its user."""
    start_logging()
    log = logging.getLogger("vitkd")
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(logging.INFO)


def steps(settings: Settings, title: str, method: str) -> list[Row]:
    """The rows of one method: the bare loop, and what each kind of loop takes longer."""
    limit = WARMUP_STEPS + (5 if settings.quick else 280)
    config = subject.configure(
        settings,
        *(*SMALL, f"method={method}", f"trainer={'cpu' if settings.on_cpu else 'gpu'}"),
        *("dataset.batch_size=4", "trainer.max_epochs=1", f"trainer.limit_train_batches={limit}"),
        dataset="digits",
    )
    loops = {"bare loop": bare, "own work": own_work, "Lightning": lightning_alone, "run": whole_run}
    samples = in_turns(
        {name: partial(loop, config, settings.device) for name, loop in loops.items()},
        settings.rounds,
        warmup=1,
    )
    base = samples.pop("bare loop")
    rows = [row(f"{title}: bare loop", base)]
    for name, times in samples.items():
        extra = [time - bare_time for time, bare_time in zip(times, base, strict=True)]
        bar = STEP_BAR if name == "run" and settings.on_cpu else None
        rows.append(row(f"{title}: {name}, a step's extra", extra, bar=bar))
    return rows


def curves(settings: Settings) -> list[Row]:
    """The rows of a step's means, by the meter and by torchmetrics."""
    device, meter = settings.device, Meter()
    logits, label = torch.randn(64, 10, device=device), torch.randint(10, (64,), device=device)
    losses = dict(
        zip(("class_loss", "transfer_loss", "total_loss"), torch.rand(3, device=device), strict=True)
    )
    means = {name: MeanMetric(nan_strategy="disable").to(device) for name in losses}
    accuracy = MulticlassAccuracy(10, average="micro", validate_args=False).to(device)

    def by_meter() -> None:
        meter.add({**losses, "acc": share_equal(logits.argmax(-1), label)}, len(label))

    def by_torchmetrics() -> None:
        for name, loss in losses.items():
            means[name].update(loss, len(label))
        accuracy.update(logits, label)

    arms = {"curves: vitkd's meter": by_meter, "curves: torchmetrics": by_torchmetrics}
    samples = interleave(arms, settings, repeat=5 if settings.quick else 500)
    base = samples["curves: vitkd's meter"]
    return [row(name, times, ratio=divided(times, base)) for name, times in samples.items()]


def build(config: Config, device: torch.device) -> DistillModule:
    """The configuration's module; student and teacher, if it has one, with random weights."""
    teacher = config.teacher.model.build() if config.method.needs_teacher else None
    student = config.student.build()
    # Neither method looks at the data before it trains.
    facts = DataFacts(0, config.student.num_classes, lambda: torch.empty(0))
    return build_module(config, student, teacher, facts).to(device).train()


def bare(config: Config, device: torch.device) -> float:
    """Milliseconds a step of a loop with nothing in it that could be left out."""
    module = build(config, device)
    optimizer = config.optimizer.build(module.model.parameters())

    def step(batch: Batch) -> None:
        module.losses(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return loop(config, device, step)


def own_work(config: Config, device: torch.device) -> float:
    """Milliseconds a step with vitkd's guard, meter and schedule, and without Lightning."""
    module = build(config, device)
    optimizer = config.optimizer.build(module.model.parameters())
    total = config.trainer["limit_train_batches"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.schedule.factor(step, total))

    def step(batch: Batch) -> None:
        losses = module.losses(batch)
        module.guard.watch(losses.terms(), batch.index)
        module.window.meter.add(module.measures(losses, batch.label), len(batch.label))
        losses.total.backward()
        if not module.guard.hold_back(optimizer, trained_by(optimizer)):
            module.guard.check(0, 0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return loop(config, device, step)


def loop(config: Config, device: torch.device, step: Step) -> float:
    """Milliseconds a step over a run's batches, without the first ones."""
    number, limit = 0, config.trainer["limit_train_batches"]
    for number, batch in enumerate(islice(load_data(config).loader("train", device), limit)):
        if number == WARMUP_STEPS:
            synchronize(device)
            begin = time.perf_counter()
        step(batch)
    synchronize(device)
    return (time.perf_counter() - begin) / (number + 1 - WARMUP_STEPS) * 1e3


class Stopwatch(Callback):
    """Milliseconds a step of an epoch, without the first ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin, self.milliseconds = 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARMUP_STEPS:
            synchronize(self.device)
            self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            synchronize(self.device)
            steps = trainer.global_step - WARMUP_STEPS
            self.milliseconds = (time.perf_counter() - self.begin) / steps * 1e3


class Plain(L.LightningModule):
    """A module's losses and optimiser, none of its other hooks."""

    def __init__(self, module: DistillModule, config: Config) -> None:
        super().__init__()
        self.module, self.config = module, config

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.module.losses(batch).total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.config.optimizer.build(self.module.model.parameters())


def lightning_alone(config: Config, device: torch.device) -> float:
    """Milliseconds a step of a Trainer with neither loggers nor callbacks but the stopwatch."""
    stopwatch = Stopwatch(device)
    silent = {f"enable_{what}": False for what in ("checkpointing", "progress_bar", "model_summary")}
    trainer = L.Trainer(
        **config.trainer,
        logger=False,
        callbacks=[stopwatch],
        **silent,  # type: ignore[arg-type]
    )
    trainer.fit(Plain(build(config, device), config), load_data(config).loader("train", device))
    return stopwatch.milliseconds


def whole_run(config: Config, device: torch.device) -> float:
    """Milliseconds a step of a run as `python -m vitkd.train` makes it."""
    stopwatch = Stopwatch(device)
    with tempfile.TemporaryDirectory() as place:
        own = replace(config, paths=Paths(config.paths.data, place))
        folder = RunFolder.claim(Path(place, "run"))
        with folder.running(own.resolved, {}):
            fit(build(own, device), load_data(own), folder, own, [stopwatch])
    return stopwatch.milliseconds


def start(settings: Settings) -> list[Row]:
    """Seconds from the command to the first step, and the imports' share."""
    with tempfile.TemporaryDirectory() as outputs:
        command = [
            f"paths.outputs={outputs}",
            "teacher.max_epochs=1",
            f"trainer={'cpu' if settings.on_cpu else 'gpu'}",
        ]
        first_step(command)  # trains the teacher
        times = [first_step(command) for _ in range(1 if settings.quick else 5)]
    imports, totals = zip(*times, strict=True)
    return [
        row("start: imports", imports, "s"),
        row(
            "start: from the command to the first step",
            totals,
            "s",
            bar=START_BAR if settings.on_cpu else None,
        ),
    ]


def first_step(command: Sequence[str]) -> tuple[float, float]:
    """Seconds until everything is imported, and until the first step's loss is there."""
    begin = time.monotonic()
    line = [sys.executable, "-m", "benchmarks.first_step", *command]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    imported, stepped = map(float, done.stdout.split()[-2:])
    return imported - begin, stepped - begin


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("overhead", __doc__, measure, argv, rounds=10)


if __name__ == "__main__":
    main()
