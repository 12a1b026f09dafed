"""Which jobs of a stack are compared with their teacher by one objective, and their share of the outputs.

Shapes: S stacked students.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor

from vitkd.methods.base import Objective
from vitkd.methods.weighting import Weighting
from vitkd.models import Output, Taps
from vitkd.models.output import select
from vitkd.train.module import DistillModule


class JobGroup(NamedTuple):
    """Neighbours in the stack that learn the same from their teacher, weighed in the same way."""

    start: int
    stop: int
    objective: Objective
    weighting: Weighting
    distils: bool
    """whether their transfer loss counts in any epoch"""
    students: tuple[int, ...]
    """the student of each; of followers others train it"""

    @property
    def jobs(self) -> range:
        """Their places in the stack."""
        return range(self.start, self.stop)

    @property
    def trains(self) -> bool:
        """Whether the students learn from this group, rather than just being compared with the teacher."""
        return self.students == (*self.jobs,)

    def followed(self, outputs: Output) -> Output:
        """Of all students' `outputs` what followers are compared by, without gradient."""
        seen = tapped(outputs, self.objective.student_taps)
        return seen.map(lambda tensor: select(tensor.detach(), self.students, dim=0))

    def of_teacher(self, answer: Output) -> Output:
        """Of the teacher's `answer` what this group looks at."""
        return tapped(answer, self.objective.teacher_taps)


def group_jobs(modules: Sequence[DistillModule], students: Sequence[int]) -> list[JobGroup]:
    """The groups of jobs that stand in the order of `modules`; those without an objective are in none.

    Args:
        students: the student of each; followers come last and are in groups of their own.
    """
    groups, start = [], 0
    follows = [student != job for job, student in enumerate(students)]
    pairs = zip(modules, follows, strict=True)
    for _, neighbours in groupby(pairs, key=lambda pair: (pair[1], _group_key(pair[0]))):
        members = [module for module, _ in neighbours]
        objectives = [module.objective for module in members if module.objective is not None]
        stop = start + len(members)
        if objectives:
            assert not objectives[0].state_dict(), "a stack neither trains nor saves what an objective holds"
            assert not objectives[0].shares_drop_path, "a stack asks its teacher once for all students"
            shared, first = objectives[0].shared_by(objectives), members[0]
            theirs = (*students[start:stop],)
            groups.append(JobGroup(start, stop, shared, first.weighting, first.distils, theirs))
        start = stop
    return groups


def _group_key(module: DistillModule) -> Any:
    if module.objective is None:
        return None
    return module.objective.stack_key, module.weighting.stack_key, module.distils


def shares(output: Output, groups: Sequence[JobGroup], students: int) -> Mapping[int, Output]:
    """The output of all students cut at the groups' ends, by each part's first student."""
    ends = sorted({0, students} | {end for group in groups for end in (group.start, group.stop)})
    sizes = [stop - start for start, stop in pairwise(ends)]
    # One cut, not a slice a group: each slice's gradient would be as large as the whole.
    parts = [tensor.split(sizes) for tensor in output.tensors()]
    return {start: _refilled(output, [part[i] for part in parts]) for i, start in enumerate(ends[:-1])}


def _refilled(output: Output, tensors: Sequence[Tensor]) -> Output:
    """An output like `output`, of other tensors in the same order."""
    remaining = iter(tensors)
    return output.map(lambda _: next(remaining))


def tapped(output: Output, taps: Taps) -> Output:
    """Of `output` what `taps` ask for, and all logits that are there."""
    wanted = {*taps.factors, *taps.qkv}
    return Output(
        output.logits,
        output.heads,
        {block: output.scores[block] for block in taps.scores},
        {block: qkv for block, qkv in output.qkv.items() if block in wanted},
        {name: output.features[name] for name in taps.features},
    )
