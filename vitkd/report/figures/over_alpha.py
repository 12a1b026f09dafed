"""Test accuracy, and the ratio of the two losses' gradients, over alpha."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy import stats

from vitkd.report.arms import ALONE, Arm
from vitkd.report.comparison import Comparison
from vitkd.report.curves import median_ratio
from vitkd.report.figures.colours import INK, QUIET, series
from vitkd.report.figures.drawing import (
    ALPHA_LABEL,
    PlotGroup,
    alpha_axis,
    legend_below,
    limits,
    new_axes,
    render,
    shortened,
)
from vitkd.report.settings import CONSTANT, group_by
from vitkd.report.statistics import summarise


def accuracy_over_alpha(comparison: Comparison) -> PlotGroup:
    """One plot a granularity, one line a loss, and the student alone."""
    arms, alone = comparison.experiment.arms, comparison.experiment.baseline
    shown = [*(arm for arm in arms if arm.granularity), *([alone] if alone else [])]
    y_limits = limits([acc for arm in shown for acc in arm.metric("acc_last").values()])
    return PlotGroup(
        "Accuracy over alpha",
        "Test accuracy of the last epoch: lines are means over seeds, bands 95 % intervals of the mean"
        f" (Student's t; may extend beyond the frame), dots single runs; grey is the {ALONE}, which alpha = 1"
        " equals with constant weighting.",
        [
            render(f"test accuracy over alpha, {title}", draw_accuracy, title, lines, alone, y_limits)
            for title, lines in lines_by_title(arms).items()
            # A control at one alpha makes no line; the plot of all gains has it.
            if "," not in title or any(len(line) > 1 for line in lines.values())
        ],
    )


def lines_by_title(arms: Sequence[Arm]) -> dict[str, dict[str, list[Arm]]]:
    """Title of a plot → loss → the arms of a line, which may be none."""
    arms = [arm for arm in arms if arm.granularity]
    losses = sorted({arm.loss for arm in arms})
    titles = group_by(arms, lambda arm: ", ".join(filter(None, (arm.granularity, arm.extra_text))))
    return {
        title: {loss: [arm for arm in members if arm.loss == loss] for loss in losses}
        for title, members in titles.items()
    }


def draw_accuracy(
    figure: Figure, title: str, lines: Mapping[str, list[Arm]], alone: Arm | None, y_limits: tuple
) -> None:
    """One line a loss, which ends in the student alone if that is what alpha = 1 trains."""
    axes = new_axes(figure, ALPHA_LABEL, "test accuracy, %", shortened(title))
    arms = [arm for line in lines.values() for arm in line]
    ends = [alone] if alone and arms[0].weighting == CONSTANT else []
    alpha_axis(axes, [arm.alpha for arm in arms + ends])
    if alone:
        low, mean, high = mean_and_ends(alone)
        axes.axhline(mean, color=QUIET, linestyle="--", linewidth=1.2, label=ALONE)
        axes.axhspan(low, high, color=QUIET, alpha=0.16, linewidth=0)
    for number, (loss, line) in enumerate(lines.items()):
        if line:
            draw_line(axes, [(arm.alpha, *mean_and_ends(arm)) for arm in line + ends], loss, number)
            draw_runs(figure, axes, line, number)
    axes.set_ylim(*y_limits)
    legend_below(figure, axes)


def mean_and_ends(arm: Arm) -> tuple[float, float, float]:
    """Low end, mean and high end of an arm's accuracy; all equal without an interval."""
    summary = summarise([*arm.metric("acc_last").values()])
    assert summary.mean is not None
    low, high = summary.interval or (summary.mean, summary.mean)
    return low, summary.mean, high


def draw_line(axes: Axes, points: Sequence[tuple[float, ...]], label: str, number: int) -> None:
    """A line and a band through points (x, low, middle, high)."""
    look = series(number)
    at, low, middle, high = zip(*points, strict=True)
    axes.plot(at, middle, **look, label=label)
    axes.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def draw_runs(figure: Figure, axes: Axes, arms: Sequence[Arm], number: int) -> None:
    """A dot for each run, shifted so that lines do not hide each other's dots."""
    points = [(arm.alpha, acc) for arm in arms for acc in arm.metric("acc_last").values()]
    shift = ScaledTranslation(0.04 * (number - 1), 0, figure.dpi_scale_trans)
    look = series(number) | {"marker": ".", "linestyle": "", "markersize": 3, "alpha": 0.6}
    axes.plot(*zip(*points, strict=True), **look, transform=axes.transData + shift)


def gradient_ratios(comparison: Comparison) -> PlotGroup:
    """Gradient norm of the transfer loss over that of the class loss: a plot a granularity, a line a loss."""
    arms = [arm for arm in comparison.experiment.arms if arm.granularity and ratios_of(arm)]
    ratios = [ratio for arm in arms for ratio in ratios_of(arm)]
    y_limits = (min([*ratios, 0.5]) / 2, max([*ratios, 2.0]) * 2)
    return PlotGroup(
        "Gradient norms of the two losses",
        "Gradient norm of the transfer loss over that of the class loss, both weighted:"
        " (1 − alpha)·‖∇L_transfer‖ / (alpha·‖∇L_class‖) for constant weighting, on a log scale. Above 1 the"
        " transfer loss dominates, below 1 the class loss. The value of a run is its median over training;"
        " lines are geometric means over seeds, bands their range.",
        [
            render(f"gradient-norm ratio over alpha, {title}", draw_ratios, title, lines, y_limits)
            for title, lines in lines_by_title(arms).items()
        ],
    )


def ratios_of(arm: Arm) -> list[float]:
    """The median gradient ratio of each run that measured it."""
    return [ratio for run in arm.runs.values() if (ratio := median_ratio(run.curves)) is not None]


def draw_ratios(figure: Figure, title: str, lines: Mapping[str, list[Arm]], y_limits: tuple) -> None:
    """One line and band a loss."""
    axes = new_axes(figure, ALPHA_LABEL, "gradient-norm ratio", shortened(title))
    alpha_axis(axes, [arm.alpha for line in lines.values() for arm in line])
    axes.set_yscale("log")
    axes.axhline(1, color=INK, linewidth=0.8)
    for number, (loss, line) in enumerate(lines.items()):
        ratios = [(arm.alpha, ratios_of(arm)) for arm in line]
        if points := [(alpha, min(rs), float(stats.gmean(rs)), max(rs)) for alpha, rs in ratios]:
            draw_line(axes, points, loss, number)
    axes.set_ylim(*y_limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    legend_below(figure, axes)
