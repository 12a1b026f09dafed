"""Everything that was found out, as files: figures, arrays, numbers and the page.

Shapes: N images shown, C channels, H × W pixels, P pairs of maps.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.cells import (
    BOTH_RIGHT,
    BOTH_WRONG,
    CELLS,
    STUDENT_WRONG,
    TEACHER_WRONG,
    OverRepresented,
)
from vitkd.explain.gallery.figures import (
    RELEVANCE_UNIT,
    Rows,
    attention_unit,
    curves_figure,
    fidelity_figure,
    figure_1,
    figure_rows,
    png,
    region_figure,
    whose,
)
from vitkd.explain.gallery.page import ATTENTION, GalleryPage, Plot, Subject, Table, render
from vitkd.explain.gallery.subjects import head_mean
from vitkd.explain.measures.correctness import Correlation
from vitkd.explain.measures.faithfulness import Faithfulness
from vitkd.explain.measures.survey import Alikeness

ROWS_OF_A_FIGURE = 4
MEASURES = {
    "js": "Jensen–Shannon, nats",
    "kl": "KL(teacher ‖ student), nats",
    "spearman": "rank correlation, class row",
    "top_k_iou": "IoU of the top quarter of patches",
    "cls_overlap": "overlap of the class rows",
}

FIGURES = (
    *("figure_1", "figure_2", "figure_3", "gallery"),
    *("methods", "regions", "fidelity", "perturbation"),
)
FILES = {*(f"{name}.png" for name in FIGURES), "maps.npz", "figures.json", "fidelity.json", "index.html"}
"""all that there may be"""

OfMethods = Mapping[str, Mapping[str, Mapping[str, Faithfulness]]]


@dataclass(frozen=True, eq=False)
class Album:
    """What a run's explanation holds."""

    title: str
    source: str
    """which runs, data set and epoch; stands below every figure"""
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
    other_block: int | None = None
    """of the first student, one that was not distilled"""
    counts: Mapping[str, int] = field(default_factory=dict)
    """cell → images of the whole split"""
    over_represented: Mapping[str, Sequence[OverRepresented]] = field(default_factory=dict)
    alikeness: Mapping[str, Alikeness] = field(default_factory=dict)
    """student → beside the teacher"""
    correlations: Mapping[str, Mapping[str, Correlation]] = field(default_factory=dict)
    """student → among which images → how its divergence goes with its being right"""
    reach: Mapping[str, Tensor] = field(default_factory=dict)
    """model → [L, H] mean attention distance over that of uniform attention"""
    faithfulness: Mapping[str, OfMethods] = field(default_factory=dict)
    """model → method → order → class"""
    notes: Sequence[str] = ()
    epoch: str = ""
    """best or last: of which the students are"""

    @property
    def teacher(self) -> Subject | None:
        first = self.subjects[0]
        return first if first.role == "teacher" else None

    @property
    def student(self) -> Subject:
        """The first."""
        return next(subject for subject in self.subjects if subject.role == "student")

    @property
    def looking(self) -> list[Subject]:
        """Those that have attention maps."""
        return [subject for subject in self.subjects if ATTENTION in subject.maps]

    @property
    def readers(self) -> list[str]:
        """The tokens that each of them classifies by."""
        return [subject.readers for subject in self.looking]


def files_of(album: Album) -> dict[str, bytes]:
    """File name → content."""
    pictures = {name: png(figure) for name, figure in figures_of(album).items()}
    found = {f"{name}.png": picture for name, picture in pictures.items()}
    found["maps.npz"] = arrays(album)
    found["figures.json"] = _json(numbers_of(album))
    if album.alikeness:
        found["fidelity.json"] = _json(fidelity_numbers(album))
    found["index.html"] = render(page_of(album, pictures)).encode()
    return found


def figures_of(album: Album) -> dict[str, Figure]:
    """Name → figure, of those that there is something to show in."""
    found = {"methods": _methods(album)}
    if album.teacher in album.looking:
        found["figure_1"] = _figure_1(album)
    of_cells = {
        "figure_2": (_figure_2, {STUDENT_WRONG}),
        "figure_3": (_figure_3, {TEACHER_WRONG, BOTH_WRONG}),
        "gallery": (_sheet, {*CELLS}),
    }
    found |= {name: draw(album) for name, (draw, cells) in of_cells.items() if cells & {*album.cells}}
    if album.regions:
        found["regions"] = _regions(album)
    if album.alikeness:
        found["fidelity"] = _fidelity(album)
    if album.faithfulness:
        found["perturbation"] = _perturbation(album)
    return found


def _figure_1(album: Album) -> Figure:
    """The report's, of the first images that both have right, or of any."""
    rows = _of_cell(album, BOTH_RIGHT) or [*range(len(album.pixels))][:ROWS_OF_A_FIGURE]
    teacher, student = album.teacher, album.student
    assert teacher is not None
    other = album.other_block
    maps = [head_mean(teacher), head_mean(student)]
    columns = ["image", f"teacher, block {teacher.first_block}", f"student, block {student.first_block}"]
    if other is not None:
        maps.append(head_mean(student, other))
        columns.append(f"block {other}, not distilled")
    return figure_1(
        album.pixels[rows],
        *(each[rows] for each in _on_one_grid(maps)),
        labels=_labels(album, rows),
        teacher_predictions=[_name(album, teacher.predicted[i]) for i in rows],
        student_predictions=[_name(album, student.predicted[i]) for i in rows],
        teacher_confidences=[teacher.confidence[i] for i in rows],
        student_confidences=[student.confidence[i] for i in rows],
        columns=columns,
        unit=attention_unit(album.readers),
        caption=f"Attention of the {whose(album.readers)}, heads averaged. {album.source}",
    )


def _figure_2(album: Album) -> Figure:
    return _beside(
        album, [STUDENT_WRONG], f"The student is wrong though its teacher is right. {album.source}", 1
    )


def _figure_3(album: Album) -> Figure:
    caption = f"The teacher is wrong; left the student is right, right it is wrong too. {album.source}"
    return _beside(album, [TEACHER_WRONG, BOTH_WRONG], caption, 2)


def _sheet(album: Album) -> Figure:
    return _beside(album, CELLS, f"Who is right and who is wrong. {album.source}", 2)


def _beside(album: Album, cells: Sequence[str], caption: str, across: int) -> Figure:
    """Each cell's first images beside the maps of all subjects."""
    maps = _on_one_grid([head_mean(subject) for subject in album.looking])
    groups = [_rows(album, _of_cell(album, cell), cell, maps) for cell in cells]
    columns = ["image", *(f"{subject.name}, block {subject.first_block}" for subject in album.looking)]
    unit = attention_unit(album.readers)
    return figure_rows(
        groups, columns=columns, unit=unit, caption=f"Heads averaged. {caption}", across=across
    )


def _methods(album: Album) -> Figure:
    """The first images by every method, each map scaled to its own highest value."""
    rows = [*range(len(album.pixels))][:ROWS_OF_A_FIGURE]
    groups = []
    for subject in album.looking:
        # As faithfulness has it: of the last block.
        others = (torch.from_numpy(maps) for method, maps in subject.maps.items() if method != ATTENTION)
        maps = [head_mean(subject, -1), *others]
        scaled = [each / each.amax((-2, -1), keepdim=True).clamp_min(1e-12) for each in maps]
        groups.append(_rows(album, rows, subject.name, scaled, subject))
    columns = ["image", *(name.replace("_", " ") for name in _methods_of(album))]
    caption = (
        "Each map is scaled to its own highest value; attention is the last block's, heads averaged; "
        "class-specific methods explain the class predicted."
    )
    return figure_rows(
        groups, columns=columns, unit=RELEVANCE_UNIT, caption=f"{caption} {album.source}", across=1
    )


def _methods_of(album: Album) -> list[str]:
    return [*album.student.maps]


def _rows(
    album: Album, rows: list[int], title: str, maps: Sequence[Tensor], only: Subject | None = None
) -> Rows:
    subjects = album.looking if only is None else [only]
    return Rows(
        title,
        album.pixels[rows],
        [each[rows] for each in maps],
        _labels(album, rows),
        [[_name(album, subject.predicted[i]) for i in rows] for subject in subjects],
        [[subject.confidence[i] for i in rows] for subject in subjects],
    )


def _regions(album: Album) -> Figure:
    rows = [*range(len(album.pixels))][:ROWS_OF_A_FIGURE]
    return region_figure(
        album.pixels[rows],
        {name: torch.from_numpy(labels)[rows] for name, labels in album.regions.items()},
        labels=_labels(album, rows),
        caption=f"Patches clustered by the attention that they draw in all blocks. {album.source}",
    )


def _fidelity(album: Album) -> Figure:
    student, alikeness = next(iter(album.alikeness.items()))
    values = {student: _grid(alikeness, "figures")}
    if all(row.alone for row in alikeness.rows):
        values["student alone"] = _grid(alikeness, "alone")
    values["permuted heads"] = _grid(alikeness, "permuted")
    blocks = sorted({row.student_block for row in alikeness.rows})
    return fidelity_figure(
        values,
        measure="Jensen–Shannon divergence from the teacher's map, nats (0: alike)",
        blocks=[f"block {block}" for block in blocks],
        caption=f"Mean over all test images. {album.source}",
    )


def _grid(alikeness: Alikeness, which: str) -> NDArray[np.float64]:
    """Divergences [blocks, heads]; NaN where there is none."""
    blocks = sorted({row.student_block for row in alikeness.rows})
    heads = 1 + max(row.student_head for row in alikeness.rows)
    grid = np.full((len(blocks), heads), np.nan)
    for row in alikeness.rows:
        value = (getattr(row, which) or {}).get("js")
        grid[blocks.index(row.student_block), row.student_head] = np.nan if value is None else value
    return grid


def _perturbation(album: Album) -> Figure:
    panels = {}
    for model, methods in album.faithfulness.items():
        for order in ("positive", "negative"):
            what = "most relevant first" if order == "positive" else "least relevant first"
            panels[f"{model}, {what}"] = {
                method.replace("_", " "): (
                    curves[order]["predicted"].fractions,
                    curves[order]["predicted"].probability,
                )
                for method, curves in methods.items()
            }
    caption = "Pixels are made black before normalisation; the mean probability of the class predicted."
    return curves_figure(panels, y_label="probability of the class", caption=f"{caption} {album.source}")


def page_of(album: Album, pictures: Mapping[str, bytes]) -> GalleryPage:
    """The gallery, with the figures and tables below it."""
    pixels = album.pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    titles = {
        "figure_1": "Where teacher and student look",
        "fidelity": "How alike the maps are",
        "perturbation": "Faithfulness: what removing pixels does",
    }
    return GalleryPage(
        title=album.title,
        subtitle=album.source,
        images=(pixels * 255).round().to(torch.uint8).numpy(),
        labels=album.labels,
        cells=album.cells,
        indices=album.numbers,
        class_names=album.class_names,
        subjects=album.subjects,
        counts=album.counts,
        notes=[*album.notes, *_sentences(album)],
        tables=[*_tables(album)],
        plots=[
            Plot(title, album.source, pictures[name]) for name, title in titles.items() if name in pictures
        ],
        regions=album.regions or None,
    )


def _sentences(album: Album) -> list[str]:
    """The classes that stand out in a cell, and whether fidelity goes with being right."""
    found = []
    for cell, classes in album.over_represented.items():
        if classes and cell != BOTH_RIGHT:
            named = ", ".join(f"{c.label} ({c.count}, expected {c.expected:.1f})" for c in classes[:5])
            found.append(f"Over-represented where {_words(cell)}: {named}.")
    for student, correlations in album.correlations.items():
        # Among the images that the teacher has right less of it is due to easy images.
        among, c = [*correlations.items()][-1]
        if not math.isnan(c.r):
            low, high = c.interval
            found.append(
                f"Divergence from the teacher's attention and {student} being right correlate by "
                f"r = {c.r:.2f} [{low:.2f}, {high:.2f}], among {among} ({c.n:,})."
            )
    return found


def _words(cell: str) -> str:
    return {STUDENT_WRONG: "only the student is wrong", TEACHER_WRONG: "only the teacher is wrong"}.get(
        cell, "both are wrong"
    )


def _tables(album: Album) -> list[Table]:
    return [
        *(_fidelity_table(student, alikeness) for student, alikeness in album.alikeness.items()),
        *([_reach_table(album)] if album.reach else []),
        *(_faithfulness_table(model, methods) for model, methods in album.faithfulness.items()),
        *([_correctness_table(album)] if album.correlations else []),
    ]


def _fidelity_table(student: str, alikeness: Alikeness) -> Table:
    has_alone = all(row.alone for row in alikeness.rows)
    baselines = (["alone"] if has_alone else []) + ["permuted"]
    columns = ["student map", "teacher map", "distilled"]
    for measure in ("js", "spearman", "cls_overlap"):
        columns += [MEASURES[measure], *(f"… {baseline}" for baseline in baselines)]
    columns += ["top-k IoU", "entropy, nats", "distance, px"]
    columns += ["CKA of tokens", *(["… alone"] if has_alone else []), "… other images"]
    rows: list[list[str | float | int | None]] = []
    for row, learnt in zip(alikeness.rows, alikeness.learnt, strict=True):
        values: list[str | float | int | None] = [
            f"{row.student_block}.{row.student_head}",
            f"{row.teacher_block}.{'+'.join(map(str, row.teacher_heads))}",
            "yes" if learnt else "",
        ]
        for measure in ("js", "spearman", "cls_overlap"):
            values += [row.figures[measure], *((getattr(row, b) or {}).get(measure) for b in baselines)]
        values += [row.figures["top_k_iou"], row.figures["entropy"], row.figures["mean_distance"]]
        cka = alikeness.cka[row.student_block, row.teacher_block]
        alone = [] if cka.alone is None else [_finite(cka.alone)]
        rows.append([*values, _finite(cka.value), *alone, _finite(cka.other_images)])
    return Table(
        f"Fidelity of {student}, block.head",
        "Means over all test images, each beside "
        + ("the student that learned without the teacher, and " if has_alone else "")
        + "the same map held against other heads of the teacher's block; CKA beside that with the teacher's "
        "tokens of other images.",
        columns,
        rows,
    )


def _reach_table(album: Album) -> Table:
    depth = max(len(reach) for reach in album.reach.values())
    rows: list[list[str | float | int | None]] = []
    for block in range(depth):
        means = [
            _finite(reach[block].nanmean().item()) if block < len(reach) else None
            for reach in album.reach.values()
        ]
        rows.append([block, *means])
    return Table(
        "How far blocks look",
        "Mean attention distance, 1 being that of uniform attention. With much data some low blocks look "
        "near; with little they hardly learn to (Zhu et al. 2023).",
        ["block", *album.reach],
        rows,
    )


def _faithfulness_table(model: str, methods: OfMethods) -> Table:
    rows: list[list[str | float | int | None]] = []
    for method, orders in methods.items():
        values: list[str | float | int | None] = [method.replace("_", " ")]
        for order in ("positive", "negative"):
            for target in ("predicted", "target"):
                each = orders[order][target]
                values += [each.auc, each.gap, each.gap_error]
        rows.append(values)
    columns = ["method"]
    for order in ("positive", "negative"):
        for target in ("predicted", "true"):
            columns += [f"{order}, {target}: AUC", "better than random by", "± s.e."]
    return Table(
        f"Faithfulness, {model}",
        "Area under the class's probability while pixels are removed: in positive order (most relevant "
        "first) low is faithful, in negative order high.",
        columns,
        rows,
    )


def _correctness_table(album: Album) -> Table:
    rows: list[list[str | float | int | None]] = [
        [
            student,
            among,
            _finite(c.r),
            _finite(c.interval[0]),
            _finite(c.interval[1]),
            _finite(c.p),
            c.n,
            c.reason,
        ]
        for student, correlations in album.correlations.items()
        for among, c in correlations.items()
    ]
    return Table(
        "Does fidelity predict correctness?",
        "Point-biserial correlation of each image's divergence from the teacher's attention with the "
        "student's being right: below 0, students that look where the teacher looks are right more often. "
        "No proof of a cause.",
        ["student", "among", "r", "95 % from", "to", "p", "images", ""],
        rows,
    )


def arrays(album: Album) -> bytes:
    """The shown images and all maps, for NumPy."""
    content: dict[str, Any] = {
        "pixels": album.pixels.numpy(),
        "labels": np.asarray(album.labels),
        "numbers": np.asarray(album.numbers),
        "cells": np.asarray(album.cells),
    }
    for subject in album.subjects:
        content[f"{subject.name}/predicted"] = np.asarray(subject.predicted)
        content[f"{subject.name}/confidence"] = np.asarray(subject.confidence)
        content |= {f"{subject.name}/{method}": maps for method, maps in subject.maps.items()}
        if subject.patches is not None:
            content[f"{subject.name}/patches"] = subject.patches
    content |= {f"{name}/regions": labels for name, labels in album.regions.items()}
    file = BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def numbers_of(album: Album) -> dict[str, Any]:
    """Every figure, as plain data."""
    return {
        "title": album.title,
        "source": album.source,
        "cells": dict(album.counts),
        "over_represented": {
            cell: [asdict(c) for c in found] for cell, found in album.over_represented.items()
        },
        "correctness": {
            student: {among: c.as_json() for among, c in correlations.items()}
            for student, correlations in album.correlations.items()
        },
        "attention_distance": {name: reach.tolist() for name, reach in album.reach.items()},
        "faithfulness": {
            model: {
                method: {o: {t: each._asdict() for t, each in of.items()} for o, of in orders.items()}
                for method, orders in methods.items()
            }
            for model, methods in album.faithfulness.items()
        },
        "images": [int(number) for number in album.numbers],
    }


def fidelity_numbers(album: Album) -> dict[str, Any]:
    """The first student's rows, and their means over distilled and over all maps."""
    alikeness = next(iter(album.alikeness.values()))
    summary: dict[str, float | None] = {}
    for measure in MEASURES:
        for part, chosen in (("distilled", alikeness.learnt), ("all", [True] * len(alikeness.rows))):
            for which in ("figures", "alone", "permuted"):
                values = [
                    (getattr(row, which) or {}).get(measure)
                    for row, counts in zip(alikeness.rows, chosen, strict=True)
                    if counts
                ]
                known = [value for value in values if value is not None]
                suffix = "" if which == "figures" else f"_{which}"
                if known:
                    summary[f"{measure}_{part}{suffix}"] = sum(known) / len(known)
    rows = [
        asdict(row) | {"distilled": learnt}
        for row, learnt in zip(alikeness.rows, alikeness.learnt, strict=True)
    ]
    cka = {f"{ours}.{theirs}": each._asdict() for (ours, theirs), each in alikeness.cka.items()}
    return {"epoch": album.epoch, "summary": summary, "rows": rows, "cka": cka}


def _of_cell(album: Album, cell: str) -> list[int]:
    return [i for i, each in enumerate(album.cells) if each == cell][:ROWS_OF_A_FIGURE]


def _on_one_grid(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps [N, h, w] on the finest of their grids, summing to 1 there: equal colours mean the same."""
    finest = max((each.shape[-2:] for each in maps), key=math.prod)
    if all(each.shape[-2:] == finest for each in maps):
        return [*maps]
    resized = [interpolate(each[:, None], finest, mode="bilinear").squeeze(1) for each in maps]
    return [each / each.sum((-2, -1), keepdim=True) for each in resized]


def _labels(album: Album, rows: Sequence[int]) -> list[str] | None:
    """What the images show, where that is known."""
    labels = [album.labels[i] for i in rows]
    return [_name(album, label) for label in labels] if all(label >= 0 for label in labels) else None


def _name(album: Album, label: int) -> str:
    return album.class_names[label]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(content: Any) -> bytes:
    return (json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
