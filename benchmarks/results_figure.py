"""The picture on top of README.md and RESULTS.md: what each arm of the study of few labels gains."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vitkd.report.statistics import LEVEL

if TYPE_CHECKING:
    from benchmarks.results_page import FewLabels

FIGURE = "docs/results.png"
# Okabe and Ito's blue and vermilion, which colour-blind readers tell apart.
GAIN, HARM, UNDECIDED = "#0072b2", "#d55e00", "#8c8c8c"
SHOWN = (
    "copied maps",
    "logit",
    "encoder kl",
    "block kl",
    "block mse",
    "encoder mse",
    "relation",
    "other images' maps",
    "untrained teacher",
    "uniform maps",
)


def draw(study: "FewLabels", place: Path) -> None:
    """Write the picture: a panel for each share of the labels."""
    figure = Figure((8.6, 3.5), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(study.shares), sharey=True)
    for axes, share in zip(panels, study.shares, strict=True):
        draw_share(axes, study, share)
    panels[0].set_yticks(range(len(SHOWN)), SHOWN, fontsize=8.5)
    panels[0].set_ylim(len(SHOWN) - 0.5, -0.5)
    figure.supxlabel("gain over the student alone, percentage points of test accuracy", fontsize=8.5)
    figure.savefig(place, metadata={"Software": None})


def draw_share(axes: Axes, study: "FewLabels", share: str) -> None:
    """One panel: every arm's gain with its interval, in colour where it is evidence."""
    axes.set_title(f"{100 * float(share):g} % of the labels", fontsize=9, loc="left")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(axis="both", length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for y, arm in enumerate(SHOWN):
        gain, p = study.gains[arm, share].difference, study.corrected[arm, share]
        assert gain.mean is not None
        is_evidence = p is not None and p <= LEVEL
        colour = (GAIN if gain.mean > 0 else HARM) if is_evidence else UNDECIDED
        axes.plot(ends(gain.interval or (gain.mean, gain.mean)), (y, y), color=colour, linewidth=1.8)
        axes.plot(gain.mean, y, "o", color=colour, markerfacecolor=colour if is_evidence else "white", ms=5)


def ends(interval: Sequence[float]) -> tuple[float, float]:
    """Both ends of an interval."""
    low, high = interval
    return low, high
