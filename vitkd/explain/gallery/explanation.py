"""Everything that an explanation found, before it is drawn or written.

Shapes: N images shown, C channels, H × W pixels, L blocks, A heads.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from vitkd.explain.gallery.cells import CELLS, OverRepresented
from vitkd.explain.maps.subjects import ATTENTION, TEACHER, Subject
from vitkd.explain.measures.correctness import Correlation
from vitkd.explain.measures.faithfulness import Faithfulness
from vitkd.explain.measures.survey import FidelityResult

OfMethods = Mapping[str, Mapping[str, Mapping[str, Faithfulness]]]
"""method → order of removal → class followed"""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Images, what every model predicts of them and where it looks, and the metrics of the whole split.

    Raises ValueError if these do not fit together.
    """

    title: str
    source: str
    """which runs, data set and epoch; below every figure"""
    pixels: Tensor
    """[N, C, H, W] in 0..1, C 1 or 3"""
    labels: Sequence[int]
    """[N]; -1 where the class is not known"""
    cells: Sequence[str]
    """[N], of `CELLS`; "" for all images where there is no teacher"""
    numbers: Sequence[int]
    """[N] positions in the test split"""
    class_names: Sequence[str]
    subjects: Sequence[Subject]
    """the teacher first, if there is one; it may have no maps"""
    other_block: int | None = None
    """of the first student, one that was not distilled"""
    counts: Mapping[str, int] = field(default_factory=dict)
    """cell → images of the whole split"""
    over_represented: Mapping[str, Sequence[OverRepresented]] = field(default_factory=dict)
    """cell → classes"""
    fidelity: Mapping[str, FidelityResult] = field(default_factory=dict)
    """student → its fidelity to the teacher"""
    correlations: Mapping[str, Mapping[str, Correlation]] = field(default_factory=dict)
    """student → which images → correlation of its divergence with its being right"""
    reach: Mapping[str, Tensor] = field(default_factory=dict)
    """model → [L, A] mean attention distance over that of uniform attention"""
    faithfulness: Mapping[str, OfMethods] = field(default_factory=dict)
    """model → its methods'"""
    notes: Sequence[str] = ()
    """sentences for the page"""
    epoch: str = ""
    """best or last: which weights of the students"""

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if len(shape) != 4 or not shape[0] or shape[1] not in (1, 3):
            raise ValueError(f"pixels are [N, C, H, W], at least one image, C 1 or 3, not {[*shape]}")
        for name, values in _of_images(self).items():
            if len(values) != len(self.pixels):
                raise ValueError(f"{name}: {len(values)} for {len(self.pixels)} images")
        for subject in self.subjects:
            _check_shapes(subject)
        _check_names(self)

    @property
    def teacher(self) -> Subject | None:
        first = self.subjects[0]
        return first if first.name == TEACHER else None

    @property
    def student(self) -> Subject:
        """The first."""
        return next(subject for subject in self.subjects if subject.name != TEACHER)

    @property
    def with_maps(self) -> list[Subject]:
        """The subjects that have attention maps."""
        return [subject for subject in self.subjects if ATTENTION in subject.maps]

    @property
    def readers(self) -> list[str]:
        """The tokens that each subject with maps classifies by."""
        return [subject.readers for subject in self.with_maps]


def _of_images(explanation: Explanation) -> dict[str, Sized]:
    """Everything that there is one of for each image, by name."""
    of_images: dict[str, Sized] = {
        name: getattr(explanation, name) for name in ("labels", "cells", "numbers")
    }
    for subject in explanation.subjects:
        own: dict[str, Sized] = {"predictions": subject.predicted, "confidences": subject.confidence}
        own |= subject.maps
        if subject.patches is not None:
            own["patches"] = subject.patches
        of_images |= {f"{subject.name}'s {name}": values for name, values in own.items()}
    return of_images


def _check_shapes(subject: Subject) -> None:
    for method, maps in subject.maps.items():
        axes = 5 if method == ATTENTION else 3
        if maps.ndim != axes or not np.isfinite(maps).all():
            shape = [*maps.shape]
            raise ValueError(f"{subject.name}'s {method}: finite values on {axes} axes, not {shape}")
    if subject.patches is not None:
        blocks, heads, height, width = subject.maps[ATTENTION].shape[1:]
        expected = [(blocks, each, height * width, height, width) for each in (heads, 1)]
        if subject.patches.shape[1:] not in expected:
            shape = [*subject.patches.shape]
            raise ValueError(f"{subject.name}'s patches: {shape}, not [N, …] of {expected}")


def _check_names(explanation: Explanation) -> None:
    named, known = {*explanation.cells, *explanation.counts}, {*CELLS}
    if {*explanation.cells} != {""} and not named <= known:
        raise ValueError(f"cells {sorted(named - known)}: there are {sorted(known)}")
    labels = [*explanation.labels, *(each for subject in explanation.subjects for each in subject.predicted)]
    if not all(-1 <= label < len(explanation.class_names) for label in labels):
        raise ValueError(f"classes beyond the {len(explanation.class_names)} that have names")
