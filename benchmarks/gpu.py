"""Whether the GPU path is right, and where its time goes: one command, a minute on an H100.

python -m benchmarks.gpu
python -m benchmarks.gpu --profiles DIR

Trains, through the very Trainer and callbacks of a run, stacks of S students of mixed granularities and
losses (S = 1: one by itself) on random batches of 64 images of CIFAR-100's size. It checks, for each S,

captured   that steps after the first few are replays of a CUDA graph
eager      that a few replays leave the weights of as many steps without a graph, with dropout and without
dropout    that two replays on one batch have different losses (dropout 0.1, learning rate 0)
rate       that weights stop where the schedule's rate becomes 0
NaN        that a batch that is not finite leaves the weights as they were, and is reported
kernels    that Triton kernels lead to the losses of PyTorch's (kernels=off), dropout included in a stack

and then measures milliseconds a replay and the peak of memory, by precision: fp32, TF32
(matmul_precision=high) and bf16-mixed; and on a line of their own those with kernels=off. --profiles writes
the kernels' times of the teacher's step, in TF32, and of two stacks', by name and by shape. The exit code is
1 where a check has failed. On a CPU there is nothing to capture, nor are there Triton kernels: --quick shows
that the rest works.
"""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import stack, subject
from benchmarks.harness import WIDTH, Settings, synchronize
from vitkd.cli.console import start_logging
from vitkd.config.run import Config
from vitkd.data import Batch, join
from vitkd.errors import RunError
from vitkd.models import ViT
from vitkd.models.kernels import allow_kernels
from vitkd.optim import Constant, Schedule
from vitkd.process.isolation import free_memory, isolated, set_matmul_precision
from vitkd.train.callbacks import CudaGraphs
from vitkd.train.cuda_graph import WARM_UP
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

SIZES, QUICK_SIZES = (1, 16, 54, 108), (1, 3)
PROFILED = (16, 54)
PRECISIONS = {"fp32": ("32-true", "highest"), "TF32": ("32-true", "high"), "bf16": ("bf16-mixed", "high")}
"""name → trainer.precision, matmul_precision"""
REPLAYS = 6
STEPS = 1 + WARM_UP + 1 + REPLAYS
"""of a check: the first one measures gradients, a graph of its own"""

CLOSE = 1e-3
"""The largest difference of a weight between replays and eager steps, relative to how far it has moved."""


class Batches:
    """A loader of batches on the device; Lightning calls `set_epoch` of nothing here."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


@dataclass
class Steps(L.Callback):
    """Notes weights and the sum of losses after each step, how many were replays, and the last ones' time."""

    timed: int = 0
    """how many of the last steps are timed together; then nothing else is noted"""
    losses: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    replays: int = 0
    seconds: float = math.nan

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        if self.timed and batch_idx == trainer.num_training_batches - self.timed:
            synchronize(module.device)
            self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.timed:
            if index == trainer.num_training_batches - 1:
                synchronize(module.device)
                self.seconds = (time.perf_counter() - self._start) / self.timed
            return
        self.replays += module.graph is not None and module.step_kind in module.graph._graphs
        self.weights.append(torch.cat([p.detach().reshape(-1) for p in module.model.parameters()]))
        self.losses.append(module.window.meter._sums["total_loss"].clone())


class Drop(Schedule):
    """Rate 1 for so many steps, then 0."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def factor(self, step: int, total_steps: int) -> float:
        return float(step < self.steps)


@dataclass
class Subject:
    """What is probed: S students beside one teacher."""

    config: Config
    teacher: ViT
    students: int
    device: torch.device

    @cached_property
    def _modules(self) -> list[DistillModule]:
        return stack.students(self.config, self.teacher, self.students)

    def module(self, schedule: Schedule | None = None, lr: float | None = None) -> DistillModule:
        """The students, with the same weights each time."""
        modules = self._modules if self.students > 1 else deepcopy(self._modules)
        for module in modules:
            module.optimizer = deepcopy(self.config.optimizer)
            module.optimizer.lr = module.optimizer.lr if lr is None else lr
            module.schedule = schedule or Constant()
        if self.students == 1:
            return modules[0]
        orders = [student % stack.SEEDS for student in range(self.students)]
        return StackedModule(modules, orders, range(self.students), self.device)

    def batches(self, count: int, same: bool = False) -> list[Batch]:
        """So many batches, [B, …], or of a stack [U, B, …]."""
        torch.manual_seed(2)
        made = [self._batch() for _ in range(1 if same else count)]
        return made * count if same else made

    def _batch(self) -> Batch:
        if self.students == 1:
            return subject.random_batch(self.config, self.device)
        orders = [subject.random_batch(self.config, self.device) for _ in range(stack.SEEDS)]
        return join(orders)

    def train(
        self,
        module: DistillModule,
        batches: Sequence[Batch],
        steps: Steps,
        precision: str = "fp32",
        graphed: bool = True,
    ) -> Steps:
        """Train on the batches, once, as a run does."""
        trainer_precision, matmul_precision = PRECISIONS[precision]
        set_matmul_precision(matmul_precision, self.device)
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision=trainer_precision,  # type: ignore[arg-type]
            max_epochs=1,
            log_every_n_steps=10**6,
            limit_val_batches=0,
            callbacks=[*([CudaGraphs()] if graphed else []), steps],
            **dict.fromkeys(
                ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
            ),
        )
        trainer.fit(module, Batches(batches), [])
        return steps


def captured(dry: Subject, wet: Subject) -> str:
    """Whether steps after the first few are replays."""
    if dry.device.type == "cpu":
        return "no GPU"
    return verdict(dry.train(dry.module(), dry.batches(STEPS), Steps()).replays == REPLAYS + 1)


def as_eager(dry: Subject, wet: Subject) -> str:
    """Whether replays lead to the weights of steps without a graph."""
    off = max(from_eager(dry), from_eager(wet))
    return verdict(off < CLOSE, f"{off:.1g}")


def from_eager(probe: Subject) -> float:
    """The largest difference of a weight after replays, as a share of how far weights have moved."""
    found = []
    for graphed in (True, False):
        module, batches = probe.module(), probe.batches(STEPS)
        torch.manual_seed(3)  # of a single student's masks
        found.append(probe.train(module, batches, Steps(), graphed=graphed).weights)
    replayed, eager = found
    return float((replayed[-1] - eager[-1]).abs().max() / (eager[-1] - eager[0]).abs().max())


def masks_differ(dry: Subject, wet: Subject) -> str:
    """Whether two steps on one batch, without learning, have different losses."""
    still = wet.train(wet.module(lr=0.0), wet.batches(STEPS, same=True), Steps())
    # Sums over the steps so far; the last step ends the window, and they begin at 0 again.
    first, second = (now - before for before, now in pairwise(still.losses[-4:-1]))
    return verdict(bool((first != second).all()))


def rate_moves(dry: Subject, wet: Subject) -> str:
    """Whether weights stop where the rate becomes 0."""
    weights = dry.train(dry.module(schedule=Drop(STEPS - 2)), dry.batches(STEPS), Steps()).weights
    return verdict(not torch.equal(weights[-3], weights[-4]) and torch.equal(weights[-1], weights[-2]))


def held_back(dry: Subject, wet: Subject) -> str:
    """Whether a last batch that is not finite changes nothing but the report."""
    *batches, last = dry.batches(STEPS)
    bad = last._replace(image=torch.full_like(last.image, math.nan))
    module = dry.module()
    try:
        dry.train(module, [*batches, bad], Steps())
    except RunError as error:
        reported = "not finite" in str(error)
    else:
        reported = False
    # A stack continues without its bad students: here all are bad.
    kept = dry.students > 1 or all(torch.isfinite(p).all() for p in module.model.parameters())
    return verdict(reported and kept)


def same_losses(dry: Subject, wet: Subject) -> str:
    """Whether steps by kernels have the losses that they have without.

    Not their weights: AdamW makes whole steps of gradients that are nothing but rounding.
    """
    # A student by itself draws its masks from PyTorch's generator, others each time.
    probe = dry if dry.students == 1 else wet
    losses = []
    for choice in ("auto", "off"):
        with kernels(choice):
            losses.append(probe.train(probe.module(), probe.batches(STEPS), Steps()).losses[-2])
    by_kernels, plain = losses
    off = float(((by_kernels - plain) / plain).abs().max())
    return verdict(off < CLOSE, f"{off:.1g}")


CHECKS: dict[str, Callable[[Subject, Subject], str]] = {
    "captured": captured,
    "eager": as_eager,
    "dropout": masks_differ,
    "rate": rate_moves,
    "NaN": held_back,
    "kernels": same_losses,
}
"""`yes`, `NO` and what was found, or why it does not apply"""


def checks(dry: Subject, wet: Subject) -> dict[str, str]:
    """Each check's outcome.

    Args:
        dry: without dropout.
        wet: the same with it.
    """
    return {name: attempt(partial(check, dry, wet)) for name, check in CHECKS.items()}


def attempt(work: Callable[[], str]) -> str:
    """What `work` found; NO and the error if it failed, for the others are worth knowing all the same."""
    try:
        return work()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        traceback.print_exc()
        return verdict(False, type(error).__name__)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """With the setting kernels=`choice`."""
    allow_kernels(choice)
    yield
    allow_kernels("off")


def verdict(holds: bool, found: str = "") -> str:
    """In the table; failures catch the eye."""
    return f"{'yes' if holds else 'NO'} {found}".rstrip()


def probe_of(students: int, dropout: float, settings: Settings) -> Subject:
    """So many students beside the report's teacher."""
    config = subject.configure(settings, f"student.dropout={dropout}", f"student.emb_dropout={dropout}")
    return Subject(config, subject.build_teacher(config, settings.device), students, settings.device)


def speeds(probe: Subject, choice: str, settings: Settings) -> dict[str, str]:
    """By precision, with kernels or without."""
    with kernels(choice):
        return {name: attempt(partial(speed, probe, name, settings)) for name in PRECISIONS}


def speed(probe: Subject, precision: str, settings: Settings) -> str:
    """Milliseconds a step and the peak of memory."""
    timed = 2 if settings.quick else 20
    batches = probe.batches(4) * math.ceil((1 + WARM_UP + 2 + timed) / 4)
    if not settings.on_cpu:
        torch.cuda.reset_peak_memory_stats()
    steps = probe.train(probe.module(), batches, Steps(timed=timed), precision)
    memory = "" if settings.on_cpu else f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"{steps.seconds * 1e3:.2f} ms{memory}"


def profile(name: str, work: Callable[[], object], folder: Path, settings: Settings) -> None:
    """Write the kernels of `work` by the time they take."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if not settings.on_cpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    synchronize(settings.device)
    with torch.profiler.profile(activities=kinds, record_shapes=True) as found:
        work()
        synchronize(settings.device)
    key = "self_cpu_time_total" if settings.on_cpu else "self_device_time_total"
    own = {"sort_by": key, "row_limit": 100, "max_name_column_width": 90, "max_shapes_column_width": 90}
    tables = [found.key_averages(group_by_input_shape=by_shape).table(**own) for by_shape in (False, True)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("\n".join(tables), encoding="utf-8")


def profiles(folder: Path, settings: Settings) -> None:
    """The teacher's training step, and the steps of two stacks, without graphs: kernels keep their names."""
    config = subject.configure(settings)
    teacher = subject.build_teacher(config, settings.device)
    batch = subject.random_batch(config, settings.device)
    learner = deepcopy(teacher).requires_grad_().train()
    loss = lambda: torch.nn.functional.cross_entropy(learner(batch.image).logits, batch.label)  # noqa: E731
    step = subject.training_step([*learner.parameters()], config.optimizer, loss)
    profile("teacher", step, folder, settings)
    for students in QUICK_SIZES[1:] if settings.quick else PROFILED:
        whole = stack.stacked(config, teacher, students, stack.SEEDS, lambda each: each)
        for precision in ("TF32", "bf16"):
            mixed = torch.autocast(settings.device.type, torch.bfloat16, enabled=precision == "bf16")
            profile(f"stack-{students}-{precision}", mixed(whole), folder, settings)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: does it work?")
    parser.add_argument("--profiles", type=Path, metavar="DIR", help="write the kernels' times there")
    return parser.parse_args(argv)


@isolated()
def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print one line a stack; the exit code."""
    options = read_arguments(argv)
    start_logging()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device, options.quick, rounds=1)
    if device.type == "cpu" and not options.quick:
        sys.exit("error: there is no CUDA device here; --quick shows that the command works")
    set_matmul_precision("auto", device)
    if options.profiles:
        with kernels("auto"):
            profiles(options.profiles, settings)
    lines = []
    for students in QUICK_SIZES if options.quick else SIZES:
        try:
            dry, wet = (probe_of(students, dropout, settings) for dropout in (0.0, 0.1))
            outcomes = checks(dry, wet)
            lines.append((str(students), outcomes | speeds(wet, "auto", settings)))
            if not settings.on_cpu:
                plain = speeds(wet, "off", settings)
                lines.append((f"{students}, off", dict.fromkeys(outcomes, "") | plain))
        except torch.OutOfMemoryError:
            print(f"S = {students}: out of memory")
            break
        free_memory()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("S", *lines[0][1]):
        table.add_column(heading, justify="right")
    for label, found in lines:
        table.add_row(label, *found.values())
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    return int(any(value.startswith("NO") for _, found in lines for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
