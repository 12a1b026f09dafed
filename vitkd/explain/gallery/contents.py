"""The page of an explanation: its images and maps, the charts and tables below them, and what stands out.

Shapes: L blocks, A heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkd.explain.gallery.cells import BOTH_RIGHT, BOTH_WRONG, STUDENT_WRONG, TEACHER_WRONG
from vitkd.explain.gallery.charts import Curves, HeatMap
from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.tables import Table, tables_of
from vitkd.explain.measures.survey import FidelityResult

FIGURE_1 = "figure_1"
ORDERS = {"positive": "most relevant first", "negative": "least relevant first"}
WHO = {
    STUDENT_WRONG: "only the student is wrong",
    TEACHER_WRONG: "only the teacher is wrong",
    BOTH_WRONG: "both are wrong",
}


class Plot(NamedTuple):
    """A picture below the gallery."""

    title: str
    caption: str
    picture: bytes
    """PNG"""


@dataclass(frozen=True, eq=False)
class GalleryPage(Explanation):
    """An explanation with all that the page shows below its gallery."""

    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    heat_maps: Sequence[HeatMap] = ()
    curves: Sequence[Curves] = ()


def page_of(explanation: Explanation, pictures: Mapping[str, bytes]) -> GalleryPage:
    """The page; of the `pictures` (name → PNG) it shows Figure 1."""
    notes = [*explanation.notes, *_over_represented(explanation), *_correlations(explanation)]
    title, source = "Where teacher and student look", explanation.source
    return GalleryPage(
        **vars(explanation) | {"notes": notes},
        tables=tables_of(explanation),
        plots=[Plot(title, source, pictures[FIGURE_1])] if FIGURE_1 in pictures else [],
        heat_maps=[heat_map(student, result) for student, result in explanation.fidelity.items()],
        curves=[removal_curves(explanation)] if explanation.faithfulness else [],
    )


def heat_map(student: str, result: FidelityResult) -> HeatMap:
    """A student's divergence from its teacher by block and head, beside its baselines."""
    panels = {student: _grid(result, "metrics")}
    if all(row.alone for row in result.rows):
        panels["student alone"] = _grid(result, "alone")
    panels["permuted heads"] = _grid(result, "permuted")
    return HeatMap(
        f"How alike the maps of {student} and its teacher are",
        "Mean over all test images.",
        "Jensen–Shannon divergence from the teacher's map, nats (0: the same)",
        panels,
        [str(block) for block in sorted({row.student_block for row in result.rows})],
    )


def _grid(result: FidelityResult, part: str) -> NDArray[np.float64]:
    """Divergences [L, A]; NaN where there is none."""
    blocks = sorted({row.student_block for row in result.rows})
    grid = np.full((len(blocks), 1 + max(row.student_head for row in result.rows)), np.nan)
    for row in result.rows:
        value = (getattr(row, part) or {}).get("js")
        grid[blocks.index(row.student_block), row.student_head] = np.nan if value is None else value
    return grid


def removal_curves(explanation: Explanation) -> Curves:
    """Every method's mean probability of the class predicted, while pixels are removed."""
    panels = {}
    for model, methods in explanation.faithfulness.items():
        for order, words in ORDERS.items():
            found = {name.replace("_", " "): orders[order]["predicted"] for name, orders in methods.items()}
            lines = {name: (each.fractions, each.probability) for name, each in found.items()}
            panels[f"{model}, {words}"] = lines
    return Curves(
        "Faithfulness: removing pixels",
        "The mean probability of the class predicted while pixels are set to black.",
        "probability of the class",
        panels,
    )


def _over_represented(explanation: Explanation) -> list[str]:
    """The classes that stand out where someone is wrong."""
    notes = []
    for cell, classes in explanation.over_represented.items():
        if classes and cell != BOTH_RIGHT:
            named = ", ".join(f"{c.label} ({c.count}, expected {c.expected:.1f})" for c in classes[:5])
            notes.append(f"Over-represented where {WHO[cell]}: {named}.")
    return notes


def _correlations(explanation: Explanation) -> list[str]:
    """Whether fidelity goes with being right."""
    notes = []
    for student, correlations in explanation.correlations.items():
        # Among the images that the teacher has right less of it is due to easy images.
        which, c = [*correlations.items()][-1]
        if not math.isnan(c.r):
            low, high = c.interval
            notes.append(
                f"Divergence from the teacher's attention and {student} being right correlate by "
                f"r = {c.r:.2f} [{low:.2f}, {high:.2f}], among {which} ({c.n:,})."
            )
    return notes
