"""The page's tables."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vitkd.explain.gallery.explanation import Explanation, OfMethods
from vitkd.explain.measures.distances import COMPARISONS
from vitkd.explain.measures.faithfulness import ORDERS
from vitkd.explain.measures.fidelity import FidelityRow
from vitkd.explain.measures.survey import FidelityResult, TokenAlignment

Value = str | float | int | None

WITH_BASELINES = {
    "js": "Jensen–Shannon, nats",
    "spearman": "rank correlation, class row",
    "cls_overlap": "overlap of the class rows",
}
ALONE = {"top_k_iou": "IoU of the top quarter", "entropy": "entropy, nats", "mean_distance": "distance, px"}
assert {*WITH_BASELINES} < {*COMPARISONS}


class Table(NamedTuple):
    """Metrics below the gallery; None stands for an undefined one."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]


def tables_of(explanation: Explanation) -> list[Table]:
    """Those that there are metrics for."""
    return [
        *(fidelity_table(student, result) for student, result in explanation.fidelity.items()),
        *([reach_table(explanation)] if explanation.reach else []),
        *(faithfulness_table(model, methods) for model, methods in explanation.faithfulness.items()),
        *([correctness_table(explanation)] if explanation.correlations else []),
    ]


def fidelity_table(student: str, result: FidelityResult) -> Table:
    """Each map's metrics beside their baselines."""
    has_alone = all(row.alone for row in result.rows)
    baselines = ["alone", "permuted"] if has_alone else ["permuted"]
    return Table(
        f"Fidelity of {student}, block.head",
        "Means over all test images. "
        + ("… alone: of the student that learned without the teacher. " if has_alone else "")
        + "… permuted: of the same map with other heads of the teacher's block. "
        "… other images: CKA with the teacher's tokens of other images.",
        _fidelity_columns(baselines),
        [
            _fidelity_row(row, distilled, result.cka[row.student_block, row.teacher_block], baselines)
            for row, distilled in zip(result.rows, result.distilled, strict=True)
        ],
    )


def _fidelity_columns(baselines: Sequence[str]) -> list[str]:
    columns = ["student map", "teacher map", "distilled"]
    for title in WITH_BASELINES.values():
        columns += [title, *(f"… {baseline}" for baseline in baselines)]
    tokens = ["CKA of tokens", *(["… alone"] if "alone" in baselines else []), "… other images"]
    return [*columns, *ALONE.values(), *tokens]


def _fidelity_row(
    row: FidelityRow, distilled: bool, cka: TokenAlignment, baselines: Sequence[str]
) -> list[Value]:
    teacher_heads = "+".join(map(str, row.teacher_heads))
    names = [f"{row.student_block}.{row.student_head}", f"{row.teacher_block}.{teacher_heads}"]
    values: list[Value] = [*names, "yes" if distilled else ""]
    for metric in WITH_BASELINES:
        values += [row.metrics[metric], *((getattr(row, each) or {}).get(metric) for each in baselines)]
    alone = [] if cka.alone is None else [finite(cka.alone)]
    tokens = [finite(cka.value), *alone, finite(cka.other_images)]
    return [*values, *(row.metrics[metric] for metric in ALONE), *tokens]


def reach_table(explanation: Explanation) -> Table:
    """How far each model's blocks attend."""
    of_models = [reach.nanmean(-1).tolist() for reach in explanation.reach.values()]
    rows: list[list[Value]] = [
        [block, *(finite(means[block]) if block < len(means) else None for means in of_models)]
        for block in range(max(map(len, of_models)))
    ]
    return Table(
        "Attention distance by block",
        "Mean attention distance, as a fraction of that of uniform attention. With much data some low blocks "
        "attend near by; with little data they hardly learn to (Zhu et al. 2023).",
        ["block", *explanation.reach],
        rows,
    )


def faithfulness_table(model: str, methods: OfMethods) -> Table:
    """Each method's area under the curve, and how much better than random order it is."""
    columns, rows = ["method"], []
    for order in ORDERS:
        for target in ("predicted", "true"):
            columns += [f"{order}, {target}: AUC", "better than random by", "± s.e."]
    for method, orders in methods.items():
        found = [orders[order][target] for order in ORDERS for target in ("predicted", "target")]
        metrics = [value for each in found for value in (each.auc, each.gap, each.gap_error)]
        rows.append([method.replace("_", " "), *metrics])
    return Table(
        f"Faithfulness, {model}",
        "Area under the class's probability while pixels are removed: in positive order (most relevant "
        "first) low is faithful, in negative order high.",
        columns,
        rows,
    )


def correctness_table(explanation: Explanation) -> Table:
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


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
