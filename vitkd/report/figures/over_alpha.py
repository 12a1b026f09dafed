"""Test accuracy, and the ratio of the two losses' gradients, over alpha."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from scipy import stats

from vitkd.report.arms import ALONE, Arm
from vitkd.report.comparison import Comparison, Row
from vitkd.report.curves import median_ratio
from vitkd.report.figures.colours import INK, QUIET, series
from vitkd.report.figures.drawing import (
    ALPHA_LABEL,
    PlotGroup,
    alpha_axis,
    group_by,
    legend_below,
    limits,
    new_axes,
    render,
    shortened,
)
from vitkd.report.settings import CONSTANT
from vitkd.report.statistics import Summary


def accuracy_over_alpha(comparison: Comparison) -> PlotGroup:
    """One plot a granularity, one line a loss, and the student alone."""
    rows = [row for row in comparison.rows if row.arm.granularity]
    alone = next((row for row in comparison.rows if row.arm.is_baseline), None)
    losses = sorted({row.arm.loss for row in rows})
    shown = [*rows, *([alone] if alone else [])]
    y_limits = limits([acc for row in shown for acc in row.arm.metric("acc_last").values()])
    plots = [
        render(f"test accuracy over alpha, {title}", draw_accuracy, title, members, alone, losses, y_limits)
        for title, members in group_by(rows, lambda row: title_of(row.arm)).items()
        # One alpha makes no line; the plot of all gains has it.
        if not members[0].arm.extra or len({row.arm.alpha for row in members}) > 1
    ]
    return PlotGroup(
        "Accuracy over alpha",
        "Test accuracy of the last epoch: lines are means over seeds, bands 95 % intervals of the mean"
        f" (Student's t; may extend beyond the frame), dots single runs; grey is the {ALONE}, which alpha = 1"
        " equals with constant weighting.",
        plots,
    )


def title_of(arm: Arm) -> str:
    """Of the plot that shows the arm."""
    return f"{arm.granularity}, {arm.extra_text}" if arm.extra else arm.granularity


def draw_accuracy(
    figure: Figure,
    title: str,
    rows: Sequence[Row],
    alone: Row | None,
    losses: Sequence[str],
    y_limits: tuple[float, float],
) -> None:
    """One line a loss, which ends in the student alone if that is what alpha = 1 trains."""
    axes = new_axes(figure, ALPHA_LABEL, "test accuracy, %", shortened(title))
    points = [(row.arm.alpha, row) for row in rows if row.arm.alpha is not None]
    ends = [(1.0, alone)] if alone and rows[0].arm.weighting == CONSTANT else []
    position = alpha_axis(axes, [alpha for alpha, _ in points + ends])
    if alone:
        draw_level(axes, alone.last)
    left, right = axes.get_xticks()[[0, -1]]
    for number, loss in enumerate(losses):
        # Lines are shifted so that the dots of one do not hide those of another.
        shift = 0.012 * (right - left) * (number - (len(losses) - 1) / 2)
        line = [(position(alpha) + shift, row) for alpha, row in points if row.arm.loss == loss]
        if line:
            draw_line(axes, [*line, *((position(1.0), row) for _, row in ends)], loss, number)
    axes.set_ylim(*y_limits)
    legend_below(figure, axes)


def draw_level(axes: Axes, summary: Summary) -> None:
    """The student alone: a horizontal line with a band."""
    axes.axhline(mean_of(summary), color=QUIET, linestyle=(0, (4, 2)), linewidth=1.2, label=ALONE)
    if summary.interval:
        axes.axhspan(*summary.interval, color=QUIET, alpha=0.16, linewidth=0)


def draw_line(axes: Axes, points: Sequence[tuple[float, Row]], loss: str, number: int) -> None:
    """The line, band and dots of one loss."""
    look, at = series(number), [x for x, _ in points]
    summaries = [row.last for _, row in points]
    axes.plot(at, [mean_of(summary) for summary in summaries], **look, label=loss)
    lows, highs = zip(*(s.interval or (mean_of(s), mean_of(s)) for s in summaries), strict=True)
    axes.fill_between(at, lows, highs, color=look["color"], alpha=0.14, linewidth=0)
    for x, row in points:
        values = [] if row.arm.is_baseline else [*row.arm.metric("acc_last").values()]
        axes.plot([x] * len(values), values, ".", color=look["color"], markersize=3, alpha=0.6)


def gradient_ratios(comparison: Comparison) -> PlotGroup:
    """The gradient of the transfer loss over that of the class loss: a plot a granularity, a line a loss."""
    ratios = {
        arm.label: (arm, found)
        for arm in comparison.experiment.arms
        if arm.granularity and arm.alpha is not None and (found := ratios_of(arm))
    }
    losses = sorted({arm.loss for arm, _ in ratios.values()})
    every = [ratio for _, found in ratios.values() for ratio in found]
    y_limits = (min([*every, 0.5]) / 2, max([*every, 2.0]) * 2)
    return PlotGroup(
        "Gradient norms of the two losses",
        "Gradient norm of the transfer loss over that of the class loss, both weighted:"
        " (1 − alpha)·‖∇L_transfer‖ / (alpha·‖∇L_class‖) for constant weighting, on a log scale. Above 1 the"
        " transfer loss dominates, below 1 the class loss. The value of a run is its median over training;"
        " lines are geometric means over seeds, bands their range.",
        [
            render(f"gradient-norm ratio over alpha, {title}", draw_ratios, title, members, losses, y_limits)
            for title, members in group_by(ratios.values(), lambda pair: title_of(pair[0])).items()
        ],
    )


def ratios_of(arm: Arm) -> list[float]:
    """The median gradient ratio of each run that measured it."""
    return [ratio for run in arm.runs.values() if (ratio := median_ratio(run.curves)) is not None]


def draw_ratios(
    figure: Figure,
    title: str,
    pairs: Sequence[tuple[Arm, list[float]]],
    losses: Sequence[str],
    y_limits: tuple[float, float],
) -> None:
    """One line and band a loss."""
    axes = new_axes(figure, ALPHA_LABEL, "gradient-norm ratio", shortened(title))
    points = sorted((arm.alpha, arm.loss, ratios) for arm, ratios in pairs if arm.alpha is not None)
    position = alpha_axis(axes, [alpha for alpha, *_ in points])
    axes.set_yscale("log")
    axes.axhline(1, color=INK, linewidth=0.8)
    for number, loss in enumerate(losses):
        line = {position(alpha): ratios for alpha, of, ratios in points if of == loss}
        draw_range(axes, line, loss, number)
    axes.set_ylim(*y_limits)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    legend_below(figure, axes)


def draw_range(axes: Axes, line: Mapping[float, Sequence[float]], loss: str, number: int) -> None:
    """The geometric means of positive values, and their range as a band."""
    look, at = series(number), [*line]
    axes.plot(at, [float(stats.gmean(ratios)) for ratios in line.values()], **look, label=loss)
    lows, highs = [min(ratios) for ratios in line.values()], [max(ratios) for ratios in line.values()]
    axes.fill_between(at, lows, highs, color=look["color"], alpha=0.18, linewidth=0)


def mean_of(summary: Summary) -> float:
    """Of a metric that every finished run has."""
    assert summary.mean is not None
    return summary.mean
