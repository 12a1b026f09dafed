"""Train the jobs of a multirun together: students that can be stacked become one training.

`hydra/launcher=stacked` calls `run_together`. Each job's run folder holds in the end what the job would have
left there by itself.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from vitkd.cli.command import say
from vitkd.cli.console import start_logging
from vitkd.cli.jobs import all_recorded
from vitkd.config.computing import compute_as
from vitkd.errors import ConfigError, RunError
from vitkd.explain.maps.recording import has_maps
from vitkd.models import Model
from vitkd.process.isolation import free_memory, isolated
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import contents_of, inputs_of
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_of
from vitkd.runs.stack_folder import StackFolder, read_slot, release_slot, stacks_folder
from vitkd.train.build import build_module, compile_training, facts_of
from vitkd.train.callbacks import attention_pictures, faster_steps
from vitkd.train.fit import Fitted
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedImages, StackedModule
from vitkd.train.stacked.candidates import (
    Candidate,
    by_student,
    candidate,
    deduplicate,
    in_stack_order,
    job_names,
    saved_place,
    split,
    stacks_of,
    start_over,
)
from vitkd.train.stacked.fit import carry_over, fit_stack, room_for, write_checkpoints
from vitkd.train.student import (
    MeasuredTeacher,
    check_pair,
    measure_student,
    measure_teacher,
    obtain_teacher,
    read_data,
    read_given_teacher,
)

log = logging.getLogger("vitkd")


class Shared(NamedTuple):
    """What all students of a stack have in common besides their settings."""

    data: StackedImages
    device: torch.device
    teacher: Model | None
    measured_teacher: MeasuredTeacher
    inputs: Mapping[str, Any]
    """what `inputs.json` says"""


@isolated()
def run_together(
    jobs: Sequence[DictConfig], max_students: int | None, explain: Callable[[Exception], str]
) -> dict[int, float | None]:
    """Train those of `jobs` that can be stacked.

    Args:
        jobs: what Hydra composed for each.
        max_students: the largest stack; None for no limit.
        explain: turns an error into one line.

    Returns:
        by job number the best accuracy on validation, or None for a failed job; a job that is not there has
        to run by itself.
    """
    start_logging()
    sweep = Path(jobs[0].hydra.sweep.dir)
    contents: dict[str, str | None] = {}
    members = (candidate(composed, contents) for composed in jobs)
    candidates = deduplicate(member for member in members if member is not None)
    most, room = max_students or len(jobs), room_for(len(jobs))
    # One student by itself gains nothing, unless it is saved as part of a stack.
    waiting = [stack for stack in stacks_of(candidates, most, room) if len(stack) > 1 or stack[0].place]
    while waiting:
        stack = waiting.pop(0)
        with all_recorded([member.job for member in stack], sweep, explain, say):
            waiting[:0] = train_stack(stack, sweep.name)
        free_memory()
    ended = [member for member in candidates if member.job.state in ("done", "failed")]
    return {member.job.number: member.result for member in ended}


def train_stack(members: Sequence[Candidate], sweep: str) -> list[list[Candidate]]:
    """Train `members` as one stack; those that turn out not to fit in stay `running`, for a run of their own.

    Returns the stacks that are still to be trained: two halves where memory does not suffice for one. Raises
    what `train_student` does.
    """
    first = members[0].config
    given = read_given_teacher(first)
    members = [member for member in members if suits(member, given)]
    if not members:
        return []
    device = members[0].plan.machine.device
    compute_as(first, device)
    seeds = [*dict.fromkeys(order_of(member) for member in members)]
    with closing(StackedImages(first.dataset, first.paths.data, seeds)) as data:
        if not data.is_resident:
            log.info("%s train one by one: workers decode their images, too many to keep", job_names(members))
            return []
        for member in members:
            member.plan.warn()
        read_data(first, given, data)
        contents = contents_of(first)
        teacher = obtain_teacher(first, given, contents, device)
        inputs = inputs_of(first, data, contents, teacher)
        start_over(members, inputs)
        shared = Shared(data, device, teacher, measure_teacher(teacher, data, device), inputs)
        # Only now: another process may have been faster while the teacher was trained.
        members = [each for each in members if not (each.folder and each.folder.state in ("running", "done"))]
        if not members:
            return []
        try:
            train_members(members, shared, sweep)
            return []
        except RuntimeError as error:
            # A CPU's allocator has no error class of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            return halves(members, device)


def suits(member: Candidate, given: Model | None) -> bool:
    """Whether the member's student can learn from its teacher; if not, the job reports it by itself."""
    try:
        check_pair(member.config, given)
    except ConfigError:
        return False
    return True


def order_of(member: Candidate) -> int:
    """The seed of the order and views of the member's images."""
    return seed_of(member.config.seed, ORDER, member.config.student)


def halves(members: Sequence[Candidate], device: torch.device) -> list[list[Candidate]]:
    """The members that are not done yet as two stacks; RunError if there was only one student."""
    if len(by_student(members)) == 1:
        raise RunError(f"{device}: out of memory even for one student; reduce dataset.batch_size") from None
    left = [member for member in members if member.job.state == "running"]
    log.info("%s: out of memory on %s, trying two stacks of half the size", job_names(left), device)
    for member in left:
        member.place = saved_place(member.config, member.folder)
    return [half for half in split(by_student(left), 2) if half]


def train_members(members: Sequence[Candidate], shared: Shared, sweep: str) -> None:
    """Train one stack; each run folder holds in the end what its job would have left there by itself."""
    students = by_student(members)
    members, student_of = in_stack_order(students)
    config, data = members[0].config, shared.data
    stacks = stacks_folder(config.paths.outputs)
    with ExitStack() as all_runs:
        runs = [all_runs.enter_context(ExitStack()) for _ in members]
        for member, run in zip(members, runs, strict=True):
            member.folder = member.folder or member.plan.claim_new()
            member.job.folder = str(member.folder.path)
            # Until `run` is closed.
            run.enter_context(member.folder.running(member.config.resolved, shared.inputs))
        place = settle_place(members, stacks / sweep)
        modules = [module_of(member, shared) for member in members]
        orders = [data.seeds.index(order_of(member)) for member in members]
        dropout = [seed_of(member.config.seed, DROPOUT, member.config.student) for member in members]
        stacked = StackedModule(modules, orders, dropout, shared.device, student_of)
        if config.compile:
            compile_training(stacked)
        size = f" of {len(students)} students, one for all jobs with equal gradients"
        log.info("%s train as one stack%s", job_names(members), size if len(students) < len(members) else "")
        folders = [member.run for member in members]
        outcomes = fit_stack(stacked, data, place, folders, config, faster_steps(config, data))
        trained = [members[number] for number in student_of]
        for member, first, run, module, outcome in zip(
            members, trained, runs, modules, outcomes, strict=True
        ):
            if isinstance(outcome, str):
                fail(member, run, outcome)
            else:
                if first is not member:
                    outcome.metrics["stack/trained_as"] = os.path.relpath(first.run.path, member.run.path)
                finish(member, module, outcome, shared)
                run.close()
            # Only now: a run that is interrupted before resumes from the stack.
            release_slot(member.run, stacks)


def settle_place(members: Sequence[Candidate], path: Path) -> StackFolder:
    """The folder to save the stack in: the one that its students resume from, or a new one."""
    before = [read_slot(member.run, path.parent) for member in members]
    places = [member.place for member in members if member.place]
    assert len(places) in (0, len(members)), "a stack resumes as a whole"
    if places and [place.job for place in places] == list(range(places[0].jobs)):
        return places[0].folder
    folder = StackFolder(RunFolder.claim(path).path)
    if places:
        carry_over(places[0].folder, [place.job for place in places], folder)
    folder.assign([member.run for member in members])
    for left in {place.folder.path for place in before if place}:
        StackFolder(left).remove_if_unused()
    return folder


def module_of(member: Candidate, shared: Shared) -> DistillModule:
    """The module that the job would train by itself, with the same first weights and pairs."""
    config = member.config
    student = first_weights(config.seed, config.student)
    module = build_module(config, student, shared.teacher, facts_of(shared.data, order_of(member)))
    if module.objective is not None and module.objective.pairs:
        member.run.write_pairs(module.objective.pairs)
    return module


def finish(member: Candidate, module: DistillModule, student: Fitted, shared: Shared) -> None:
    """Write a trained student's picture, metrics and checkpoints."""
    config, data = member.config, shared.data
    if module.objective is not None and has_maps(module.teacher):
        module.model.load_state_dict(student.last.state_dict())
        epochs, steps = student.metrics["epochs"], student.metrics["steps"]
        if pictures := attention_pictures(config, data, member.run):
            pictures.conclude(module, student.loggers, epochs, steps)
    metrics = measure_student(config, student, shared.measured_teacher, data, shared.device, member.run)
    # Last: a run without stack.json would resume from its last.ckpt.
    write_checkpoints(member.run, student)
    member.result, member.job.state = member.job.take_metrics(metrics), "done"


def fail(member: Candidate, run: ExitStack, error: str) -> None:
    """Let a member's job fail, and none but it; its weights are not kept."""
    member.job.state, member.job.error = "failed", error
    say(f"job {member.job.number} failed: {error}")
    run.__exit__(RunError, RunError(error), None)
