"""Which images to show: by whether teacher and student are right, chosen by seed, and by class.

Shapes: N images of a test set, K classes, n images in a cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vitkd.errors import ConfigError, suggest
from vitkd.statistics import holm

BOTH_RIGHT = "both right"
STUDENT_WRONG = "student wrong"
TEACHER_WRONG = "teacher wrong"
BOTH_WRONG = "both wrong"
CELLS = (BOTH_RIGHT, STUDENT_WRONG, TEACHER_WRONG, BOTH_WRONG)
"""who is wrong, if either; of two, that one alone"""

IN_WORDS = {
    BOTH_RIGHT: "teacher and student are right",
    STUDENT_WRONG: "the teacher is right and the student wrong",
    TEACHER_WRONG: "the teacher is wrong and the student right",
    BOTH_WRONG: "teacher and student are wrong",
}

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Answers:
    """What teacher and student predicted on a test set. Tensors on any device become arrays."""

    labels: NDArray[np.int64]
    """[N] class indices, as the predictions are"""
    teacher_predicted: NDArray[np.int64]
    student_predicted: NDArray[np.int64]
    class_names: Sequence[str]
    """[K]"""

    def __post_init__(self) -> None:
        names = ("labels", "teacher_predicted", "student_predicted")
        for name in names:
            object.__setattr__(self, name, _array(getattr(self, name)).astype(np.int64))
        shapes = {name: getattr(self, name).shape for name in names}
        assert len({*shapes.values()}) == 1, f"one prediction an image: {shapes}"
        classes = len(self.class_names)
        for name in names:
            indices = getattr(self, name)
            unknown = indices[(indices < 0) | (indices >= classes)]
            assert not len(unknown), f"{name} {unknown[:3]} are among no {classes} class names"


@dataclass(frozen=True, eq=False)
class Cell:
    """The images on which teacher and student are right or wrong in one of four ways."""

    name: str
    """one of `CELLS`"""
    indices: Indices
    """[n], ascending"""
    answers: Answers

    @property
    def count(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class OverRepresented:
    """A class with more images in a cell than its share of the test set."""

    label: str
    count: int
    """its images in the cell"""
    expected: float
    """its images among as many drawn from the test set at random"""
    ratio: float
    """count / expected"""
    p: float
    """of at least as many, hypergeometric"""
    p_holm: float
    """`p` corrected for all classes in the test set (Holm 1979)"""


def cells(answers: Answers) -> dict[str, Cell]:
    """The four `CELLS` of {teacher right, wrong} × {student right, wrong}; each image is in one."""
    teacher = answers.teacher_predicted == answers.labels
    student = answers.student_predicted == answers.labels
    inside = (teacher & student, teacher & ~student, ~teacher & student, ~teacher & ~student)
    return {name: Cell(name, np.flatnonzero(mask), answers) for name, mask in zip(CELLS, inside, strict=True)}


def choose(cell: Cell, count: int, seed: int, *, of_class: str | None = None) -> Indices:
    """`count` images of a cell at random, or all where there are fewer: their indices, in random order.

    Every image has a place in a line that depends on the seed and its index alone, and the first in the cell
    are chosen. So the choice depends on neither earlier calls nor other cells, a larger count adds to a
    smaller one's, and of two students' cells the same images are chosen as far as both hold them.

    Args:
        of_class: images of this class only.

    Raises:
        ConfigError: a count below 1, or no such class.
    """
    if count < 1:
        raise ConfigError(f"count={count}: must be at least 1")
    indices = cell.indices
    if of_class is not None:
        indices = indices[cell.answers.labels[indices] == class_index(of_class, cell.answers.class_names)]
    # The generator's first numbers are the same however many follow.
    place = np.random.default_rng(seed).random(int(indices.max(initial=0)) + 1)
    return indices[place[indices].argsort()][:count]


def nothing_in(cell: Cell, of_class: str | None = None) -> str:
    """That there is no image to choose from, which is no error: a good student leaves cells empty."""
    whose = "" if of_class is None else f" of class {of_class}"
    return f"no image{whose} among {len(cell.answers.labels):,}: {IN_WORDS[cell.name]}"


def over_represented(cell: Cell, level: float = 0.05) -> list[OverRepresented]:
    """The classes with more images in a cell than chance would put there, the least likely first.

    Chance draws the cell's n images from the test set without replacement, so that a class's count is
    hypergeometric. `level` bounds Holm's corrected p, so the chance of naming any class wrongly; 1 names all
    that exceed what is expected.
    """
    names, total = cell.answers.class_names, len(cell.answers.labels)
    of_class = _counts(cell.answers, np.arange(total))
    present = np.flatnonzero(of_class)
    seen, sizes = _counts(cell.answers, cell.indices)[present], of_class[present]
    p = stats.hypergeom.sf(seen - 1, total, sizes, cell.count)
    corrected = np.array(holm(p.tolist()), np.float64)
    expected = cell.count * sizes / max(total, 1)
    chosen = np.flatnonzero((seen > expected) & (corrected <= level))
    columns = (seen / np.where(expected > 0, expected, 1), p, corrected)
    return [
        OverRepresented(
            names[present[i]], int(seen[i]), float(expected[i]), *(float(each[i]) for each in columns)
        )
        for i in chosen[np.argsort(p[chosen], kind="stable")]
    ]


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Where a class stands among the names; ConfigError with near ones where it is not among them."""
    if name not in class_names:
        raise ConfigError(f"class {name}: the data set has none of that name; {suggest(name, class_names)}")
    return [*class_names].index(name)


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _counts(answers: Answers, indices: Indices) -> NDArray[np.int64]:
    """Images of each class, [K]."""
    return np.bincount(answers.labels[indices], minlength=len(answers.class_names))
