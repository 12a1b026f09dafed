"""Where the tokens look that a model classifies by, and the strokes that every figure of it is drawn with.

Shapes: B images, C channels (1 grey, 3 RGB), H heads, T tokens (prefix + g²), g patches along one side.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from vitkd.models.output import at_least_float32

COLOURS = matplotlib.colormaps["viridis"]
OPACITY = 0.75
"""of a map over its image, which is paled to half its contrast: the colour bar is read off the map"""
RIGHT, WRONG, QUIET = "#1a7f37", "#c62828", "#666666"

# Inches.
CELL, GAP, TEXT, HEADING, MARGIN = 1.5, 0.1, 0.22, 0.17, 0.12
BAR, BAR_TEXT = 0.11, 0.72

SMOOTH_PIXELS = 256
"""Maps are drawn with this many pixels a side at least: those of eight-pixel images are to be smooth too."""


def cls_attention(
    scores: Tensor,
    grid: int,
    heads: Sequence[int] | None = None,
    prefix: int = 1,
    allowed: Tensor | None = None,
) -> Tensor:
    """How the class token's attention is spread over the patches, or its mean with a distillation token's.

    Args:
        scores: [B, H, T, T] before softmax, the class token first.
        grid: g.
        heads: those to average, a head named twice counting twice; None for all.
        prefix: tokens before the patches, all of which the classifier reads: the class token, or that and the
            distillation token.
        allowed: [T, T], False where the model masks attention; None where it does not.

    Returns:
        [B, g, g]: the mean over heads and these tokens of their weights, scaled to sum 1 over the patches.

    Raises:
        ValueError: T is not prefix + g².
    """
    if scores.shape[-1] != prefix + grid**2:
        raise ValueError(f"{scores.shape[-1]} tokens are not {prefix} and {grid}×{grid} patches")
    rows = at_least_float32(scores[..., :prefix, :])
    rows = rows if heads is None else rows[..., list(heads), :, :]
    if allowed is not None:
        rows = rows.masked_fill(~allowed[:prefix], -math.inf)
    weights = rows.softmax(-1).mean((-3, -2))[..., prefix:]
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


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


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
