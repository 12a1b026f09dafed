"""What a finished run leaves, checked before anybody computes with it."""

import io
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitkd.errors import ConfigError
from vitkd.runs.files import open_regular, read_plain


def are_metrics(metrics: Any) -> bool:
    """Whether they are those of a finished run."""
    is_mapping = isinstance(metrics, dict) and metrics.get("test/acc_last") is not None
    return is_mapping and all(type(v) in (int, float, type(None)) for k, v in metrics.items() if "acc" in k)


def read_pairs(
    path: Path, student: Sequence[int], teacher: Sequence[int], part: str
) -> list[Mapping[str, Any]]:
    """The distilled pairs in a run's pairs.json, none without the file.

    `part` of the models' attention has so many heads a block.

    Raises ConfigError if it cannot be read, or names maps that the models have not.
    """
    if not os.path.lexists(path):
        return []
    try:
        pairs = read_plain(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read, it is cut or not vitkd's") from error
    if not isinstance(pairs, list) or not all(is_pair(pair, student, teacher, part) for pair in pairs):
        raise ConfigError(f"{path}: cannot be read, it is no list of pairs of these models' blocks")
    return pairs


def is_pair(pair: Any, student: Sequence[int], teacher: Sequence[int], part: str) -> bool:
    """Whether it is a `BlockPair` of models whose `part` of the attention has so many heads a block."""
    try:
        block, teacher_block = pair["student_block"], pair["teacher_block"]
        heads, teacher_heads = pair["student_heads"], pair["teacher_heads"]
        numbers = [(block, len(student)), (teacher_block, len(teacher))]
        numbers += [(head, student[block]) for head in heads]
        numbers += [(head, teacher[teacher_block]) for group in teacher_heads for head in group]
        is_part = "part" not in pair or pair["part"] == part  # of a run by a version that knew no parts
        has_groups = len(heads) == len(teacher_heads) > 0 and all(teacher_heads)
        has_groups &= "weights" not in pair or are_weights(pair["weights"], teacher_heads)
    except (TypeError, KeyError, IndexError):
        return False
    return (
        is_part and has_groups and all(type(number) is int and 0 <= number < most for number, most in numbers)
    )


def are_weights(weights: Any, groups: Sequence[Sequence[int]]) -> bool:
    """Whether they are one finite number for each head of each group, or none at all."""
    return not weights or (
        [*map(len, weights)] == [*map(len, groups)]
        and all(type(weight) is float and math.isfinite(weight) for each in weights for weight in each)
    )


def read_teacher_predictions(path: Path, images: int, classes: int) -> np.ndarray | None:
    """The teacher's predicted class [N] for every test image, or None for a run without a teacher.

    Raises ConfigError if the file cannot be read, or is of other images or classes.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            if "teacher.npy" not in archive.namelist():
                return None
            # No more is unpacked than a header and the classes can have.
            content = archive.open("teacher.npy").read(1024 + 8 * images)
        predicted = np.load(io.BytesIO(content), allow_pickle=False)
    # Foreign bytes make the readers raise almost anything.
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read; has the run finished?") from error
    is_whole = predicted.shape == (images,) and np.issubdtype(predicted.dtype, np.integer)
    if not is_whole or not ((predicted >= 0) & (predicted < classes)).all():
        what = f"classes 0 to {classes - 1} of {images:,} test images"
        raise ConfigError(f"{path}: does not hold {what}; name the data set that it is of")
    return predicted.astype(np.int64)
