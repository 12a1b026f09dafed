"""The picture of what a student takes its test images for.

Shapes: C classes.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitkd.colours import readable_on
from vitkd.explain.gallery.fonts import drawable

COLOURS = matplotlib.colormaps["Blues"]
MAX_COUNTED, MAX_NAMED = 20, 60
"""The most classes whose counts are written into the cells, and whose names stand beside them."""
NAME_LENGTH = 18
"""Characters."""
CELL, MIN_SIDE, MAX_SIDE, MARGIN = 0.34, 3.4, 9.0, 1.3
"""Inches: of a cell, of all cells, and for the names."""


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """How many images of each class (rows) were predicted as each (columns), coloured by share of the row.

    Args:
        confusion: [C, C] int.
        class_names: [C]; written where there is room for them.
    """
    classes, images = len(confusion), confusion.sum(1, keepdims=True)
    shares = confusion / np.maximum(images, 1)
    side = min(max(classes * CELL, MIN_SIDE), MAX_SIDE)
    figure = Figure((side + 1.5 * MARGIN, side + MARGIN), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(shares, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("share of the class", size=8)
    bar.ax.tick_params(labelsize=7)
    axes.set_xlabel("predicted class", size=9)
    axes.set_ylabel("true class", size=9)
    accuracy = np.trace(confusion) / max(images.sum(), 1)
    axes.set_title(f"{images.sum():,} test images, {accuracy:.2%} right", size=9)
    axes.tick_params(labelsize=7, length=2)
    if classes <= MAX_NAMED:
        write_names(axes, class_names)
    if classes <= MAX_COUNTED:
        write_counts(axes, confusion, shares)
    return figure


def write_names(axes: Axes, class_names: Sequence[str]) -> None:
    """The class of each row and column."""
    short = [n if len(n) <= NAME_LENGTH else f"{n[: NAME_LENGTH - 1]}…" for n in class_names]
    text, families = drawable("\n".join(short))
    style: dict[str, Any] = {"family": families, "parse_math": False}
    axes.set_xticks(range(len(short)), text.split("\n"), rotation=90, **style)
    axes.set_yticks(range(len(short)), text.split("\n"), **style)


def write_counts(axes: Axes, confusion: np.ndarray, shares: np.ndarray) -> None:
    """The number of images in each cell that has any."""
    for row, column in np.argwhere(confusion):
        colour = readable_on(COLOURS(shares[row, column]))
        axes.text(column, row, f"{confusion[row, column]:,}", ha="center", va="center", size=7, color=colour)
