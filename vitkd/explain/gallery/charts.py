"""Charts that the page draws itself, as HTML and SVG, so that they are sharp and follow its colours.

Shapes: L blocks, A heads, n points of a curve.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import NDArray

from vitkd.colours import readable_on
from vitkd.explain.gallery.figures import COLOURS
from vitkd.explain.measures.faithfulness import RANDOM

SERIES = 8
"""colours of curves in the page's style sheet, after Okabe and Ito: colour-blind readers tell them apart"""

# Units of the SVG's view box.
WIDTH, HEIGHT = 300, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 284, 8, 150
"""the edges of the area that curves are drawn in"""
STEPS = [base * 10**power for power in range(-4, 1) for base in (1, 2, 5)]


@dataclass(frozen=True, eq=False)
class HeatMap:
    """A metric per block and head, in panels that share one colour scale."""

    title: str
    caption: str
    unit: str
    """at the colour bar: the metric, its unit and which end is which"""
    panels: Mapping[str, NDArray]
    """title → [L, A]; NaN where undefined"""
    blocks: Sequence[str]
    """names of the L rows"""

    @cached_property
    def limits(self) -> tuple[float, float]:
        """The ends of the colour scale."""
        values = np.concatenate([each[np.isfinite(each)] for each in self.panels.values()])
        return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)

    def style(self, value: float) -> str:
        """A cell's colours in CSS; nothing for an undefined one."""
        if not math.isfinite(value):
            return ""
        low, high = self.limits
        colour = COLOURS((value - low) / (high - low or 1))
        return f"background: {to_hex(colour)}; color: {to_hex(readable_on(colour))}"


@dataclass(frozen=True, eq=False)
class Curves:
    """Probabilities while an image is removed: a panel an order of removal, a line a method."""

    title: str
    caption: str
    y_label: str
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
    """title → method → (fractions [n] of the image removed, in 0..1, and values [n])"""

    @cached_property
    def methods(self) -> list[str]:
        return [*dict.fromkeys(method for lines in self.panels.values() for method in lines)]

    @cached_property
    def ticks(self) -> list[float]:
        """Round values from 0 to at least the highest, the same for all panels."""
        highest = max(max(values) for lines in self.panels.values() for _, values in lines.values())
        step = next((step for step in STEPS if 5 * step >= highest), STEPS[-1])
        return [step * i for i in range(max(math.ceil(highest / step - 1e-9), 1) + 1)]

    def series(self, method: str) -> str:
        """The style class of a method's line; that of random order is grey."""
        others = [each for each in self.methods if each != RANDOM]
        return RANDOM if method == RANDOM else f"s{others.index(method) % SERIES}"

    def x(self, fraction: float) -> float:
        """Where a fraction removed lies in the view box."""
        return round(LEFT + (RIGHT - LEFT) * fraction, 2)

    def y(self, value: float) -> float:
        """Where a value lies in the view box."""
        return round(BOTTOM - (BOTTOM - TOP) * value / self.ticks[-1], 2)

    def points(self, fractions: Sequence[float], values: Sequence[float]) -> str:
        """A curve as an SVG polyline takes it."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in zip(fractions, values, strict=True))
