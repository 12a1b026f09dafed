"""The figure of `by_data_size`: how far blocks attend by training images, and how alike blocks are.

Shapes: L blocks, R runs of one size.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullLocator

from vitkd.colours import readable_on
from vitkd.explain.gallery.figures import COLOURS, QUIET
from vitkd.explain.measures.data_size import OfSize

GRID = "#dddddd"
MARKERS = "osD^vPX*"
LIGHTEST = 0.85
"""of the colours of lines: a lighter one is hard to see on paper"""
APART = 1.02
"""The lines' points of a size lie beside each other, each so much further on the log axis."""
LEAST_SPAN = (0.9, 1.1)
"""of the axis of distances, so that noise does not look like more"""
WRITTEN = 6
"""of so many blocks at most each value is written into its cell"""

# Inches.
MATRIX, LINES, MARGIN = 1.75, 2.9, 1.3


def data_size_figure(sizes: Sequence[OfSize], title: str) -> Figure:
    """Above a line a block of mean attention distance over training images, below a CKA matrix a size."""
    width = max(MATRIX * len(sizes) + MARGIN, 6.4)
    figure = Figure((width, LINES + MATRIX + MARGIN), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(LINES, MATRIX + 0.8)))
    draw_distances(above.add_subplot(), sizes)
    draw_matrices(below, sizes)
    return figure


def draw_matrices(figure: SubFigure, sizes: Sequence[OfSize]) -> None:
    """A CKA matrix a size, on one colour scale."""
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for each, panel in zip(sizes, panels, strict=True):
        draw_matrix(panel, each)
    panels[0].set_ylabel("block", fontsize=9)
    largest = f"{sizes[-1].images:,} training images"
    figure.supxlabel(f"block of the models of {largest}", fontsize=9)
    heading = f"Linear CKA of blocks with those of models of {largest}"
    figure.suptitle(heading, fontsize=9, fontweight="bold", x=0.01, ha="left")
    bar = figure.colorbar(panels[0].images[0], ax=[*panels], fraction=0.02, pad=0.02, shrink=0.85)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)


def draw_distances(axes: Axes, sizes: Sequence[OfSize]) -> None:
    """A line a block: the mean over runs and heads, with the standard deviation over runs as a bar."""
    images = np.array([each.images for each in sizes])
    of_runs = [each.distance.nanmean(-1).numpy() for each in sizes]
    blocks = of_runs[0].shape[1]
    axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (4, 2)), label="uniform")
    for block in range(blocks):
        axes.errorbar(
            images * APART ** (block - (blocks - 1) / 2),
            [each[:, block].mean() for each in of_runs],
            [each[:, block].std(ddof=1) if len(each) > 1 else 0 for each in of_runs],
            color=COLOURS(LIGHTEST * block / max(blocks - 1, 1)),
            marker=MARKERS[block % len(MARKERS)],
            label=f"block {block}",
            capsize=2.5,
        )
    axes.set_xscale("log")
    axes.set_xticks(images, [f"{each:,}" for each in images])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, LEAST_SPAN[0]), max(high, LEAST_SPAN[1]))
    style(axes)
    # The last block at the top, where its line is as a rule.
    entries = (each[::-1] for each in axes.get_legend_handles_labels())
    axes.legend(*entries, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def style(axes: Axes) -> None:
    """What lines are of, in words, and no more ink than that takes."""
    axes.set_xlabel("training images", fontsize=9)
    axes.set_ylabel("relative to uniform attention", fontsize=9)
    heading = "Mean attention distance, ± standard deviation over runs"
    axes.set_title(heading, fontsize=9, fontweight="bold", loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_matrix(axes: Axes, size: OfSize) -> None:
    """The CKA of one size, the mean over its runs."""
    matrix = size.cka.mean(0).numpy()
    axes.imshow(matrix, cmap=COLOURS, vmin=0, vmax=1, origin="lower")
    if len(matrix) <= WRITTEN:
        for (row, column), value in np.ndenumerate(matrix):
            colour = readable_on(COLOURS(value))
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
    runs = f"{len(size.cka)} runs" if len(size.cka) > 1 else "1 run"
    axes.set_title(f"{size.images:,} images, {runs}", fontsize=8.5)
    axes.set_xticks(range(len(matrix)))
    axes.set_yticks(range(len(matrix)))
    axes.tick_params(labelsize=8, length=0)
    axes.spines[:].set_visible(False)
