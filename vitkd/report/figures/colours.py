"""Colours and markers of plots: placeholders, which CSS variables replace for light and dark mode."""

from typing import Any

# Placeholders that no plot contains by chance.
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


def ramp(index: int, total: int) -> str:
    """The colour of one of `total` ordered lines."""
    return RAMP[round(index * (len(RAMP) - 1) / max(total - 1, 1))]


def series(index: int) -> dict[str, Any]:
    """Colour and marker of one of several unordered lines."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
