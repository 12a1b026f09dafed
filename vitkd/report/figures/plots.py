"""Plots as SVG for a page: one fills a phone's width, several fit side by side on a desktop."""

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vitkd.report.formatting import shortened

# Placeholders that no plot contains by chance; CSS variables replace them for light and dark mode.
INK, QUIET, GRID = "#0101fe", "#0202fe", "#0303fe"
SERIES = tuple(f"#04{place:02x}fe" for place in range(8))
RAMP = tuple(f"#05{place:02x}fe" for place in range(12))
GOOD, BAD = "#0601fe", "#0602fe"
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    GRID: "--grid",
    GOOD: "--good",
    BAD: "--bad",
    **{colour: f"--series-{place}" for place, colour in enumerate(SERIES)},
    **{colour: f"--ramp-{place}" for place, colour in enumerate(RAMP)},
}
MARKERS = "osD^vPX*"

WIDTH, HEIGHT = 4.4, 3.1
"""Inches."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8),
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.7),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "lines.linewidth": 1.6,
    "lines.dashed_pattern": (4, 2),
    "lines.markersize": 5,
}

LEGEND_ROW = 0.16
"""Inches."""
MAX_LEGEND = 52
"""Characters."""
LEGEND_COLUMNS = ((9, 4), (15, 3), (25, 2))
"""Characters of the longest label → columns; longer labels get one."""

DECADES = 100
"""Values whose largest is at least this multiple of the smallest are drawn on a log axis."""


class Plot(NamedTuple):
    """One plot."""

    svg: str
    description: str
    """for screen readers"""


class PlotGroup(NamedTuple):
    """Plots with a common title and caption."""

    title: str
    caption: str
    plots: list[Plot]


def ramp(index: int, total: int) -> str:
    """The colour of one of `total` ordered lines."""
    return RAMP[round(index * (len(RAMP) - 1) / max(total - 1, 1))]


def series(index: int) -> dict[str, Any]:
    """Colour and marker of one of several unordered lines."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def render(description: str, draw: Callable[..., None], *arguments: object) -> Plot:
    """The plot that `draw(figure, *arguments)` makes of an empty figure, as an HTML element.

    It has CSS variables as colours and no fixed size.
    """
    figure = Figure((WIDTH, HEIGHT), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    draw(figure, *arguments)
    legend_below(figure, figure.axes[0])
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # Verdana is as wide as DejaVu Sans, for which the figure was laid out.
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return Plot(re.sub(r' (width|height)="[^"]*"', "", text, count=2), description)


def new_axes(figure: Figure, x: str, y: str, title: str = "") -> Axes:
    """The figure's only axes."""
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_title(title, color=INK, loc="left", parse_math=False)
    axes.tick_params(colors=INK, which="both")
    for spine in axes.spines.values():
        spine.set_color(QUIET)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend below the axes, for which the figure grows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    columns = next((columns for most, columns in LEGEND_COLUMNS if longest <= most), 1)
    rows = -(-len(labels) // columns)
    figure.set_size_inches(WIDTH, figure.get_size_inches()[1] + LEGEND_ROW * (rows - 1))
    labels = [shortened(label, MAX_LEGEND) for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, labelcolor=INK)


def limits(values: Sequence[float], margin: float = 0.2) -> tuple[float, float]:
    """The ends of an axis with a margin around `values`."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = margin * (high - low) or 1.0
    return low - room, high + room


def wrapped(text: str, length: int = 34) -> str:
    """Text on at most two lines of at most `length` characters."""
    return "\n".join(textwrap.wrap(text, length, max_lines=2, placeholder="…"))
