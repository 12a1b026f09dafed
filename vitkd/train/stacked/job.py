"""Train the jobs of a multirun together: students that can be stacked become one training.

`hydra/launcher=stacked` calls `run_together`. What it leaves in each job's run folder is what the job would
have left alone.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from vitkd.cli.command import say, warn_of_ignored_settings
from vitkd.cli.console import start_logging
from vitkd.cli.jobs import all_recorded, as_job
from vitkd.errors import ConfigError, RunError
from vitkd.evaluate.measure import Evaluation
from vitkd.models import Model
from vitkd.process.isolation import free_memory, isolated, set_matmul_precision
from vitkd.runs import results
from vitkd.runs.folder import RunFolder
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_of
from vitkd.runs.stack_folder import StackFolder, read_slot, release_slot, stacks_folder
from vitkd.runs.teacher_store import given_teacher
from vitkd.train.build import build_module, facts_of
from vitkd.train.compilation import compile_training
from vitkd.train.fit import Fitted
from vitkd.train.job import (
    announce,
    conclude,
    describe_teacher,
    hot_path,
    measure,
    measure_teacher,
    obtain_teacher,
    pictures,
)
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedImages, StackedModule
from vitkd.train.stacked.candidates import Candidate, candidate, saved_place, stacks_of, told, without_twins
from vitkd.train.stacked.checkpoint import carry_over
from vitkd.train.stacked.fit import fit_stack, room_for, write_checkpoints

log = logging.getLogger("vitkd")


class Beside(NamedTuple):
    """What all students of a stack have in common besides their settings."""

    data: StackedImages
    device: torch.device
    teacher: Model | None
    teacher_test: Evaluation | None


@isolated()
def run_together(
    jobs: Sequence[DictConfig], max_students: int | None, explain: Callable[[Exception], str]
) -> dict[int, float | None]:
    """Train those of `jobs` that can be stacked.

    Args:
        jobs: what Hydra composed for each.
        max_students: the largest stack; None for no limit.
        explain: gives an error's one line.

    Returns:
        by job number the best accuracy on validation, or None for a failed job; a job that is not there has
        to run by itself.
    """
    start_logging()
    sweep = Path(jobs[0].hydra.sweep.dir)
    candidates = without_twins(found for composed in jobs if (found := candidate(composed)) is not None)
    most = min(max_students or len(jobs), room_for(len(jobs)))
    # One by itself gains nothing, unless it is saved as part of a stack.
    waiting = [stack for stack in stacks_of(candidates, most) if len(stack) > 1 or stack[0].place]
    while waiting:
        stack = waiting.pop(0)
        with all_recorded([member.job for member in stack], sweep, explain, say):
            waiting[:0] = train_stack(stack, sweep.name)
        free_memory()
    return {found.job.number: found.result for found in candidates if found.job.state in ("done", "failed")}


def train_stack(members: Sequence[Candidate], sweep: str) -> list[list[Candidate]]:
    """Train `members` as one stack; those that turn out not to fit in stay `running`, for a run of their own.

    Returns the stacks that are still to be trained: two halves where memory does not suffice for one. Raises
    what `train.train` does.
    """
    first = members[0].config
    given = given_teacher(first.teacher.checkpoint, first.dataset) if first.method.needs_teacher else None
    members = [member for member in members if suits(member, given)]
    if not members:
        return []
    set_matmul_precision(first.matmul_precision)
    device = members[0].machine.device
    seeds = [*dict.fromkeys(order_of(member) for member in members)]
    with closing(StackedImages(first.dataset, first.paths.data, seeds)) as data:
        if not data.is_resident:
            log.info(
                "%s train one by one: workers decode their images, which are too many to keep", told(members)
            )
            return []
        warn_and_announce(members, given)
        teacher = given or (obtain_teacher(first, device) if first.method.needs_teacher else None)
        test = measure_teacher(teacher, data, device) if teacher else None
        # Now: the teacher may have taken long.
        members = [member for member in members if not is_taken(member)]
        if not members:
            return []
        try:
            train_members(members, Beside(data, device, teacher, test), sweep)
            return []
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return halves(members, device)


def suits(member: Candidate, given: Model | None) -> bool:
    """Whether the member's student can learn from its teacher; if not, that is told when its turn comes."""
    config = member.config
    try:
        config.method.check(config.student, given.config if given else config.teacher.model, config)
    except ConfigError:
        return False
    return True


def is_taken(member: Candidate) -> bool:
    """Whether another process has come first; that is told when the member's turn comes."""
    return member.folder is not None and member.folder.state in ("running", "done")


def order_of(member: Candidate) -> int:
    """The seed of the order and views of the member's images."""
    return seed_of(member.config.seed, ORDER, member.config.student)


def warn_and_announce(members: Sequence[Candidate], given: Model | None) -> None:
    """Say what was chosen, and which settings have no effect, before anything takes time."""
    for member in members:
        with as_job(member.composed):
            warn_of_ignored_settings(member.config.method)
    announce(members[0].config, given)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory was asked for that there is not; a CPU's allocator has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def halves(members: Sequence[Candidate], device: torch.device) -> list[list[Candidate]]:
    """The members that are not done yet as two stacks; RunError if there was only one."""
    if len(members) == 1:
        raise RunError(f"{device}: too little memory even for one student") from None
    left = [member for member in members if member.job.state == "running"]
    log.info("%s: too little memory on %s for one stack; two of half the size", told(left), device)
    for member in left:
        member.place = saved_place(member.config, member.folder)
    middle = len(left) // 2
    return [half for half in (left[:middle], left[middle:]) if half]


def train_members(members: Sequence[Candidate], beside: Beside, sweep: str) -> None:
    """Train one stack and leave in each run folder what its job would have left alone."""
    first, data, teacher = members[0].config, beside.data, beside.teacher
    # Now: training may change the precision of its weights.
    about_teacher = describe_teacher(teacher, beside.teacher_test)
    with ExitStack() as all_runs:
        runs = [all_runs.enter_context(ExitStack()) for _ in members]
        for member, run in zip(members, runs, strict=True):
            open_run(member, run)
        place = settle_place(members, stacks_folder(first.paths.outputs) / sweep)
        modules = [build_member(member, beside) for member in members]
        for member, module in zip(members, modules, strict=True):
            if module.objective is not None and module.objective.pairs:
                results.write_pairs(member.run, module.objective.pairs)
        dropout = [seed_of(member.config.seed, DROPOUT, member.config.student) for member in members]
        orders = [data.seeds.index(order_of(member)) for member in members]
        stacked = StackedModule(modules, orders, dropout, beside.device)
        if first.compile:
            compile_training(stacked)
        log.info("%s train as one stack", told(members))
        outcomes = fit_stack(
            stacked, data, place, [member.run for member in members], first, hot_path(first, data)
        )
        for member, run, module, outcome in zip(members, runs, modules, outcomes, strict=True):
            if isinstance(outcome, str):
                give_up(member, run, outcome)
            else:
                finish(member, module, outcome, about_teacher, beside)
                run.close()
            # Not before: what is cut off until here goes on from the stack.
            release_slot(member.run, stacks_folder(first.paths.outputs))


def open_run(member: Candidate, run: ExitStack) -> None:
    """Keep the status of a member's run until `run` is closed."""
    member.folder = member.folder or RunFolder.claim(member.path)
    member.job.folder = str(member.folder.path)
    run.enter_context(member.folder.running(member.config.resolved))


def settle_place(members: Sequence[Candidate], path: Path) -> StackFolder:
    """Where the stack is saved: where its students were before, or a new folder with what they had."""
    before = [read_slot(member.run, path.parent) for member in members]
    places = [member.place for member in members if member.place]
    assert len(places) in (0, len(members)), "a stack goes on as a whole"
    if places and [place.student for place in places] == list(range(places[0].students)):
        return places[0].folder
    folder = StackFolder(RunFolder.claim(path).path)
    if places:
        carry_over(places[0].folder, [place.student for place in places], places[0].students, folder)
    folder.assign([member.run for member in members])
    for left in {place.folder.path for place in before if place}:
        StackFolder(left).remove_if_unused()
    return folder


def build_member(member: Candidate, beside: Beside) -> DistillModule:
    """What the job would train alone, with the same first weights and pairs."""
    config = member.config
    student = first_weights(config.seed, config.student)
    return build_module(config, student, beside.teacher, facts_of(beside.data, order_of(member)))


def finish(
    member: Candidate, module: DistillModule, student: Fitted, about_teacher: dict[str, Any], beside: Beside
) -> None:
    """Leave a trained student's picture, figures and checkpoints."""
    config, data = member.config, beside.data
    if module.objective is not None and module.teacher.attention:
        module.model.load_state_dict(student.last.state_dict())
        epochs, steps = student.metrics["epochs"], student.metrics["steps"]
        pictures(config, data, member.run).conclude(module, student.loggers, epochs, steps)
    test = beside.teacher_test
    metrics = measure(config, student, about_teacher, test, data, beside.device, member.run)
    # Last: to a run without stack.json its last.ckpt is something to go on from.
    write_checkpoints(member.run, student)
    member.result, member.job.state = conclude(member.job, metrics), "done"


def give_up(member: Candidate, run: ExitStack, why: str) -> None:
    """Let a member's job fail, and none but it; of its weights nothing is kept."""
    member.job.state, member.job.error = "failed", why
    say(f"job {member.job.number} failed: {why}")
    run.__exit__(RunError, RunError(why), None)
