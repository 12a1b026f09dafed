"""Which images to show: by whether teacher and student are right, chosen by seed, and by class.

Shapes: N images of a test set, K classes, n images in a cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from vitkd.statistics import holm

BOTH_RIGHT = "both right"
STUDENT_WRONG = "student wrong"
TEACHER_WRONG = "teacher wrong"
BOTH_WRONG = "both wrong"
IN_WORDS = {
    BOTH_RIGHT: "both are right",
    STUDENT_WRONG: "only the student is wrong",
    TEACHER_WRONG: "only the teacher is wrong",
    BOTH_WRONG: "both are wrong",
}
CELLS = tuple(IN_WORDS)
"""who is wrong, if either; of two, that one alone"""

Indices = NDArray[np.int64]


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


def cells(labels: Indices, teacher_predicted: Indices, student_predicted: Indices) -> dict[str, Indices]:
    """The four `CELLS` of {teacher right, wrong} × {student right, wrong}, each as its images' indices [n].

    Args:
        labels, teacher_predicted, student_predicted: [N] class indices.

    Returns:
        cell → indices in ascending order; each image is in one cell.
    """
    teacher, student = teacher_predicted == labels, student_predicted == labels
    inside = (teacher & student, teacher & ~student, ~teacher & student, ~teacher & ~student)
    return {name: np.flatnonzero(mask) for name, mask in zip(CELLS, inside, strict=True)}


def choose(indices: Indices, count: int, seed: int) -> Indices:
    """`count` of the indices at random, or all where there are fewer, in random order.

    Every image has a place in a line that depends on the seed and its index alone, and the first of a cell
    are chosen. So the choice depends on neither earlier calls nor other cells, a larger count adds to a
    smaller one's, and of two students' cells the same images are chosen as far as both hold them.
    """
    # The generator's first numbers are the same however many follow.
    place = np.random.default_rng(seed).random(int(indices.max(initial=0)) + 1)
    return indices[place[indices].argsort()][:count]


def over_represented(
    indices: Indices, labels: Indices, class_names: Sequence[str], level: float = 0.05
) -> list[OverRepresented]:
    """The classes with more images in a cell than chance would put there, the least likely first.

    Chance draws the cell's n images from the test set without replacement, so that a class's count is
    hypergeometric. `level` bounds Holm's corrected p, so the chance of naming any class wrongly; 1 names all
    that exceed what is expected.

    Args:
        indices: [n] of the cell's images.
        labels: [N] of the whole test set.
    """
    of_class, in_cell = (np.bincount(each, minlength=len(class_names)) for each in (labels, labels[indices]))
    present = np.flatnonzero(of_class)
    seen, sizes = in_cell[present], of_class[present]
    p = stats.hypergeom.sf(seen - 1, len(labels), sizes, len(indices))
    corrected = np.array(holm(p.tolist()), np.float64)
    expected = len(indices) * sizes / max(len(labels), 1)
    chosen = np.flatnonzero((seen > expected) & (corrected <= level))
    return [
        OverRepresented(
            class_names[present[i]],
            int(seen[i]),
            *map(float, (expected[i], seen[i] / expected[i], p[i], corrected[i])),
        )
        for i in chosen[np.argsort(p[chosen], kind="stable")]
    ]
