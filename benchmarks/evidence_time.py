"""What a stage of the evidence would take: some steps of its very students are trained, and timed.

Images, models, objectives, Trainer and CUDA graph are the stage's; only the teacher's weights are random.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, product
from typing import Any, NamedTuple

import hydra
import lightning as L

from benchmarks.gpu import Steps
from vitkd.config.computing import compute_as
from vitkd.config.run import CONF_DIR, Config, parse
from vitkd.process.isolation import isolated
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_of
from vitkd.train.build import build_module, facts_of
from vitkd.train.callbacks import faster_steps
from vitkd.train.cuda_graph import WARM_UP
from vitkd.train.module import DistillModule
from vitkd.train.plan import check_trainer
from vitkd.train.stacked import StackedImages, StackedModule
from vitkd.train.stacked.candidates import in_stack_order, what_trains

Axes = Mapping[str, tuple[str, ...]]  # setting → the values that it is swept over
# Allowances: seconds that a command takes besides epochs and tests, and for each of its jobs; and what an
# epoch takes besides its steps and validation, such as saving.
STARTING, A_JOB, MARGIN = 15.0, 0.4, 1.1
# Steps before those that are timed, and those.
BEFORE, TIMED = {"cpu": 1, "cuda": WARM_UP + 3}, {"cpu": 2, "cuda": 20}


class Cost(NamedTuple):
    """What a stage takes, in seconds: a step, an epoch with its validation, and all besides epochs."""

    students: int
    step: float
    epoch: float
    fixed: float

    def epochs_in(self, seconds: float) -> int:
        """How many whole epochs fit."""
        return max(math.floor((seconds - self.fixed) / self.epoch), 0)

    def __str__(self) -> str:
        return (
            f"S = {self.students}, {self.step * 1e3:,.1f} ms a step (measured), {self.epoch:.1f} s an epoch"
        )


def compose(overrides: Sequence[str]) -> Config:
    """The configuration of one job."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return parse(hydra.compose("train", [*overrides]))


def jobs_of(settings: Sequence[str], axes: Axes) -> list[list[Config]]:
    """The jobs of a multirun by the student that they train, in a stack's order: alpha=1 comes last."""
    others = {name: values for name, values in axes.items() if name not in ("alpha", "seed")}
    jobs = []
    for values in product(*others.values()):
        cell = compose([*settings, *map("=".join, zip(others, values, strict=True))])
        for alpha, seed in product(axes.get("alpha", (cell.alpha,)), axes["seed"]):
            own: dict[str, Any] = {"alpha": float(alpha), "seed": int(seed)}
            jobs.append(replace(cell, resolved=cell.resolved | own, **own))
    students: dict[Any, list[Config]] = {}
    for job in sorted(jobs, key=lambda job: job.alpha == 1):
        students.setdefault(what_trains(job), []).append(job)
    return [*students.values()]


@isolated()
def measure(settings: Sequence[str], axes: Axes) -> Cost:
    """Train some steps of a multirun's students; raises what training raises."""
    students = jobs_of(settings, axes)
    first, device = students[0][0], check_trainer(students[0][0].trainer).device
    compute_as(first, device)
    seeds = [*dict.fromkeys(seed_of(job.seed, ORDER, job.student) for job in chain(*students))]
    with closing(StackedImages(first.dataset, first.paths.data, seeds)) as data:
        batches = len(data.loader("train", "cpu", rank=0, world_size=1))
        timer = Steps(timed=max(min(TIMED[device.type], batches - BEFORE[device.type]), 1))
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        own = {
            "max_epochs": 1,
            "limit_train_batches": BEFORE[device.type] + timer.timed,
            "limit_val_batches": 0,
        }
        own |= dict.fromkeys(quiet, False) | {"log_every_n_steps": 10**6, "use_distributed_sampler": False}
        trainer = L.Trainer(**{**first.trainer, **own}, callbacks=[*faster_steps(first, data), timer])
        trainer.fit(module_of(students, data), data)
    limit = first.trainer.get("limit_train_batches") or 1.0
    batches = min(limit, batches) if isinstance(limit, int) else int(limit * batches)
    # A forward pass is a third of a step's arithmetic; the last and the best weights are tested.
    val, test = (data.counts[split] / first.dataset.batch_size / 3 for split in ("val", "test"))
    fixed = STARTING + A_JOB * sum(map(len, students)) + 2 * test * timer.seconds
    return Cost(len(students), timer.seconds, (batches + val) * timer.seconds * MARGIN, fixed)


def module_of(students: Sequence[Sequence[Config]], data: StackedImages) -> DistillModule:
    """The students' module, as a run or a stack trains it: further jobs of a student follow the first."""
    jobs, student_of = in_stack_order(students)
    first, facts = jobs[0], facts_of(data)
    teacher = first.teacher.model.build().requires_grad_(False).eval() if first.method.needs_teacher else None
    modules = [build_module(job, first_weights(job.seed, job.student), teacher, facts) for job in jobs]
    if len(modules) == 1:
        return modules[0]
    orders = [data.seeds.index(seed_of(job.seed, ORDER, job.student)) for job in jobs]
    dropout = [seed_of(job.seed, DROPOUT, job.student) for job in jobs]
    return StackedModule(modules, orders, dropout, check_trainer(first.trainer).device, student_of)
