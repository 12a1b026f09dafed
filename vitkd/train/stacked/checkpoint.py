"""A stack's checkpoint holds all students; this takes some of them out of it.

Shapes: S stacked students.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitkd.runs.checkpoints import newest_good, write_checkpoint
from vitkd.runs.stack_folder import StackFolder

# What belongs to no single student.
SHARED = {"loops", "lr_schedulers", "random_state", "step", "param_groups", "StackedImages"}


def take_students(content: Any, students: Sequence[int], count: int) -> Any:
    """The part of a checkpoint's `content` that belongs to `students` of its `count`, in that order.

    Whatever is a tensor or list of `count` entries has one a student.
    """
    if isinstance(content, Tensor):
        is_theirs = content.ndim > 0 and len(content) == count
        return content[torch.tensor(students, device=content.device)].clone() if is_theirs else content
    if isinstance(content, list) and len(content) == count:
        return [content[student] for student in students]
    if isinstance(content, list | tuple):
        return type(content)(take_students(part, students, count) for part in content)
    if isinstance(content, Mapping):
        return {
            key: part if key in SHARED else take_students(part, students, count)
            for key, part in content.items()
        }
    return content


def carry_over(before: StackFolder, students: Sequence[int], count: int, to: StackFolder) -> None:
    """Copy `students` of the `count` that are saved in `before` to the checkpoint of another stack."""
    checkpoint = newest_good(before.last)
    if checkpoint is None:
        return
    _, saved = checkpoint
    content, failed = take_students(saved, students, count), saved["failed"]
    content["failed"] = {new: failed[old] for new, old in enumerate(students) if old in failed}
    write_checkpoint(to.last, content)
