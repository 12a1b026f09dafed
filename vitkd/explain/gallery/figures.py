"""The report's figures: rows of images beside the maps of several models.

Shapes: B images, C channels (1 grey, 3 RGB), H × W pixels, h × w patches.
"""

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import accumulate, zip_longest
from textwrap import wrap
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.fonts import drawable

COLOURS = matplotlib.colormaps["viridis"]
OPACITY = 0.75
"""of a map over its image, which is paled to half its contrast: the colour bar is read off the map"""
RIGHT, WRONG, QUIET = "#1a7f37", "#c62828", "#666666"

# Inches.
CELL, GAP, TEXT, HEADING, MARGIN = 1.5, 0.1, 0.22, 0.17, 0.12
BAR, BAR_TEXT = 0.11, 0.72
LINE = 0.14
SPACE = 0.35
"""between groups that stand side by side"""
CHARACTER = 0.058
"""the mean width of one in the captions' size"""

SMOOTH_PIXELS = 256
"""A map is drawn with at least this many pixels a side, so that it is smooth over a small image too."""


class Rows(NamedTuple):
    """Images below one another, each beside its maps."""

    title: str
    """above them; may be empty"""
    images: Tensor
    """[B, C, H, W] in 0..1; none for a group that is shown as empty"""
    maps: Sequence[Tensor]
    """one [B, h, w] a column; grids may differ"""
    labels: Sequence[str] | None = None
    """[B] above the images"""
    predictions: Sequence[Sequence[str] | None] = ()
    """one [B] a column, above its maps; the last columns may have none"""
    confidences: Sequence[Sequence[float] | None] = ()
    """one [B] a column: probabilities of what is predicted"""


def attention_unit(readers: Iterable[str] = ("class token",)) -> str:
    """Of maps, at the colour bar; `readers` as `recording.who_reads` names each model's."""
    return f"attention weight\nof the {common_name(readers)}"


def common_name(readers: Iterable[str]) -> str:
    """The tokens that models classify by, in words; where they differ, what they have in common."""
    names = {*readers}
    return names.pop() if len(names) == 1 else "classifying tokens"


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
    # A student predicts once, so its prediction is written once.
    predictions = [teacher_predictions, student_predictions]
    group = Rows("", images, maps, labels, predictions, [teacher_confidences, student_confidences])
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
        across: groups that stand side by side.

    Raises:
        ValueError: there is no image, or a group's arguments have different numbers of images or columns.
    """
    for group in groups:
        _check(group, len(columns) - 1)
    filled = [group for group in groups if len(group.images)]
    if not filled:
        raise ValueError("a figure takes at least one image")
    lines = [groups[i : i + across] for i in range(0, len(groups), across)]
    width = len(columns) * (CELL + GAP) - GAP
    *tops, end = accumulate(map(_height, lines), initial=MARGIN)
    bottom = end - GAP
    inner = across * (width + SPACE) - SPACE
    figure_width = MARGIN + inner + GAP + BAR + BAR_TEXT + MARGIN
    text = wrap(caption, max(int((figure_width - 2 * MARGIN) / CHARACTER), 1))
    figure = Figure((figure_width, bottom + len(text) * LINE + MARGIN), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    maps = [each for group in filled for each in group.maps]
    # From zero, or the lowest value where that is negative.
    low = min(0.0, *(float(each.min()) for each in maps), 0.0)
    scale = Normalize(low, max(float(each.max()) for each in maps))
    for line, top in zip(lines, tops, strict=True):
        for place, group in enumerate(line):
            _draw_group(figure, group, columns, MARGIN + place * (width + SPACE), top, scale)
    first = tops[0] + _heading_height(lines[0]) + TEXT
    height = min(bottom - GAP - first, 4 * CELL)
    _draw_bar(figure, MARGIN + inner + GAP, first, height, scale, unit or attention_unit())
    _draw_text(figure, "\n".join(text), figure_width / 2, bottom, color=QUIET, linespacing=1.2)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels in 0..1 of normalised images [B, C, H, W]; `mean` and `std` hold one value a channel."""
    shift, scale = (images.new_tensor(each)[:, None, None] for each in (mean, std))
    return (images * scale + shift).clamp(0, 1)


def upsample(maps: Tensor, size: int) -> Tensor:
    """Maps [B, g, g] interpolated bilinearly to [B, size, size] pixels."""
    resized = interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)
    return resized.squeeze(1)


def _check(group: Rows, columns: int) -> None:
    if len(group.maps) != columns and len(group.images):
        raise ValueError(f"{len(group.maps)} maps an image for {columns} columns")
    given = [group.images, *group.maps, group.labels, *group.predictions, *group.confidences]
    counts = {len(each) for each in given if each is not None}
    if len(counts) > 1 and len(group.images):
        raise ValueError(f"a figure takes equally many images, maps and texts: {sorted(counts)}")


def _height(line: Sequence[Rows]) -> float:
    """What groups side by side take, in inches; one without images takes a row."""
    rows = max([1, *(len(group.images) for group in line)])
    return _heading_height(line) + rows * (TEXT + CELL) + 2 * GAP


def _heading_height(line: Sequence[Rows]) -> float:
    return HEADING + (TEXT if any(group.title for group in line) else 0)


def _draw_group(
    figure: Figure, group: Rows, columns: Sequence[str], left: float, top: float, scale: Normalize
) -> None:
    width = len(columns) * (CELL + GAP) - GAP
    if group.title:
        _draw_text(figure, group.title, left + width / 2, top, weight="bold")
        top += TEXT
    if not len(group.images):
        _draw_text(figure, "no such image", left + width / 2, top + CELL / 2, color=QUIET)
        return
    for column, heading in enumerate(columns):
        style = {"color": QUIET} if group.title else {"weight": "bold"}
        _draw_text(figure, heading, left + column * (CELL + GAP) + CELL / 2, top, **style)
    for row in range(len(group.images)):
        _draw_row(figure, group, row, left, top + HEADING + row * (TEXT + CELL) + TEXT, scale)


def _draw_row(figure: Figure, group: Rows, row: int, left: float, top: float, scale: Normalize) -> None:
    """An image, and each of its maps below what is predicted."""
    image, label = group.images[row], None if group.labels is None else group.labels[row]
    _draw_image(figure, left, top, _rgb(image), label)
    columns = zip_longest(group.maps, group.predictions, group.confidences)
    for column, (maps, predictions, confidences) in enumerate(columns, 1):
        text, colour = _mark(None if predictions is None else predictions[row], label)
        percent = "" if confidences is None else f" {100 * confidences[row]:.0f} %"
        place = left + column * (CELL + GAP)
        _draw_image(figure, place, top, _overlay(image, maps[row], scale), text and text + percent, colour)


def _draw_bar(figure: Figure, left: float, top: float, height: float, scale: Normalize, unit: str) -> None:
    axes = _axes_at(figure, left, top, BAR, height)
    seen = ListedColormap(_blend(COLOURS(np.linspace(0, 1, 256))[:, :3], 0.5))
    bar = figure.colorbar(ScalarMappable(scale, seen), cax=axes)
    bar.set_label(unit, size=8)
    bar.locator = MaxNLocator(5)
    axes.tick_params(labelsize=7, length=2, width=0.5)
    bar.outline.set_visible(False)


def _axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _draw_text(figure: Figure, text: str, centre: float, top: float, **style: Any) -> None:
    """A line of text at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    place = centre / across, 1 - top / down
    text, fonts = drawable(text)
    figure.text(*place, text, ha="center", va="top", size=8, family=fonts, parse_math=False, **style)


def _draw_image(
    figure: Figure, left: float, top: float, pixels: np.ndarray, title: str | None, colour: str = "black"
) -> None:
    """Draw [H, W, 3] as a cell at a place in inches; a small image keeps its square pixels."""
    axes = _axes_at(figure, left, top, CELL, CELL)
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    text, fonts = drawable(title or "")
    # At a given place: to find one matplotlib measures ticks that are not drawn, half of a figure's time.
    axes.set_title(text, size=8, family=fonts, pad=3, y=1, color=colour, parse_math=False)


def _mark(prediction: str | None, label: str | None) -> tuple[str | None, str]:
    """A prediction, marked as right or wrong where that is known, and its colour."""
    if prediction is None or label is None:
        return prediction, "black"
    return (f"{prediction} ✓", RIGHT) if prediction == label else (f"{prediction} ✗", WRONG)


def _rgb(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 as [H, W, 3]; a grey image gets three equal channels."""
    return image.detach().float().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def _overlay(image: Tensor, weights: Tensor, scale: Normalize) -> np.ndarray:
    """A map [h, w] in colour over the grey, paled image [C, H, W], as [H', W', 3]."""
    size = max(SMOOTH_PIXELS, image.shape[-1])
    smooth = upsample(weights[None].detach().float().cpu(), size)[0].numpy()
    grey = interpolate(image.mean(0)[None, None].detach().float().cpu(), size=(size, size))[0]
    return _blend(COLOURS(scale(smooth))[..., :3], _rgb(0.25 + grey / 2))


def _blend(colours: np.ndarray, ground: np.ndarray | float) -> np.ndarray:
    """A map's colours over what lies below them."""
    return OPACITY * colours + (1 - OPACITY) * ground
