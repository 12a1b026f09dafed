"""Where the class token looks: image, teacher's attention and student's attention side by side.

Shapes: B images, C channels (1 grey, 3 RGB), H heads, T tokens (CLS + g²), g patches along one side.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.models.layers import at_least_float32

COLOURS = matplotlib.colormaps["viridis"]
OPACITY = 0.75
"""of a map over its image, which is paled to half its contrast: the colour bar is read off the map"""
RIGHT, WRONG, QUIET = "#1a7f37", "#c62828", "#666666"

# Inches.
CELL, GAP, TEXT, HEADING, MARGIN = 1.5, 0.1, 0.22, 0.17, 0.12
BAR, BAR_TEXT = 0.11, 0.72

SMOOTH_PIXELS = 256
"""Maps are drawn with this many pixels a side at least: those of eight-pixel images are to be smooth too."""


def cls_attention(scores: Tensor, grid: int, heads: Sequence[int] | None = None) -> Tensor:
    """How the class token's attention is spread over the patches.

    Args:
        scores: [B, H, T, T] before softmax, the class token first.
        grid: g.
        heads: those to average, a head named twice counting twice; None for all.

    Returns:
        [B, g, g]: the mean over heads of the class token's weights, scaled to sum to 1 over the patches.

    Raises:
        ValueError: T is not 1 + g².
    """
    if scores.shape[-1] != 1 + grid**2:
        raise ValueError(f"{scores.shape[-1]} tokens are not CLS and {grid}×{grid} patches")
    rows = scores[..., 0, :] if heads is None else scores[..., list(heads), 0, :]
    weights = at_least_float32(rows).softmax(-1).mean(-2)[..., 1:]
    # A class token that looks at itself alone gives an empty map rather than 0/0.
    total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return (weights / total).unflatten(-1, (grid, grid))


def upsample(maps: Tensor, size: int) -> Tensor:
    """Maps [B, g, g] interpolated bilinearly to [B, size, size] pixels."""
    resized = interpolate(maps.unsqueeze(1), size=(size, size), mode="bilinear", align_corners=False)
    return resized.squeeze(1)


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The pixels in 0..1 of normalised images [B, C, H, W]; `mean` and `std` hold one value a channel."""
    scale, shift = images.new_tensor(std)[:, None, None], images.new_tensor(mean)[:, None, None]
    return (images * scale + shift).clamp(0, 1)


def attention_panel(
    images: Tensor,
    teacher_maps: Tensor,
    student_maps: Tensor,
    *,
    labels: Sequence[str] | None = None,
    teacher_predictions: Sequence[str] | None = None,
    student_predictions: Sequence[str] | None = None,
    columns: tuple[str, str, str] = ("image", "teacher", "student"),
    caption: str = "",
) -> Figure:
    """One row an image: the image, the teacher's map over it, the student's map over it.

    All maps share one colour scale, from zero to the highest weight of any.

    Args:
        images: [B, C, H, W] in 0..1, square.
        teacher_maps, student_maps: [B, g, g] as `cls_attention` gives them; the two g may differ.
        labels: what each image shows.
        teacher_predictions, student_predictions: what each model takes it for, marked right or wrong where
            `labels` are given.
        columns: the columns' headings.
        caption: stands below the panel.

    Raises:
        ValueError: there is no image, or an argument has another number of images.
    """
    texts = (labels, teacher_predictions, student_predictions)
    _check_counts(images, teacher_maps, student_maps, *texts)
    figure = _blank(len(images))
    scale = Normalize(0, max(teacher_maps.max().item(), student_maps.max().item()))
    for row, image in enumerate(images):
        label, teacher, student = (None if text is None else text[row] for text in texts)
        cells = [_cell(figure, row, column) for column in range(3)]
        _show(cells[0], _pixels(image))
        _show(cells[1], _overlay(image, teacher_maps[row], scale))
        _show(cells[2], _overlay(image, student_maps[row], scale))
        _title(cells[0], label)
        _title(cells[1], *_verdict(teacher, label))
        _title(cells[2], *_verdict(student, label))
    for column, heading in enumerate(columns):
        _write(figure, heading, MARGIN + column * (CELL + GAP) + CELL / 2, MARGIN, weight="bold")
    _draw_scale(figure, len(images), scale)
    _write(figure, caption, MARGIN + 1.5 * CELL + GAP, _below(len(images)), color=QUIET)
    return figure


def _check_counts(*given: Sequence[str] | Tensor | None) -> None:
    counts = {len(each) for each in given if each is not None}
    if counts == {0} or len(counts) > 1:
        raise ValueError(f"a panel takes equally many images, maps and texts, at least one: {sorted(counts)}")


def _below(rows: int) -> float:
    """Inches from the figure's upper edge to the end of the last row."""
    return MARGIN + HEADING + rows * (TEXT + CELL) + GAP


def _blank(rows: int) -> Figure:
    """A figure with room for the headings, `rows` rows of three cells, the colour bar and the caption."""
    width = MARGIN + 3 * (CELL + GAP) + BAR + BAR_TEXT + MARGIN
    figure = Figure((width, _below(rows) + TEXT), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def _cell(figure: Figure, row: int, column: int) -> Axes:
    top = MARGIN + HEADING + row * (TEXT + CELL) + TEXT
    axes = _axes(figure, MARGIN + column * (CELL + GAP), top, CELL, CELL)
    axes.set_axis_off()
    return axes


def _write(figure: Figure, text: str, centre: float, top: float, **style: Any) -> None:
    """A line of text at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    figure.text(
        centre / across, 1 - top / down, text, ha="center", va="top", size=8, parse_math=False, **style
    )


def _title(axes: Axes, text: str | None, colour: str = "black") -> None:
    axes.set_title(text or "", size=8, pad=3, color=colour, parse_math=False)


def _verdict(prediction: str | None, label: str | None) -> tuple[str | None, str]:
    """A prediction as it is written, and its colour."""
    if prediction is None or label is None:
        return prediction, "black"
    return (f"{prediction} ✓", RIGHT) if prediction == label else (f"{prediction} ✗", WRONG)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    """Draw [H, W, 3]; a small image keeps its square pixels."""
    axes.imshow(pixels, interpolation="nearest", aspect="auto")


def _pixels(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 as [H, W, 3]; a grey image gets three equal channels."""
    return image.detach().float().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def _overlay(image: Tensor, weights: Tensor, scale: Normalize) -> np.ndarray:
    """A map [g, g] in colour over the grey, paled image [C, H, W], as [H', W', 3]."""
    size = max(SMOOTH_PIXELS, image.shape[-1])
    smooth = upsample(weights[None].detach().float().cpu(), size)[0].numpy()
    grey = interpolate(image.mean(0)[None, None].detach().float().cpu(), size=(size, size))[0]
    return _blend(COLOURS(scale(smooth))[..., :3], _pixels(0.25 + grey / 2))


def _blend(colours: np.ndarray, ground: np.ndarray | float) -> np.ndarray:
    return OPACITY * colours + (1 - OPACITY) * ground


def _draw_scale(figure: Figure, rows: int, scale: Normalize) -> None:
    """The colour bar at the right: what colour a weight has over mid-grey."""
    top = MARGIN + HEADING + TEXT
    axes = _axes(figure, MARGIN + 3 * (CELL + GAP), top, BAR, rows * (TEXT + CELL) - TEXT)
    seen = ListedColormap(_blend(COLOURS(np.linspace(0, 1, 256))[:, :3], 0.5))
    bar = figure.colorbar(ScalarMappable(scale, seen), cax=axes)
    bar.set_label("attention weight\nof the class token", size=8)
    bar.locator = MaxNLocator(5)
    axes.tick_params(labelsize=7, length=2, width=0.5)
    bar.outline.set_visible(False)
