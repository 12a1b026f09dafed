"""Train the jobs of a multirun together: students that can be stacked become one training.

`hydra/launcher=stacked` calls `run_together`. What it leaves in each job's run folder is what the job would
have left alone.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vitkd.cli import run_path, say, warn_of_ignored_settings
from vitkd.config import Config, parse
from vitkd.distill.methods import AttentionDistillation, NoDistillation
from vitkd.distill.modules import ClassifyModule, DistillModule
from vitkd.errors import ConfigError, RunError
from vitkd.jobs import all_recorded, as_job, overridden
from vitkd.models import ViT
from vitkd.runs import results
from vitkd.runs.compilation import check_compiler, compile_training
from vitkd.runs.console import Job, start_logging
from vitkd.runs.evaluation import Evaluation
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import IMMATERIAL, RunFolder, first_difference
from vitkd.runs.isolation import free_memory, isolated
from vitkd.runs.seeding import DROPOUT, ORDER, WEIGHTS, seed_generators, seed_of
from vitkd.runs.stack import Place, StackFolder, carry_over, fit_stack
from vitkd.runs.teacher_store import given_teacher
from vitkd.runs.training import Fitted, Machine, check_trainer
from vitkd.stacked import StackedImages, StackedModule
from vitkd.stacked.grouping import in_stack_order, portions, shared_settings
from vitkd.train import (
    announce,
    caching,
    conclude,
    describe_teacher,
    earlier_run,
    measure,
    measure_teacher,
    obtain_teacher,
    pictures,
)

log = logging.getLogger("vitkd")

# Their students differ in what they learn from alone.
STACKABLE = (AttentionDistillation, NoDistillation)


@dataclass
class Candidate:
    """A job that may be stacked."""

    job: Job
    config: Config
    machine: Machine
    path: Path
    """where its run folder goes"""
    folder: RunFolder | None
    """that of an attempt that was cut off"""
    place: Place | None
    """where that attempt is saved, if it was part of a stack"""
    result: float | None = None
    """what a sweeper may maximise"""


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
    candidates = [found for composed in jobs if (found := candidate(composed)) is not None]
    finished: dict[int, float | None] = {}
    for stack in stacks_of(candidates, max_students):
        sweep = Path(jobs[0].hydra.sweep.dir)
        with all_recorded([member.job for member in stack], sweep, explain, say):
            if reason := train_stack(stack, sweep.name):
                log.info("%s train one by one: %s", told(stack), reason)
                continue
        finished |= {member.job.number: member.result for member in stack}
    return finished


def candidate(composed: DictConfig) -> Candidate | None:
    """The job as a member of some stack; None, with a line that says why, if it has to run by itself."""
    with as_job(composed) as own:
        job = Job(composed.hydra.job.num, overridden(), state="running")
        try:
            config = parse(own)
            machine = check_trainer(config.trainer)
            if config.compile:
                check_compiler(machine.device)
            warn_of_ignored_settings(config.method)
            path = run_path(config)
            earlier = earlier_run(path, config)
        except (ConfigError, OmegaConfBaseException):
            return None  # told of when its turn comes
    if earlier and earlier.state in ("running", "done"):
        return None
    folder = RunFolder(earlier.path) if earlier else None
    if reason := why_alone(config, machine, folder):
        log.info("job %d trains by itself: %s", job.number, reason)
        return None
    return Candidate(job, config, machine, path, folder, read_place(folder))


def why_alone(config: Config, machine: Machine, folder: RunFolder | None) -> str | None:
    """What keeps a job from being stacked, or None."""
    if not isinstance(config.method, STACKABLE):
        return f"method={type(config.method).__name__} learns from more than attention"
    if machine.processes > 1:
        return f"it spreads over {machine.processes} processes"
    if str(config.trainer.get("precision", "")) == "16-mixed":
        return "under 16-mixed one student's overflow would hold all others back"
    if folder and folder.last.exists() and not folder.stack.exists():
        return "it goes on from a checkpoint of its own"
    return None


def read_place(folder: RunFolder | None) -> Place | None:
    """Where the stack that a run was part of is saved, if there is anything saved."""
    if folder is None or not folder.stack.exists():
        return None
    content = json.loads(folder.stack.read_text(encoding="utf-8"))
    place = Place(Path(content["stack"]), content["student"], content["students"])
    return place if StackFolder(place.stack).last.exists() else None


def stacks_of(candidates: Sequence[Candidate], max_students: int | None) -> list[list[Candidate]]:
    """The candidates by stack, each in stack order; says what keeps one stack from another."""
    groups: list[tuple[dict[str, Any], Path | None, list[Candidate]]] = []
    for member in candidates:
        shared = shared_settings(member.config.resolved, tuple(IMMATERIAL))
        stack = member.place and member.place.stack
        for other, other_stack, members in groups:
            if (shared, stack) == (other, other_stack):
                members.append(member)
                break
        else:
            groups.append((shared, stack, [member]))
    stacks = []
    for shared, stack, members in groups:
        if groups[0][0] != shared:
            difference = first_difference(groups[0][0], shared)
            log.info("%s cannot be stacked with the first jobs: another %s", told(members), difference)
        elif stack != groups[0][1]:
            log.info("%s go on from another step than the first jobs", told(members))
        ordered = sorted(members, key=stack_position)
        cuts = portions(len(ordered), max_students)
        if len(cuts) > 1:
            log.info("%s make %d stacks: max_students=%s", told(members), len(cuts), max_students)
        stacks += [ordered[cut.start : cut.stop] for cut in cuts]
    return stacks


def stack_position(member: Candidate) -> tuple[Any, ...]:
    """Sorts the members of one stack; one that goes on keeps its place."""
    return (member.place.student,) if member.place else in_stack_order(member.config.resolved)


def told(members: Sequence[Candidate]) -> str:
    """`jobs 0-3, 7`."""
    numbers = sorted(member.job.number for member in members)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"job{'s' if len(numbers) > 1 else ''} {spans}"


def train_stack(members: Sequence[Candidate], sweep: str) -> str | None:
    """Train `members` as one stack, or as two of half the size where memory does not suffice.

    Returns why they have to run by themselves, if they have; raises what `train.train` does.
    """
    first = members[0].config
    given = given_teacher(first.teacher.checkpoint, first.dataset) if first.method.needs_teacher else None
    for member in members:
        config = member.config
        config.method.check(config.student, given.config if given else config.teacher.model, config)
    torch.set_float32_matmul_precision(first.matmul_precision)
    announce(first, given)
    seeds = [seed_of(member.config.seed, ORDER, member.config.student) for member in members]
    with closing(StackedImages(first.dataset, first.paths.data, list(dict.fromkeys(seeds)))) as data:
        if not data.is_resident:
            return "their images are too many for the memory, so that workers decode them"
        device = members[0].machine.device
        teacher = given or (obtain_teacher(first, device) if first.method.needs_teacher else None)
        teacher_test = measure_teacher(teacher, data, device) if teacher else None
        try:
            train_members(members, seeds, teacher, teacher_test, data, device, sweep)
            return None
        except torch.OutOfMemoryError:
            if len(members) == 1:
                raise RunError(f"{device}: too little memory even for one student") from None
            # The traceback holds what has to be freed; so it goes on outside.
            log.info("%s: too little memory on %s for one stack; two of half the size", told(members), device)
    free_memory()
    for member in members:
        member.place = read_place(member.folder)
    middle = len(members) // 2
    for half in (members[:middle], members[middle:]):
        assert train_stack(half, sweep) is None
    return None


def train_members(
    members: Sequence[Candidate],
    seeds: Sequence[int],
    teacher: ViT | None,
    teacher_test: Evaluation | None,
    data: StackedImages,
    device: torch.device,
    sweep: str,
) -> None:
    """Train one stack and leave in each run folder what its job would have left alone."""
    first = members[0].config
    # Now: training may change the precision of its weights.
    about_teacher = describe_teacher(teacher, teacher_test)
    place = settle_place(members, Path(first.paths.outputs, "stacks", sweep))
    with ExitStack() as all_runs:
        runs = [all_runs.enter_context(ExitStack()) for _ in members]
        for student, (member, run) in enumerate(zip(members, runs, strict=True)):
            run.enter_context(open_run(member, place, student, len(members)))
        modules = [
            build_module(member.config, teacher, data, seed)
            for member, seed in zip(members, seeds, strict=True)
        ]
        for member, module in zip(members, modules, strict=True):
            if isinstance(module, DistillModule):
                results.write_pairs(folder_of(member), module.transfer.pairs)
        dropout = [seed_of(member.config.seed, DROPOUT, member.config.student) for member in members]
        stacked = StackedModule(modules, [data.seeds.index(seed) for seed in seeds], dropout)
        if first.compile:
            compile_training(stacked)
        caches = [callback for callback in (caching(first, data),) if callback]
        folders = [folder_of(member) for member in members]
        log.info("%s train as one stack of %d", told(members), len(members))
        outcomes = fit_stack(stacked, data, place, folders, first, caches)
        for member, run, module, outcome in zip(members, runs, modules, outcomes, strict=True):
            folder_of(member).stack.unlink(missing_ok=True)
            if isinstance(outcome, str):
                give_up(member, run, outcome)
                continue
            draw(member, module, outcome, data)
            metrics = measure(
                member.config, outcome, about_teacher, teacher_test, data, device, folder_of(member)
            )
            member.result, member.job.state = conclude(member.job, metrics), "done"
            run.close()
    place.remove()


def settle_place(members: Sequence[Candidate], path: Path) -> StackFolder:
    """Where the stack is saved: where its students were before, or a new folder with what they had."""
    places = [member.place for member in members]
    before = places[0]
    if before and [place and place.student for place in places] == list(range(before.students)):
        return StackFolder(before.stack)
    place = StackFolder(RunFolder.claim(path).path)
    if before:
        students = [found.student for found in places if found]
        carry_over(before.stack, students, before.students, place)
    return place


def folder_of(member: Candidate) -> RunFolder:
    """The member's run folder, claimed by now."""
    assert member.folder is not None
    return member.folder


@contextmanager
def open_run(member: Candidate, place: StackFolder, student: int, students: int) -> Iterator[None]:
    """Keep the status of a member's run, and where it is saved."""
    member.folder = member.folder or RunFolder.claim(member.path)
    member.job.folder = str(member.folder.path)
    with member.folder.running(member.config.resolved):
        where = {"stack": str(place.path), "student": student, "students": students}
        write_atomically(member.folder.stack, json.dumps(where) + "\n")
        yield


def build_module(config: Config, teacher: ViT | None, data: StackedImages, seed: int) -> ClassifyModule:
    """What the job would train alone, with the same first weights and pairs."""
    seed_generators(config.seed, WEIGHTS, config.student)
    student = config.student.build()
    return config.method.module(student, teacher, config, lambda: data.first("train", 64, seed).image)


def draw(member: Candidate, module: ClassifyModule, fitted: Fitted, data: StackedImages) -> None:
    """Leave the trained student's attention picture."""
    if not isinstance(module, DistillModule):
        return
    module.model.load_state_dict(fitted.last.state_dict())
    drawing = pictures(member.config, data, folder_of(member))
    epochs, steps = fitted.metrics["epochs"], fitted.metrics["steps"]
    drawing.conclude(module, fitted.loggers, epochs, steps)


def give_up(member: Candidate, run: ExitStack, why: str) -> None:
    """Let a member's job fail, and none but it."""
    member.job.state, member.job.error = "failed", why
    say(f"job {member.job.number} failed: {why}")
    run.__exit__(RunError, RunError(why), None)
