"""Everything that an explanation found, before it is drawn or written.

Shapes: N images shown, C channels, H × W pixels, L blocks, A heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vitkd.explain.gallery.cells import OverRepresented
from vitkd.explain.maps.subjects import ATTENTION, Subject
from vitkd.explain.measures.correctness import Correlation
from vitkd.explain.measures.faithfulness import Faithfulness
from vitkd.explain.measures.survey import FidelityResult

OfMethods = Mapping[str, Mapping[str, Mapping[str, Faithfulness]]]
"""method → order of removal → class followed"""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Images, what every model predicts of them and where it looks, and the metrics of the whole split."""

    title: str
    source: str
    """which runs, data set and epoch; below every figure"""
    pixels: Tensor
    """[N, C, H, W] in 0..1"""
    labels: Sequence[int]
    """[N]; -1 where the class is not known"""
    cells: Sequence[str]
    """[N]; "" without a teacher"""
    numbers: Sequence[int]
    """[N] positions in the test split"""
    class_names: Sequence[str]
    subjects: Sequence[Subject]
    """the teacher first, if there is one; it may have no maps"""
    regions: Mapping[str, NDArray[np.int64]]
    """subject → [N, h, w]"""
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

    @property
    def teacher(self) -> Subject | None:
        first = self.subjects[0]
        return first if first.role == "teacher" else None

    @property
    def student(self) -> Subject:
        """The first."""
        return next(subject for subject in self.subjects if subject.role == "student")

    @property
    def with_maps(self) -> list[Subject]:
        """The subjects that have attention maps."""
        return [subject for subject in self.subjects if ATTENTION in subject.maps]

    @property
    def readers(self) -> list[str]:
        """The tokens that each subject with maps classifies by."""
        return [subject.readers for subject in self.with_maps]
