"""What every figure is drawn with: places in inches, an image, and a map over it.

Shapes: C channels (1 grey, 3 RGB), H × W pixels, h × w patches.
"""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.explain.gallery.pixels import upsample

COLOURS = matplotlib.colormaps["viridis"]
OPACITY = 0.75
"""of a map over its image, which is paled to half its contrast: the colour bar is read off the map"""
RIGHT, WRONG, QUIET = "#1a7f37", "#c62828", "#666666"

# Inches.
CELL, GAP, TEXT, HEADING, MARGIN = 1.5, 0.1, 0.22, 0.17, 0.12
BAR, BAR_TEXT = 0.11, 0.72

SMOOTH_PIXELS = 256
"""A map is drawn with at least this many pixels a side, so that it is smooth over a small image too."""


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def draw_text(figure: Figure, text: str, centre: float, top: float, **style: Any) -> None:
    """A line of text at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    place = centre / across, 1 - top / down
    figure.text(*place, text, ha="center", va="top", size=8, parse_math=False, **style)


def draw_image(
    figure: Figure, left: float, top: float, pixels: np.ndarray, title: str | None, colour: str = "black"
) -> None:
    """Draw [H, W, 3] as a cell at a place in inches; a small image keeps its square pixels."""
    axes = axes_at(figure, left, top, CELL, CELL)
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set_title(title or "", size=8, pad=3, color=colour, parse_math=False)


def mark(prediction: str | None, label: str | None) -> tuple[str | None, str]:
    """A prediction, marked as right or wrong where that is known, and its colour."""
    if prediction is None or label is None:
        return prediction, "black"
    return (f"{prediction} ✓", RIGHT) if prediction == label else (f"{prediction} ✗", WRONG)


def rgb(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0..1 as [H, W, 3]; a grey image gets three equal channels."""
    return image.detach().float().cpu().expand(3, -1, -1).permute(1, 2, 0).numpy()


def overlay(image: Tensor, weights: Tensor, scale: Normalize) -> np.ndarray:
    """A map [h, w] in colour over the grey, paled image [C, H, W], as [H', W', 3]."""
    size = max(SMOOTH_PIXELS, image.shape[-1])
    smooth = upsample(weights[None].detach().float().cpu(), size)[0].numpy()
    grey = interpolate(image.mean(0)[None, None].detach().float().cpu(), size=(size, size))[0]
    return blend(COLOURS(scale(smooth))[..., :3], rgb(0.25 + grey / 2))


def blend(colours: np.ndarray, ground: np.ndarray | float) -> np.ndarray:
    """A map's colours over what lies below them."""
    return OPACITY * colours + (1 - OPACITY) * ground
