"""Which images to show: by whether teacher and student are right, chosen by seed, and by class.

Shapes: N images of a test set, K classes, n images in a cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
"""who is wrong, if anybody; of two, it alone"""
FIGURE_2 = (STUDENT_WRONG,)
"""the report's: student wrong though teacher right"""
FIGURE_3 = (TEACHER_WRONG, BOTH_WRONG)
"""the report's: teacher wrong, then student right or wrong"""

IN_WORDS = {
    BOTH_RIGHT: "teacher and student are right",
    STUDENT_WRONG: "the teacher is right and the student wrong",
    TEACHER_WRONG: "the teacher is wrong and the student right",
    BOTH_WRONG: "teacher and student are wrong",
}

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Answers:
    """What teacher and student answered on a test set. Tensors on any device become arrays."""

    labels: NDArray[np.int64]
    """[N] class indices, as the predictions are"""
    teacher_predicted: NDArray[np.int64]
    student_predicted: NDArray[np.int64]
    teacher_confidence: NDArray[np.float64]
    """[N] probabilities of the class predicted"""
    student_confidence: NDArray[np.float64]
    class_names: Sequence[str]
    """[K]"""

    def __post_init__(self) -> None:
        classes = ["labels", "teacher_predicted", "student_predicted"]
        names = [*classes, "teacher_confidence", "student_confidence"]
        for name in names:
            kind = np.int64 if name in classes else np.float64
            object.__setattr__(self, name, _array(getattr(self, name)).astype(kind))
        shapes = {name: getattr(self, name).shape for name in names}
        assert len({*shapes.values()}) == 1, f"one answer an image: {shapes}"
        for name in classes:
            indices = getattr(self, name)
            known = (indices >= 0) & (indices < len(self.class_names))
            assert known.all(), (
                f"{name} {indices[~known][:3]} are among no {len(self.class_names)} class names"
            )


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


class EmptyCell(NamedTuple):
    """There is nothing to choose from, which is no error: a good student leaves cells empty."""

    cell: str
    message: str
    """for a person to read"""


@dataclass(frozen=True)
class Example:
    """An image and what was answered."""

    index: int
    label: str
    teacher: str
    teacher_confidence: float
    student: str
    student_confidence: float


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


def choose(
    cell: Cell, count: int, seed: int, *, per_class: int | None = None, of_class: str | None = None
) -> Indices | EmptyCell:
    """`count` images of a cell at random, or all where there are fewer.

    Every image has a place in a line that depends on the seed and its index alone, and the first in the cell
    are chosen. So the choice depends on neither earlier calls nor other cells, a larger count adds to a
    smaller one's, and of two students' cells the same images are chosen as far as both hold them.

    Args:
        per_class: at most so many of each class.
        of_class: images of this class only.

    Returns:
        The images' indices in that line's order, or why there are none.

    Raises:
        ConfigError: a count below 1, or no such class.
    """
    for name, number in (("count", count), ("per_class", per_class)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}={number}: must be at least 1")
    indices = cell.indices
    if of_class is not None:
        indices = indices[cell.answers.labels[indices] == class_index(of_class, cell.answers.class_names)]
    if not len(indices):
        return _empty(cell, of_class)
    # The generator's first numbers are the same however many follow.
    place = np.random.default_rng(seed).random(int(indices.max()) + 1)
    line = indices[place[indices].argsort()]
    if per_class is not None:
        line = line[_occurrence(cell.answers.labels[line]) < per_class]
    return line[:count]


def examples(answers: Answers, indices: Sequence[int] | Indices) -> list[Example]:
    """What was answered on these images, in words and confidences."""
    names = answers.class_names
    return [
        Example(
            int(i),
            names[answers.labels[i]],
            names[answers.teacher_predicted[i]],
            float(answers.teacher_confidence[i]),
            names[answers.student_predicted[i]],
            float(answers.student_confidence[i]),
        )
        for i in indices
    ]


def counts_by_class(found: Mapping[str, Cell]) -> dict[str, dict[str, int]]:
    """Cell → class → images, all classes named."""
    return {
        name: dict(zip(cell.answers.class_names, map(int, _counts(cell.answers, cell.indices)), strict=True))
        for name, cell in found.items()
    }


def over_represented(cell: Cell, level: float = 0.05) -> list[OverRepresented]:
    """The classes with more images in a cell than chance would put there, the least likely first.

    Chance draws the cell's n images from the test set without replacement, so that a class's count is
    hypergeometric. `level` bounds Holm's corrected p, so the chance of naming any class wrongly; 1 names all
    that exceed what is expected.
    """
    of_class = _counts(cell.answers, np.arange(len(cell.answers.labels)))
    present = np.flatnonzero(of_class)
    seen, sizes = _counts(cell.answers, cell.indices)[present], of_class[present]
    total = len(cell.answers.labels)
    p = stats.hypergeom.sf(seen - 1, total, sizes, cell.count)
    corrected = np.array(holm(p.tolist()), np.float64)
    expected = cell.count * sizes / max(total, 1)
    named = np.flatnonzero((seen > expected) & (corrected <= level))
    return [
        OverRepresented(
            cell.answers.class_names[present[i]],
            int(seen[i]),
            float(expected[i]),
            float(seen[i] / expected[i]),
            float(p[i]),
            float(corrected[i]),
        )
        for i in named[np.argsort(p[named], kind="stable")]
    ]


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Where a class stands among the names; ConfigError with near ones where it is not among them."""
    if name not in class_names:
        raise ConfigError(f"class {name}: the data set has none of that name; {suggest(name, class_names)}")
    return [*class_names].index(name)


def _empty(cell: Cell, of_class: str | None) -> EmptyCell:
    whose = "" if of_class is None else f" of class {of_class}"
    return EmptyCell(cell.name, f"no image{whose} among {len(cell.answers.labels):,}: {IN_WORDS[cell.name]}")


def _array(values: Any) -> NDArray[Any]:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _counts(answers: Answers, indices: Indices) -> NDArray[np.int64]:
    """Images of each class, [K]."""
    return np.bincount(answers.labels[indices], minlength=len(answers.class_names))


def _occurrence(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many equal labels stand before each."""
    order = labels.argsort(kind="stable")
    in_order = labels[order]
    before = np.empty_like(order)
    before[order] = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    return before
