"""The page of an explanation: its images and maps, the charts and tables below them, and what stands out.

Shapes: L blocks, A heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkd.explain.gallery.cells import BOTH_RIGHT, IN_WORDS
from vitkd.explain.gallery.charts import Curves, HeatMap
from vitkd.explain.gallery.explanation import Explanation, OfMethods
from vitkd.explain.measures.fidelity import FidelityRow
from vitkd.explain.measures.survey import FidelityResult, TokenAlignment

IN_ORDER = {"positive": "most relevant first", "negative": "least relevant first"}

Value = str | float | int | None

WITH_BASELINES = {
    "js": "Jensen–Shannon, nats",
    "spearman": "rank correlation, class row",
    "cls_overlap": "overlap of the class rows",
}
ALONE = {"top_k_iou": "IoU of the top quarter", "entropy": "entropy, nats", "mean_distance": "distance, px"}


class Table(NamedTuple):
    """Metrics below the gallery; None stands for an undefined one."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


@dataclass(frozen=True, eq=False)
class GalleryPage(Explanation):
    """An explanation with all that the page shows below its gallery."""

    tables: Sequence[Table] = ()
    figure_1: bytes | None = None
    """PNG"""
    heat_maps: Sequence[HeatMap] = ()
    curves: Sequence[Curves] = ()


def page_of(explanation: Explanation, figure_1: bytes | None) -> GalleryPage:
    """The page, with the PNG of Figure 1 if there is one."""
    return GalleryPage(
        **vars(explanation) | {"notes": [*explanation.notes, *_findings(explanation)]},
        tables=[
            *(_fidelity_table(student, result) for student, result in explanation.fidelity.items()),
            *([_reach_table(explanation)] if explanation.reach else []),
            *(_faithfulness_table(model, methods) for model, methods in explanation.faithfulness.items()),
            *([_correctness_table(explanation)] if explanation.correlations else []),
        ],
        figure_1=figure_1,
        heat_maps=[heat_map(student, result) for student, result in explanation.fidelity.items()],
        curves=[removal_curves(explanation)] if explanation.faithfulness else [],
    )


def heat_map(student: str, result: FidelityResult) -> HeatMap:
    """A student's divergence from its teacher by block and head, beside its baselines."""
    parts = {student: "metrics", "student alone": "alone", "permuted heads": "permuted"}
    if not all(row.alone for row in result.rows):
        del parts["student alone"]
    blocks = sorted({row.student_block for row in result.rows})
    return HeatMap(
        f"How alike the maps of {student} and its teacher are",
        "Mean over all test images.",
        "Jensen–Shannon divergence from the teacher's map, nats (0: the same)",
        {title: _grid(result, part, blocks) for title, part in parts.items()},
        [*map(str, blocks)],
    )


def _grid(result: FidelityResult, part: str, blocks: Sequence[int]) -> NDArray[np.float64]:
    """Divergences [L, A]; NaN where there is none."""
    grid = np.full((len(blocks), 1 + max(row.student_head for row in result.rows)), np.nan)
    for row in result.rows:
        grid[blocks.index(row.student_block), row.student_head] = (getattr(row, part) or {}).get("js")
    return grid


def removal_curves(explanation: Explanation) -> Curves:
    """Every method's mean probability of the class predicted, while pixels are removed."""
    panels = {}
    for model, methods in explanation.faithfulness.items():
        for order, words in IN_ORDER.items():
            found = {name.replace("_", " "): orders[order]["predicted"] for name, orders in methods.items()}
            lines = {name: (each.fractions, each.probability) for name, each in found.items()}
            panels[f"{model}, {words}"] = lines
    return Curves(
        "Faithfulness: removing pixels",
        "The mean probability of the class predicted while pixels are set to black.",
        "probability of the class",
        panels,
    )


def _findings(explanation: Explanation) -> list[str]:
    """The classes that stand out where someone is wrong, and whether fidelity goes with being right."""
    notes = []
    for cell, classes in explanation.over_represented.items():
        if classes and cell != BOTH_RIGHT:
            named = ", ".join(f"{c.label} ({c.count}, expected {c.expected:.1f})" for c in classes[:5])
            notes.append(f"Over-represented where {IN_WORDS[cell]}: {named}.")
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


def _fidelity_table(student: str, result: FidelityResult) -> Table:
    """Each map's metrics beside their baselines."""
    has_alone = all(row.alone for row in result.rows)
    baselines = ["alone", "permuted"] if has_alone else ["permuted"]
    lines = [
        _fidelity_line(row, is_distilled, result.cka[row.student_block, row.teacher_block], baselines)
        for row, is_distilled in zip(result.rows, result.distilled, strict=True)
    ]
    return Table(
        f"Fidelity of {student}, block.head",
        "Means over all test images. "
        + ("… alone: of the student that learned without the teacher. " if has_alone else "")
        + "… permuted: of the same map with other heads of the teacher's block. "
        "… other images: CKA with the teacher's tokens of other images.",
        [title for title, _ in lines[0]],
        [[value for _, value in line] for line in lines],
    )


def _fidelity_line(
    row: FidelityRow, is_distilled: bool, cka: TokenAlignment, baselines: Sequence[str]
) -> list[tuple[str, Value]]:
    """Each column's title and value."""
    teacher_heads = "+".join(map(str, row.teacher_heads)) + (" weighted" if row.weights else "")
    line: list[tuple[str, Value]] = [
        ("student map", f"{row.student_block}.{row.student_head}"),
        ("teacher map", f"{row.teacher_block}.{teacher_heads}"),
        ("distilled", "yes" if is_distilled else ""),
    ]
    for metric, title in WITH_BASELINES.items():
        line.append((title, row.metrics[metric]))
        line += [(f"… {each}", (getattr(row, each) or {}).get(metric)) for each in baselines]
    line += [(title, row.metrics[metric]) for metric, title in ALONE.items()]
    line.append(("CKA of tokens", finite(cka.value)))
    line += [] if cka.alone is None else [("… alone", finite(cka.alone))]
    return [*line, ("… other images", finite(cka.other_images))]


def _reach_table(explanation: Explanation) -> Table:
    """How far each model's blocks attend."""
    of_models = [reach.nanmean(-1).tolist() for reach in explanation.reach.values()]
    rows = [[block, *map(finite, means)] for block, means in enumerate(zip_longest(*of_models))]
    return Table(
        "Attention distance by block",
        "Mean attention distance, as a fraction of that of uniform attention. With much data some low blocks "
        "attend near by; with little data they hardly learn to (Zhu et al. 2023).",
        ["block", *explanation.reach],
        rows,
    )


def _faithfulness_table(model: str, methods: OfMethods) -> Table:
    """Each method's area under the curve, and how much better than random order it is."""
    columns, rows = ["method"], []
    for order in IN_ORDER:
        for target in ("predicted", "true"):
            columns += [f"{order}, {target}: AUC", "better than random by", "± s.e."]
    for method, orders in methods.items():
        found = [orders[order][target] for order in IN_ORDER for target in ("predicted", "target")]
        metrics = [value for each in found for value in (each.auc, each.gap, each.gap_error)]
        rows.append([method.replace("_", " "), *metrics])
    return Table(
        f"Faithfulness, {model}",
        "Area under the class's probability while pixels are removed: in positive order (most relevant "
        "first) low is faithful, in negative order high.",
        columns,
        rows,
    )


def _correctness_table(explanation: Explanation) -> Table:
    """Whether a student is right where it attends as its teacher does."""
    rows = [
        [student, which, *map(finite, (c.r, *c.interval, c.p)), c.n, c.reason]
        for student, correlations in explanation.correlations.items()
        for which, c in correlations.items()
    ]
    return Table(
        "Does fidelity predict correctness?",
        "Point-biserial correlation of each image's divergence from the teacher's attention with the "
        "student being right: below 0, a student that attends as its teacher does is right more often. "
        "This does not prove a cause.",
        ["student", "among", "r", "95 % from", "to", "p", "images", ""],
        rows,
    )


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
