"""An explanation as files: the report's figures, arrays, metrics and the page.

Shapes: N images shown, h × w patches.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.cells import BOTH_RIGHT, BOTH_WRONG, CELLS, STUDENT_WRONG, TEACHER_WRONG
from vitkd.explain.gallery.contents import finite, page_of
from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.figures import Rows, attention_unit, common_name, figure_rows, png
from vitkd.explain.gallery.render import render
from vitkd.explain.maps.subjects import Subject, head_mean
from vitkd.explain.measures.distances import COMPARISONS
from vitkd.explain.measures.survey import FidelityResult

MAX_ROWS = 4
"""images of a cell in a figure"""

OF_CELLS = {
    "figure_2": ((STUDENT_WRONG,), "The student is wrong though its teacher is right."),
    "figure_3": (
        (TEACHER_WRONG, BOTH_WRONG),
        "The teacher is wrong; on the left the student is right, on the right it is wrong too.",
    ),
    "gallery": (CELLS, "By whether teacher and student are right."),
}
FILES = {f"{name}.png" for name in ("figure_1", *OF_CELLS)}
FILES |= {"maps.npz", "metrics.json", "fidelity.json", "index.html"}
"""all that there may be"""


def files_of(explanation: Explanation) -> dict[str, bytes]:
    """File name → content."""
    files = {"maps.npz": arrays_of(explanation)}  # written first: it tells whose folder this is
    files |= {f"{name}.png": png(figure) for name, figure in figures_of(explanation).items()}
    files["metrics.json"] = as_json(metrics_of(explanation))
    if explanation.fidelity:
        files["fidelity.json"] = as_json(fidelity_of(explanation))
    files["index.html"] = render(page_of(explanation, files.get("figure_1.png"))).encode()
    return files


def figures_of(explanation: Explanation) -> dict[str, Figure]:
    """Name → figure, of those that have something to show."""
    figures = {}
    if explanation.teacher in explanation.with_maps:
        figures["figure_1"] = first_figure(explanation)
    for name, (cells, _) in OF_CELLS.items():
        if {*cells} & {*explanation.cells}:
            figures[name] = figure_of_cells(explanation, name)
    return figures


def first_figure(explanation: Explanation) -> Figure:
    """Figure 1, of the first images that both have right, or of any."""
    rows = _of_cell(explanation, BOTH_RIGHT) or [*range(len(explanation.pixels))][:MAX_ROWS]
    teacher, student = explanation.teacher, explanation.student
    assert teacher is not None
    maps = {
        f"teacher, block {teacher.first_block}": head_mean(teacher),
        f"student, block {student.first_block}": head_mean(student),
    }
    if (other := explanation.other_block) is not None:
        maps[f"block {other}, not distilled"] = head_mean(student, other)
    return figure_rows(
        [_rows(explanation, "", rows, [teacher, student], on_one_grid([*maps.values()]))],
        columns=["image", *maps],
        unit=attention_unit(explanation.readers),
        caption=f"Attention of the {common_name(explanation.readers)}, heads averaged. {explanation.source}",
    )


def figure_of_cells(explanation: Explanation, name: str) -> Figure:
    """Each cell's first images beside the maps of all subjects."""
    cells, caption = OF_CELLS[name]
    subjects = explanation.with_maps
    maps = on_one_grid([head_mean(subject) for subject in subjects])
    return figure_rows(
        [_rows(explanation, cell, _of_cell(explanation, cell), subjects, maps) for cell in cells],
        columns=["image", *(f"{subject.name}, block {subject.first_block}" for subject in subjects)],
        unit=attention_unit(explanation.readers),
        caption=f"Heads averaged. {caption} {explanation.source}",
        across=min(len(cells), 2),
    )


def on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps [N, h, w] on the finest of their grids, summing to 1 there: equal colours mean the same."""
    finest = max((each.shape[-2:] for each in maps), key=math.prod)
    if all(each.shape[-2:] == finest for each in maps):
        return [*maps]
    resized = [interpolate(each[:, None], finest, mode="bilinear").squeeze(1) for each in maps]
    return [each / each.sum((-2, -1), keepdim=True) for each in resized]


def _rows(
    explanation: Explanation,
    title: str,
    rows: Sequence[int],
    subjects: Sequence[Subject],
    maps: Sequence[Tensor],
) -> Rows:
    names, labels = explanation.class_names, [explanation.labels[i] for i in rows]
    return Rows(
        title,
        explanation.pixels[rows],
        [each[rows] for each in maps],
        None if min(labels, default=0) < 0 else [names[label] for label in labels],
        [[names[subject.predicted[i]] for i in rows] for subject in subjects],
        [[subject.confidence[i] for i in rows] for subject in subjects],
    )


def _of_cell(explanation: Explanation, cell: str) -> list[int]:
    return [i for i, each in enumerate(explanation.cells) if each == cell][:MAX_ROWS]


def arrays_of(explanation: Explanation) -> bytes:
    """The shown images and all maps, for NumPy."""
    shared = ("pixels", "labels", "numbers", "cells")
    content: dict[str, Any] = {name: np.asarray(getattr(explanation, name)) for name in shared}
    for subject in explanation.subjects:
        content[f"{subject.name}/predicted"] = np.asarray(subject.predicted)
        content[f"{subject.name}/confidence"] = np.asarray(subject.confidence)
        content |= {f"{subject.name}/{method}": maps for method, maps in subject.maps.items()}
        if subject.patches is not None:
            content[f"{subject.name}/patches"] = subject.patches
        if subject.heads:
            content[f"{subject.name}/heads"] = np.asarray(subject.heads)
    file = BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def metrics_of(explanation: Explanation) -> dict[str, Any]:
    """Every metric but the fidelity table, for `as_json`."""
    return {
        "title": explanation.title,
        "source": explanation.source,
        "cells": explanation.counts,
        "over_represented": explanation.over_represented,
        "correctness": explanation.correlations,
        "attention_distance": explanation.reach,
        "faithfulness": explanation.faithfulness,
        "images": explanation.numbers,
    }


def fidelity_of(explanation: Explanation) -> dict[str, Any]:
    """The first student's fidelity table, and its means over distilled and over all maps."""
    result = next(iter(explanation.fidelity.values()))
    rows = [
        asdict(row) | {"distilled": distilled}
        for row, distilled in zip(result.rows, result.distilled, strict=True)
    ]
    cka = {f"{student}.{teacher}": each for (student, teacher), each in result.cka.items()}
    return {"epoch": explanation.epoch, "summary": _summary(result), "rows": rows, "cka": cka}


def _summary(result: FidelityResult) -> dict[str, float]:
    """Means over maps, such as `js_distilled` and `js_all_permuted`; none where no map defines one."""
    distilled = [row for row, is_distilled in zip(result.rows, result.distilled, strict=True) if is_distilled]
    summary = {}
    for metric in COMPARISONS:
        for which, rows in (("distilled", distilled), ("all", result.rows)):
            for part, suffix in (("metrics", ""), ("alone", "_alone"), ("permuted", "_permuted")):
                values = [(getattr(row, part) or {}).get(metric) for row in rows]
                known = [value for value in values if value is not None]
                if known:
                    summary[f"{metric}_{which}{suffix}"] = sum(known) / len(known)
    return summary


def as_json(content: Any) -> bytes:
    """Strict JSON of tensors, records, mappings and lists, with null for an undefined number."""
    return (json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Tensor):
        value = value.tolist()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
