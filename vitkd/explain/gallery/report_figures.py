"""The report's Figures 1, 2 and 3 and the 2×2 gallery, of what an explanation found.

Shapes: N images shown, h × w patches.
"""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.cells import BOTH_RIGHT, BOTH_WRONG, CELLS, STUDENT_WRONG, TEACHER_WRONG
from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.figures import Rows, attention_unit, common_name, figure_rows
from vitkd.explain.maps.subjects import Subject, head_mean

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
NAMES = ("figure_1", *OF_CELLS)


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
