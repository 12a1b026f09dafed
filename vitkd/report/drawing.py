"""How a picture is made: SVG that takes its colours from the page, the same drawing light and dark.

Every picture is small, so that a phone shows it in full width and a desk several beside each other. Colours
of ink and of series are stand-ins that `svg` replaces by CSS variables.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH, HEIGHT = 4.4, 3.1
"""Inches; a phone shows that at about its size."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vitkd",
    # Verdana is as wide as what the figure was laid out with, and is there where DejaVu is not.
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}

# Stand-ins: no drawing uses these by chance.
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

LEGEND_ROW = 0.16
"""Inches."""
LONGEST_LEGEND = 52
"""Characters; more would be cut off."""


DECADES = 100
"""Alphas from lowest to highest by such a factor or more are drawn on a log axis."""


class Picture(NamedTuple):
    """One drawing."""

    svg: str
    description: str
    """for who cannot see it"""


class Plate(NamedTuple):
    """Drawings that belong together."""

    name: str
    caption: str
    pictures: list[Picture]


def picture(description: str, draw: Callable[..., None], *arguments: object) -> Picture:
    """What `draw` puts on an empty figure."""
    figure = Figure((WIDTH, HEIGHT), layout="constrained", facecolor="none")
    FigureCanvasSVG(figure)
    draw(figure, *arguments)
    return Picture(svg(figure, description), description)


def svg(figure: Figure, description: str) -> str:
    """The figure as an element for a page: colours by CSS variables, no size of its own."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*"', r"<svg \1\2", text, count=1
    )


def new_axes(figure: Figure, x: str, y: str, title: str = "") -> Axes:
    """The figure's only axes, in the stand-ins' colours."""
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
    """A legend that covers nothing and is cut off nowhere; the figure grows by what it takes."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        columns = next((of for of, fit in ((4, 9), (3, 15), (2, 25)) if longest <= fit), 1)
        rows = -(-len(labels) // columns)
        figure.set_size_inches(WIDTH, figure.get_size_inches()[1] + LEGEND_ROW * (rows - 1))
        labels = [shortened(label, LONGEST_LEGEND) for label in labels]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, labelcolor=INK)


def alpha_axis(axes: Axes, alphas: Iterable[float], and_one: bool = False) -> Callable[[float], float]:
    """Tick the axis at `alphas`, in decades where they span some; returns where an alpha stands."""
    known = sorted({*alphas, *([1.0] if and_one else [])})
    positive = [alpha for alpha in known if alpha > 0]
    if not positive or positive[-1] / positive[0] < DECADES:
        axes.set_xticks(known, [f"{alpha:g}" for alpha in known])
        return lambda alpha: alpha
    # 0 has no logarithm: it stands one decade below the lowest.
    zero = np.log10(positive[0]) - 1
    at = [zero if alpha == 0 else np.log10(alpha) for alpha in known]
    kept = spaced(at, 0.06 * (at[-1] - at[0]))
    axes.set_xticks([at[k] for k in kept], [f"{known[k]:g}" for k in kept])
    axes.set_xlabel(f"{axes.get_xlabel()}, log scale")
    return lambda alpha: float(zero if alpha == 0 else np.log10(alpha))


def spaced(at: Sequence[float], least: float) -> list[int]:
    """Which of ascending positions to label so that no two labels overlap, from the right."""
    kept: list[int] = []
    for number in reversed(range(len(at))):
        if not kept or at[kept[-1]] - at[number] >= least:
            kept.append(number)
    return kept[::-1]


def limits(values: Sequence[float], margin: float = 0.2) -> tuple[float, float]:
    """An axis's ends with room around `values`."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = margin * (high - low) or 1.0
    return low - room, high + room


def shortened(text: str, most: int = 34) -> str:
    """Text that fits beside or above a picture."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def wrapped(text: str, most: int = 34) -> str:
    """Text on two lines where one would take too much of a picture's width."""
    first, *more = textwrap.wrap(text, most)
    return "\n".join([first, shortened(" ".join(more), most)]) if more else first


def ramp(place: int, of: int) -> str:
    """A colour for the `place`-th of `of` ordered lines, evenly spaced."""
    return RAMP[round(place * (len(RAMP) - 1) / max(of - 1, 1))]


def readable_on(colour: Sequence[float]) -> str:
    """Black or white, whichever stands out (relative luminance, WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "white"
