"""The report's figures: rows of images with the maps of several models, regions, curves and heat maps.

Shapes: B images, C channels (1 grey, 3 RGB), h × w patches, L blocks, A heads, n points of a curve.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.panel import (
    BAR,
    BAR_TEXT,
    CELL,
    COLOURS,
    GAP,
    HEADING,
    MARGIN,
    QUIET,
    TEXT,
    _axes,
    _blend,
    _overlay,
    _pixels,
    _show,
    _title,
    _verdict,
    _write,
)

RELEVANCE_UNIT = "relevance,\narbitrary units"
RANDOM = "random"
"""the order of removal that others are compared with"""

REGION_COLOURS = matplotlib.colormaps["coolwarm"]
"""Blue to red in perceptually even steps (Moreland 2009): an order that can be seen, not just names."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#6b4fa3", "#5c5c5c")
"""after Okabe and Ito: told apart by colour-blind readers too"""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)))

# Inches.
SPACE = 0.35
"""between groups that stand side by side"""
CHARACTER = 0.058
"""the mean width of one in the captions' size"""
LINE = 0.14


class Rows(NamedTuple):
    """Images below one another, each beside its maps."""

    title: str
    """above them; may be empty"""
    images: Tensor
    """[B, C, H, W] in 0..1; none for a group that is to be shown as empty"""
    maps: Sequence[Tensor]
    """one [B, h, w] a column; grids may differ"""
    labels: Sequence[str] | None = None
    """[B] above the images"""
    predictions: Sequence[Sequence[str] | None] = ()
    """one [B] a column, above its maps"""
    confidences: Sequence[Sequence[float] | None] = ()
    """one [B] a column: probabilities of what is predicted"""


def whose(readers: Iterable[str]) -> str:
    """The tokens that look, in words: of several models' different ones, what they have in common."""
    named = {*readers}
    return named.pop() if len(named) == 1 else "classifying tokens"


def attention_unit(readers: Iterable[str] = ("class token",)) -> str:
    """Of maps, at the colour bar; `readers` as `recording.who_reads` names each model's."""
    return f"attention weight\nof the {whose(readers)}"


def figure_1(
    images: Tensor,
    teacher_maps: Tensor,
    distilled_maps: Tensor,
    other_maps: Tensor | None = None,
    *,
    labels: Sequence[str] | None = None,
    teacher_predictions: Sequence[str] | None = None,
    student_predictions: Sequence[str] | None = None,
    teacher_confidences: Sequence[float] | None = None,
    student_confidences: Sequence[float] | None = None,
    columns: Sequence[str] = ("image", "teacher", "student, distilled", "student, not distilled"),
    unit: str | None = None,
    caption: str = "",
) -> Figure:
    """The report's Figure 1: image, teacher's map, student's in a block that was distilled and in one not.

    Args:
        images: [B, C, H, W] in 0..1.
        teacher_maps, distilled_maps, other_maps: [B, h, w], heads averaged; without `other_maps` the last
            column is left out, as where every block was distilled.
        teacher_confidences, student_confidences: probabilities in 0..1 of the classes predicted.
        columns: their headings.
        unit: of the maps, at the colour bar; None for the class token's attention.

    Raises:
        ValueError: there is no image, or an argument has another number of images.
    """
    maps = [teacher_maps, distilled_maps, *([] if other_maps is None else [other_maps])]
    # A student answers once, so its answer stands once.
    predictions = [teacher_predictions, student_predictions, None][: len(maps)]
    confidences = [teacher_confidences, student_confidences, None][: len(maps)]
    group = Rows("", images, maps, labels, predictions, confidences)
    return figure_rows([group], columns=columns[: 1 + len(maps)], unit=unit, caption=caption)


def figure_rows(
    groups: Sequence[Rows],
    *,
    columns: Sequence[str],
    unit: str | None = None,
    caption: str = "",
    across: int = 1,
) -> Figure:
    """Groups of images beside their maps; all maps of the figure share one colour scale.

    Args:
        groups: one for Figure 2, two for Figure 3, four for the 2×2 gallery. One without images says so.
        columns: the headings: of the image, then of each map.
        unit: of the maps, at the colour bar; None for the class token's attention.
        caption: stands below.
        across: so many groups stand side by side.

    Raises:
        ValueError: no group has an image, or a group's arguments differ in number.
    """
    for group in groups:
        _check(group, len(columns) - 1)
    filled = [group for group in groups if len(group.images)]
    if not filled:
        raise ValueError("a figure takes at least one image")
    lines = [groups[i : i + across] for i in range(0, len(groups), across)]
    width = len(columns) * (CELL + GAP) - GAP
    tops, bottom = _tops(lines)
    inner = across * (width + SPACE) - SPACE
    figure, below = _blank(inner + GAP + BAR + BAR_TEXT, bottom, caption)
    scale = _scale([maps for group in filled for maps in group.maps])
    for line, top in zip(lines, tops, strict=True):
        for place, group in enumerate(line):
            _draw_group(figure, group, columns, MARGIN + place * (width + SPACE), top, scale)
    first = tops[0] + _heading_height(lines[0]) + TEXT
    height = min(bottom - GAP - first, 4 * CELL)
    axes = _axes(figure, MARGIN + inner + GAP, first, BAR, height)
    seen = ListedColormap(_blend(COLOURS(np.linspace(0, 1, 256))[:, :3], 0.5))
    _draw_bar(figure, axes, scale, seen, unit or attention_unit())
    _draw_caption(figure, caption, below)
    return figure


def region_figure(
    images: Tensor,
    regions: Mapping[str, Tensor],
    *,
    labels: Sequence[str] | None = None,
    caption: str = "",
) -> Figure:
    """Images beside their regions, from the least to the most active.

    Args:
        images: [B, C, H, W] in 0..1.
        regions: heading → labels [B, h, w] from 0, the least active; all headings share the colours.

    Raises:
        ValueError: there is no image, or regions are of another number of images.
    """
    _check(Rows("", images, [*regions.values()], labels), len(regions))
    if not len(images):
        raise ValueError("a figure takes at least one image")
    count = 1 + max(int(each.max()) for each in regions.values())
    colours = region_colours(count)
    columns = 1 + len(regions)
    bottom = MARGIN + HEADING + len(images) * (TEXT + CELL) + GAP
    figure, below = _blank(max(columns * (CELL + GAP) - GAP, 3.2), bottom + 0.3, caption)
    for column, heading in enumerate(["image", *regions]):
        _write(figure, heading, MARGIN + column * (CELL + GAP) + CELL / 2, MARGIN, weight="bold")
    for row, image in enumerate(images):
        top = MARGIN + HEADING + row * (TEXT + CELL) + TEXT
        cell = _cell(figure, MARGIN, top)
        _show(cell, _pixels(image))
        _title(cell, None if labels is None else labels[row])
        for column, each in enumerate(regions.values()):
            cell = _cell(figure, MARGIN + (column + 1) * (CELL + GAP), top)
            _show(cell, _region_overlay(image, each[row], colours))
    _region_legend(figure, colours, bottom)
    _draw_caption(figure, caption, below)
    return figure


def region_colours(count: int) -> list[tuple[float, float, float]]:
    """A colour for each of `count` ordered regions, in 0..1: blue for the least active, red for the most."""
    places = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
    return [(float(r), float(g), float(b)) for r, g, b, _ in REGION_COLOURS(places)]


def curves_figure(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    *,
    y_label: str = "probability of the class",
    caption: str = "",
) -> Figure:
    """What becomes of a class while an image is removed: a panel an order, a line a method.

    Args:
        panels: title → method → (fractions [n] of the image removed, values [B, n] or their mean [n]). Of
            several images the mean is drawn, with a band of ±1.96 standard errors over images. The method
            "random" is drawn in grey, as what others must beat.

    Raises:
        ValueError: there is no curve.
    """
    methods = [*dict.fromkeys(method for curves in panels.values() for method in curves)]
    if not methods:
        raise ValueError("a figure takes at least one curve")
    columns = min(4 if len(panels) > 1 else 2, len(methods))
    keys = MARGIN + 2.78
    bottom = keys + 0.12 + 0.18 * math.ceil(len(methods) / columns)
    figure, below = _blank(3.2 * len(panels), bottom, caption)
    styles = _styles(methods)
    for place, (title, curves) in enumerate(panels.items()):
        axes = _axes(figure, MARGIN + 3.2 * place + 0.5, MARGIN + 0.25, 2.55, 2.1)
        for method, (fractions, values) in curves.items():
            _draw_curve(axes, np.asarray(fractions, float), np.asarray(values, float), styles[method])
        axes.set_title(title, size=9, weight="bold", parse_math=False)
        axes.set_xlabel("image removed", size=8)
        axes.set_ylabel(y_label if place == 0 else "", size=8)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        _plain(axes)
    highest = max(axes.get_ylim()[1] for axes in figure.axes)
    for axes in figure.axes:
        axes.set_ylim(0, highest)
    # A legend fills its columns one by one; methods are to be read row by row.
    in_rows = [method for column in range(columns) for method in methods[column::columns]]
    figure.legend(
        [Line2D([], [], **styles[method]) for method in in_rows],
        [method.replace("_", " ") for method in in_rows],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - keys / figure.get_size_inches()[1]),
        ncols=columns,
        fontsize=8,
        frameon=False,
        handlelength=2.8,
    )
    _draw_caption(figure, caption, below)
    return figure


def fidelity_figure(
    values: Mapping[str, ArrayLike], *, measure: str, blocks: Sequence[str] | None = None, caption: str = ""
) -> Figure:
    """A measure of how alike two models attend, per block and head, beside its baselines.

    Args:
        values: title → [L, A], the student first, then "student alone" and "permuted heads" or what else
            it is to be held against; NaN where a figure is undefined. All share one colour scale.
        measure: at the colour bar, with its unit, and which end is alike.
        blocks: what the L rows are called.

    Raises:
        ValueError: the arrays' shapes differ.
    """
    arrays = {title: np.asarray(each, float) for title, each in values.items()}
    shapes = {each.shape for each in arrays.values()}
    if len(shapes) != 1:
        raise ValueError(f"heat maps of one shape [L, A], not {sorted(shapes)}")
    ((rows, heads),) = shapes
    width, height = max(0.46 * heads, 1.3), max(0.36 * rows, 1.1)
    names = [str(block) for block in (blocks or range(rows))]
    left = MARGIN + 0.35 + CHARACTER * max(map(len, names))
    label = wrap(measure, int(height / CHARACTER))
    room = left + len(arrays) * (width + 0.25) + BAR + BAR_TEXT + (len(label) - 1) * LINE
    figure, below = _blank(room, MARGIN + 0.3 + height + 0.5, caption)
    known = np.concatenate([each[np.isfinite(each)] for each in arrays.values()] or [[]])
    scale = Normalize(known.min(), known.max()) if len(known) else Normalize(0, 1)
    for place, (title, each) in enumerate(arrays.items()):
        axes = _axes(figure, left + place * (width + 0.25), MARGIN + 0.3, width, height)
        _draw_heat(axes, each, scale)
        axes.set_title(title, size=8, weight="bold", pad=4, parse_math=False)
        axes.set_xlabel("head", size=8)
        axes.set_yticks(range(rows), names if place == 0 else [""] * rows)
        if place == 0:
            axes.set_ylabel("block", size=8)
    axes = _axes(figure, left + len(arrays) * (width + 0.25) - 0.1, MARGIN + 0.3, BAR, height)
    _draw_bar(figure, axes, scale, COLOURS, "\n".join(label))
    _draw_caption(figure, caption, below)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _check(group: Rows, columns: int) -> None:
    if len(group.maps) != columns and len(group.images):
        raise ValueError(f"{len(group.maps)} maps an image for {columns} columns")
    given = [group.images, *group.maps, group.labels, *group.predictions, *group.confidences]
    counts = {len(each) for each in given if each is not None}
    if len(counts) > 1 and len(group.images):
        raise ValueError(f"a figure takes equally many images, maps and texts: {sorted(counts)}")


def _blank(inner: float, bottom: float, caption: str) -> tuple[Figure, float]:
    """A figure `inner` inches wide within its margins, with room for the caption; and where that begins."""
    width = MARGIN + inner + MARGIN
    lines = len(_lines(caption, width))
    figure = Figure((width, bottom + lines * LINE + MARGIN), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure, bottom


def _lines(caption: str, width: float) -> list[str]:
    return wrap(caption, max(int((width - 2 * MARGIN) / CHARACTER), 1))


def _draw_caption(figure: Figure, caption: str, top: float) -> None:
    width = figure.get_size_inches()[0]
    text = "\n".join(_lines(caption, width))
    _write(figure, text, width / 2, top, color=QUIET, linespacing=1.2)


def _tops(lines: Sequence[Sequence[Rows]]) -> tuple[list[float], float]:
    """Where each line of groups begins, and where the last ends, in inches."""
    tops, top = [], MARGIN
    for line in lines:
        tops.append(top)
        rows = max(1, *(len(group.images) for group in line)) if line else 1
        top += _heading_height(line) + rows * (TEXT + CELL) + 2 * GAP
    return tops, top - GAP


def _heading_height(line: Sequence[Rows]) -> float:
    return HEADING + (TEXT if any(group.title for group in line) else 0)


def _draw_group(
    figure: Figure, group: Rows, columns: Sequence[str], left: float, top: float, scale: Normalize
) -> None:
    width = len(columns) * (CELL + GAP) - GAP
    if group.title:
        _write(figure, group.title, left + width / 2, top, weight="bold")
        top += TEXT
    if not len(group.images):
        _write(figure, "no such image", left + width / 2, top + CELL / 2, color=QUIET)
        return
    for column, heading in enumerate(columns):
        centre = left + column * (CELL + GAP) + CELL / 2
        style = {"color": QUIET} if group.title else {"weight": "bold"}
        _write(figure, heading, centre, top, **style)
    for row, image in enumerate(group.images):
        place = top + HEADING + row * (TEXT + CELL) + TEXT
        label = None if group.labels is None else group.labels[row]
        cell = _cell(figure, left, place)
        _show(cell, _pixels(image))
        _title(cell, label)
        for column, maps in enumerate(group.maps):
            cell = _cell(figure, left + (column + 1) * (CELL + GAP), place)
            _show(cell, _overlay(image, maps[row], scale))
            text, colour = _verdict(_at(group.predictions, column, row), label)
            confidence = _at(group.confidences, column, row)
            percent = "" if confidence is None else f" {100 * confidence:.0f} %"
            _title(cell, text and text + percent, colour)


def _at(columns: Sequence[Sequence[Any] | None], column: int, row: int) -> Any:
    """A column's entry; None where it has none."""
    values = columns[column] if column < len(columns) else None
    return None if values is None else values[row]


def _cell(figure: Figure, left: float, top: float) -> Axes:
    axes = _axes(figure, left, top, CELL, CELL)
    axes.set_axis_off()
    return axes


def _scale(maps: Sequence[Tensor]) -> Normalize:
    """From zero, or the lowest value where that is negative, to the highest."""
    low = min(0.0, *(float(each.min()) for each in maps), 0.0)
    return Normalize(low, max(float(each.max()) for each in maps))


def _draw_bar(figure: Figure, axes: Axes, scale: Normalize, colours: Any, unit: str) -> None:
    bar = figure.colorbar(ScalarMappable(scale, colours), cax=axes)
    bar.set_label(unit, size=8)
    bar.locator = MaxNLocator(5)
    axes.tick_params(labelsize=7, length=2, width=0.5)
    bar.outline.set_visible(False)


def _region_overlay(
    image: Tensor, labels: Tensor, colours: Sequence[tuple[float, float, float]]
) -> NDArray[np.floating[Any]]:
    """Labels [h, w] in colour over the grey, paled image [C, H, W]; a region has the patches' edges."""
    size = max(256, image.shape[-1])
    tokens = interpolate(labels[None, None].detach().float().cpu(), size=(size, size), mode="nearest")[0, 0]
    grey = interpolate(image.mean(0)[None, None].detach().float().cpu(), size=(size, size))[0]
    return _blend(np.array(colours)[tokens.numpy().astype(int)], _pixels(0.25 + grey / 2))


def _region_legend(figure: Figure, colours: Sequence[tuple[float, float, float]], top: float) -> None:
    down = figure.get_size_inches()[1]
    seen = [tuple(_blend(np.array(colour), 0.5)) for colour in colours]
    words = [""] * len(colours)
    words[0], words[-1] = "least active", "most active"
    figure.legend(
        [Patch(facecolor=colour) for colour in seen],
        words if len(words) > 1 else ["all alike"],
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - (top - 0.03) / down),
        ncols=len(colours),
        fontsize=8,
        frameon=False,
        handlelength=1.4,
        handletextpad=0.4,
        columnspacing=0.3,
    )


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each method's line looks, by its place among the methods; dashes change once colours repeat."""
    styles: dict[str, dict[str, Any]] = {}
    for place, method in enumerate(each for each in methods if each != RANDOM):
        again, colour = divmod(place, len(SERIES))
        dash = DASHES[(place + again) % len(DASHES)]
        styles[method] = {"color": SERIES[colour], "linestyle": dash, "linewidth": 1.6}
    return styles | {RANDOM: {"color": "#888888", "linestyle": (0, (2, 2)), "linewidth": 1.6}}


def _draw_curve(axes: Axes, fractions: Any, values: Any, style: dict[str, Any]) -> None:
    mean = np.atleast_2d(values).mean(0)
    axes.plot(fractions, mean, **style)
    if values.ndim == 2 and len(values) > 1:
        error = 1.96 * values.std(0, ddof=1) / len(values) ** 0.5
        axes.fill_between(fractions, mean - error, mean + error, color=style["color"], alpha=0.15, lw=0)


def _draw_heat(axes: Axes, values: Any, scale: Normalize) -> None:
    """A heat map with its figures written in; undefined ones are grey dashes."""
    axes.set_facecolor("#dddddd")
    axes.imshow(np.ma.masked_invalid(values), cmap=COLOURS, norm=scale, aspect="auto")
    for (row, head), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        ink = "black" if not known or scale(value) > 0.55 else "white"
        axes.text(head, row, f"{value:.2g}" if known else "–", ha="center", va="center", size=6.5, color=ink)
    axes.set_xticks(range(values.shape[1]))
    axes.tick_params(labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7, length=2, width=0.5)
    axes.grid(color="#e3e6ea", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
