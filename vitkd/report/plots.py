"""The pictures of an experiment: gains, accuracy over alpha, the grid, curves, scales of losses, fidelity."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from scipy import stats

from vitkd.report.arms import ALONE, Arm, Experiment
from vitkd.report.comparison import Comparison, Row
from vitkd.report.curves import Reader, band, last, typical_ratio
from vitkd.report.drawing import (
    BAD,
    DECADES,
    GOOD,
    INK,
    MARKERS,
    QUIET,
    SERIES,
    STYLE,
    WIDTH,
    Plate,
    alpha_axis,
    legend_below,
    limits,
    new_axes,
    picture,
    ramp,
    readable_on,
    shortened,
    wrapped,
)
from vitkd.report.runs import Run
from vitkd.report.statistics import Summary
from vitkd.report.verdicts import Kind, signed

DIVERGING = "coolwarm_r"
"""Moreland 2009: evenly perceived from red, a loss, over grey, none, to blue, a gain."""

UNITS = {
    "mse": "mean squared difference of scores",
    "ce": "cross-entropy, nats a row",
    "kl": "KL(teacher ‖ student), nats a row",
    "reverse_kl": "KL(student ‖ teacher), nats a row",
    "js": "Jensen–Shannon divergence, nats a row",
}
MOST_BARS = 60


def plates(comparison: Comparison, read: Reader) -> list[Plate]:
    """All pictures of an experiment that its runs have anything to show for."""
    experiment = comparison.experiment
    with matplotlib.rc_context(STYLE):
        if len(comparison.rows) == 1:
            return [plate for plate in (learning_curves(experiment, read),) if plate.pictures]
        found = [
            gains(comparison),
            accuracy_over_alpha(comparison),
            heat_map(comparison),
            learning_curves(experiment, read),
            loss_scales(experiment, read),
            fidelity(experiment, read),
        ]
    return [plate for plate in found if plate.pictures]


def gains(comparison: Comparison) -> Plate:
    """Every arm's gain with its interval, one below the other."""
    rows = [row for row in comparison.rows if row.gain and row.gain.difference.mean is not None]
    parts = [rows[start : start + MOST_BARS] for start in range(0, len(rows), MOST_BARS)]
    return Plate(
        "Gain of every arm",
        "Gain over the student alone at the last epoch, paired by seed: mean and 95 % interval (Student's t;"
        " cut off at the frame), none for one seed; small dots are single seeds. Filled dots are real, or"
        " hurt, after Holm's correction."
        f" {of_runs(comparison.experiment)}",
        [picture("gain of every arm with its 95 % interval", bars, part) for part in parts],
    )


def bars(figure: Figure, rows: Sequence[Row]) -> None:
    """Dots and whiskers, one row each."""
    lines = sum(1 + wrapped(row.arm.label).count("\n") for row in rows)
    figure.set_size_inches(WIDTH, 0.75 + 0.12 * (len(rows) + lines))
    axes = new_axes(figure, "gain, percentage points", "")
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=INK, linewidth=0.8)
    seen: list[float] = []
    for place, row in enumerate(rows):
        assert row.gain is not None
        difference, colour = (
            row.gain.difference,
            {Kind.REAL: GOOD, Kind.HURTS: BAD}.get(row.verdict.kind, QUIET),
        )
        singles = row.gain.differences
        seen += singles
        if difference.interval:
            axes.plot(difference.interval, (place, place), color=colour, solid_capstyle="butt")
        axes.plot(singles, [place] * len(singles), ".", color=colour, markersize=3, alpha=0.55)
        filled = colour if colour != QUIET else "none"
        axes.plot(mean_of(difference), place, "o", color=colour, markerfacecolor=filled, markersize=5.5)
    axes.set_xlim(*limits([*seen, 0.0], 0.35))
    axes.set_yticks(range(len(rows)), [wrapped(row.arm.label) for row in rows], linespacing=0.95)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def accuracy_over_alpha(comparison: Comparison) -> Plate:
    """One picture a granularity, one line a loss, the student alone behind them."""
    rows = [row for row in comparison.rows if row.arm.granularity and not row.arm.is_baseline]
    alone = next((row for row in comparison.rows if row.arm.is_baseline), None)
    losses = sorted({row.arm.loss for row in rows})
    shared = limits(
        [
            value
            for row in [*rows, *([alone] if alone else [])]
            for value in row.arm.figures("acc_last").values()
        ]
    )
    pictures = []
    for (granularity, also), members in facets(rows, lambda row: (row.arm.granularity, row.arm.also)).items():
        title = f"{granularity}, {also}" if also else granularity
        if also and len({row.arm.alpha for row in members}) == 1:
            continue  # one point makes no line; it stands among the gains

        def draw(figure: Figure, members: list[Row] = members, title: str = title) -> None:
            axes = new_axes(figure, "alpha (weight of the class loss)", "test accuracy, %", shortened(title))
            place = alpha_axis(
                axes, [row.arm.alpha for row in members if row.arm.alpha is not None], alone is not None
            )
            if alone:
                draw_alone(axes, alone.last)
            for loss in losses:
                own = [row for row in members if row.arm.loss == loss]
                draw_over_alpha(axes, own, alone, place, losses.index(loss), len(losses))
            axes.set_ylim(*shared)
            legend_below(figure, axes)

        pictures.append(picture(f"test accuracy over alpha, {title}", draw))
    return Plate(
        "Accuracy over alpha",
        "Test accuracy of the last epoch: lines are means over seeds, bands 95 % intervals of the mean"
        f" (Student's t; cut off at the frame), dots single runs; grey is the {ALONE} (alpha = 1)."
        f" {of_runs(comparison.experiment)}",
        pictures,
    )


def draw_alone(axes: Axes, summary: Summary) -> None:
    """The baseline as a level with a band."""
    axes.axhline(mean_of(summary), color=QUIET, linestyle=(0, (4, 2)), linewidth=1.2, label=ALONE)
    if summary.interval:
        axes.axhspan(*summary.interval, color=QUIET, alpha=0.16, linewidth=0)


def draw_over_alpha(
    axes: Axes, rows: Sequence[Row], alone: Row | None, place: Callable[[float], float], number: int, of: int
) -> None:
    """The line, band and dots of loss `number` of several; it ends in the student alone, which alpha=1 is."""
    if not rows:
        return
    colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
    # Beside each other, lest the dots of one loss hide those of another.
    ticks = axes.get_xticks()
    shift = 0.012 * float(max(ticks) - min(ticks)) * (number - (of - 1) / 2)
    points = [(place(row.arm.alpha) + shift, row) for row in rows if row.arm.alpha is not None]
    at, summaries = [x for x, _ in points], [row.last for _, row in points]
    if alone:
        at.append(place(1.0))
        summaries.append(alone.last)
    axes.plot(
        at, [mean_of(summary) for summary in summaries], marker=marker, color=colour, label=rows[0].arm.loss
    )
    lows, highs = zip(*(s.interval or (mean_of(s), mean_of(s)) for s in summaries), strict=True)
    axes.fill_between(at, lows, highs, color=colour, alpha=0.14, linewidth=0)
    for x, row in points:
        values = [*row.arm.figures("acc_last").values()]
        axes.plot([x] * len(values), values, ".", color=colour, markersize=3, alpha=0.6)


def heat_map(comparison: Comparison) -> Plate:
    """The grid: what is learned × alpha, coloured by gain."""
    cells = {
        (row.arm.kind, row.arm.alpha): row
        for row in comparison.rows
        if row.arm.granularity and row.arm.alpha is not None and row.gain and row.gain.seeds
    }
    return Plate(
        "Heat map of the grid",
        "Mean gain over the student alone at the last epoch, paired by seed; blue is better, red worse,"
        " grey no difference. * and bold: real, or hurts, after Holm's correction; all others may be chance."
        f" {of_runs(comparison.experiment)}",
        [picture("gain by granularity, loss and alpha", coloured, cells)] if cells else [],
    )


def coloured(figure: Figure, cells: Mapping[tuple[str, float], Row]) -> None:
    """One coloured field a cell, its gain written in it."""
    kinds, alphas = list(dict.fromkeys(kind for kind, _ in cells)), sorted({alpha for _, alpha in cells})
    gained = {cell: mean_of(row.gain.difference) for cell, row in cells.items() if row.gain}
    values = [[gained.get((kind, alpha), np.nan) for alpha in alphas] for kind in kinds]
    largest = max(0.01, *map(abs, gained.values()))
    scale, colours = TwoSlopeNorm(0, -largest, largest), matplotlib.colormaps[DIVERGING]

    figure.set_size_inches(WIDTH, 1.15 + 0.36 * len(kinds))
    axes = new_axes(figure, "alpha (weight of the class loss)", "")
    axes.grid(visible=False)
    fields = axes.pcolormesh(np.array(values), cmap=colours, norm=scale)
    for (kind, alpha), row in cells.items():
        gain = gained[kind, alpha]
        is_sure = row.verdict.kind in (Kind.REAL, Kind.HURTS)
        one_seed = "\n1 seed" if row.last.n == 1 else ""
        axes.text(
            alphas.index(alpha) + 0.5,
            kinds.index(kind) + 0.5,
            f"{signed(gain)}{' *' if is_sure else ''}{one_seed}",
            ha="center",
            va="center",
            size=8,
            weight="bold" if is_sure else "normal",
            color=readable_on(colours(scale(gain))),
        )
    axes.set_xticks(np.arange(len(alphas)) + 0.5, [f"{alpha:g}" for alpha in alphas])
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [shortened(kind) for kind in kinds])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(fields, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("gain, percentage points", color=INK)
    bar.ax.tick_params(colors=INK, length=2)
    bar.outline.set_visible(False)


def learning_curves(experiment: Experiment, read: Reader) -> Plate:
    """One picture for what is learned, one line an alpha, the student alone behind them."""
    alone = (
        band([read(run).validation for run in experiment.baseline.runs.values()])
        if experiment.baseline
        else None
    )
    alphas = sorted({arm.alpha for arm in experiment.arms if arm.alpha is not None})
    pictures = []
    for kind, arms in facets(experiment.arms or experiment.rows, lambda arm: arm.kind).items():
        bands = [(arm, band([read(run).validation for run in arm.runs.values()])) for arm in arms]
        if not any(found for _, found in bands):
            continue

        def draw(figure: Figure, bands: list = bands, kind: str = kind) -> None:
            axes = new_axes(figure, "epoch", "validation accuracy, %", shortened(kind))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            length = steps_an_epoch(experiment)
            if length is None:
                axes.set_xlabel("step")
            for arm, found in [(None, alone), *bands]:
                if found is None:
                    continue
                colour = (
                    QUIET if arm is None or arm.alpha is None else ramp(alphas.index(arm.alpha), len(alphas))
                )
                name = ALONE if arm is None or arm.is_baseline else f"alpha {arm.alpha:g}"
                at = found.steps / (length or 1)
                line = (0, (4, 2)) if colour == QUIET else "-"
                axes.plot(at, found.mean, color=colour, linestyle=line, label=name)
                low, high = found.mean - found.std, found.mean + found.std
                axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
            legend_below(figure, axes)

        pictures.append(picture(f"learning curves, {kind}", draw))
    return Plate(
        "Learning curves",
        "Accuracy on the validation images after each epoch: mean over seeds, band ± one standard deviation."
        f" {of_runs(experiment)}",
        pictures,
    )


def steps_an_epoch(experiment: Experiment) -> float | None:
    """Optimiser steps in an epoch, as the runs counted them."""
    for arm in experiment.rows:
        for run in arm.runs.values():
            if run.epochs and run.steps:
                return run.steps / run.epochs
    return None


def loss_scales(experiment: Experiment, read: Reader) -> Plate:
    """How hard the attention loss pulls beside the class loss, over alpha."""
    found: dict[tuple[str, str], dict[str, list[tuple[float, list[float]]]]] = {}
    for arm in experiment.arms:
        ratios = [ratio for run in arm.runs.values() if (ratio := typical_ratio(read(run))) is not None]
        if ratios and arm.granularity and arm.alpha is not None:
            facet = found.setdefault((arm.granularity, arm.also), {})
            facet.setdefault(arm.loss, []).append((arm.alpha, ratios))
    losses = sorted({loss for lines in found.values() for loss in lines})
    every = [ratio for lines in found.values() for line in lines.values() for _, rs in line for ratio in rs]
    pictures = []
    for (granularity, also), lines in found.items():
        title = f"{granularity}, {also}" if also else granularity

        def draw(figure: Figure, lines: Mapping = lines, title: str = title) -> None:
            axes = new_axes(
                figure, "alpha (weight of the class loss)", "gradient-norm ratio", shortened(title)
            )
            place = alpha_axis(axes, [alpha for line in lines.values() for alpha, _ in line])
            axes.set_yscale("log")
            axes.axhline(1, color=INK, linewidth=0.8)
            for loss in losses:
                line = sorted(lines.get(loss, []))
                at = [place(alpha) for alpha, _ in line]
                number = losses.index(loss)
                colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
                means = [float(stats.gmean(ratios)) for _, ratios in line]
                axes.plot(at, means, marker=marker, color=colour, label=loss)
                lows, highs = [min(ratios) for _, ratios in line], [max(ratios) for _, ratios in line]
                axes.fill_between(at, lows, highs, color=colour, alpha=0.18, linewidth=0)
            low, high = min(*every, 0.5), max(*every, 2.0)
            axes.set_ylim(low / 2, high * 2)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            legend_below(figure, axes)

        pictures.append(picture(f"gradient-norm ratio over alpha, {title}", draw))
    return Plate(
        "Scale of the two losses",
        "Norm of the attention loss's gradient over that of the class loss's, each with its weight:"
        " (1 − alpha)·‖∇L_att‖ / (alpha·‖∇L_class‖), on log scale. Above the line at 1 attention pulls"
        " harder, below it the labels. Each run counts with its median over training; lines are geometric"
        " means over seeds, bands their range."
        f" {of_runs(experiment)}",
        pictures,
    )


class Unit(NamedTuple):
    """What a picture of fidelity has on its axes."""

    title: str
    label: str
    """of the distance"""
    epoch: str
    """of both axes: best | last"""


class Dot(NamedTuple):
    """One run in the plane of fidelity and accuracy."""

    x: float
    accuracy: float
    name: str
    """what was learned"""
    is_hollow: bool
    """trained on labels alone"""


def fidelity(experiment: Experiment, read: Reader) -> Plate:
    """One dot a run: how alike the attention is, and how accurate the student; one picture a unit."""
    by_unit: dict[Unit, list[Dot]] = {}
    named = [(run, taught(arm)) for arm in experiment.arms for run in arm.runs.values()]
    for run, name in named + [(run, run.granularity or "") for run in experiment.baselines]:
        for unit, x, accuracy in measured(run, read):
            by_unit.setdefault(unit, []).append(Dot(x, accuracy, name, run.is_student_alone))
    names = sorted({dot.name for dots in by_unit.values() for dot in dots})
    return Plate(
        "Attention fidelity against accuracy",
        "One dot a run: further left, attention is nearer to what the axis names. An attention loss is the"
        " distance from what the arm was taught, in a control arm something else than its teacher's maps; the"
        " divergence measured by vitkd.explain is always the distance from the maps of the run's teacher, or"
        " of the one named there. Attention and accuracy are of the epoch on the axes."
        " Hollow dots trained on labels alone: their attention is as it came. Each loss has a unit, and so a"
        " picture, of its own; a correlation over runs that differ in alpha is no effect of attention alone."
        f" From all runs beside a teacher: {experiment.title}.",
        [
            picture(
                f"attention fidelity against test accuracy, {unit.title}, {unit.epoch} epoch",
                scattered,
                unit,
                dots,
                names,
            )
            for unit, dots in sorted(by_unit.items())
        ],
    )


def measured(run: Run, read: Reader) -> Iterator[tuple[Unit, float, float]]:
    """How far a run's attention lies off, with its accuracy then: by its loss, and as it was explained."""
    at_last = last(read(run).transfer) if run.method == "attention" else None
    if at_last is not None and run.acc_last is not None:
        what = UNITS.get(run.loss or "", f"in the unit of {run.loss}")
        label = f"attention loss on validation images, last epoch:\n{what}"
        yield Unit(f"loss {run.loss}", label, "last"), at_last, run.acc_last
    if run.fidelity is not None:
        divergence, epoch = run.fidelity
        accuracy = run.acc_best if epoch == "best" else run.acc_last
        label = (
            f"divergence from the teacher's maps, {epoch} epoch:\nJensen–Shannon, nats a row (vitkd.explain)"
        )
        if accuracy is not None:
            yield Unit("all losses", label, epoch), divergence, accuracy


def taught(arm: Arm) -> str:
    """What an arm's students learn, whatever the loss of attention and alpha."""
    return ", ".join(part for part in (arm.granularity or arm.what, arm.also) if part)


def scattered(figure: Figure, unit: Unit, dots: Sequence[Dot], names: Sequence[str]) -> None:
    """The dots, one colour and shape a name."""
    axes = new_axes(
        figure,
        unit.label,
        f"test accuracy, %\n({unit.epoch} epoch)",
        f"{unit.title}: {correlation(dots)}",
    )
    for number, name in enumerate(names):
        for is_hollow in (True, False):
            own = [(dot.x, dot.accuracy) for dot in dots if dot.name == name and dot.is_hollow == is_hollow]
            axes.plot(
                [x for x, _ in own],
                [y for _, y in own],
                MARKERS[number % len(MARKERS)],
                color=SERIES[number % len(SERIES)],
                markerfacecolor="none" if is_hollow else SERIES[number % len(SERIES)],
                alpha=0.8,
                label="" if is_hollow else name,
            )
    lowest, highest = min(dot.x for dot in dots), max(dot.x for dot in dots)
    if lowest > 0 and highest / lowest > DECADES:
        axes.set_xscale("log")
        axes.set_xlabel(f"{unit.label} (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend_below(figure, axes)


def correlation(dots: Sequence[Dot]) -> str:
    """Spearman's ρ between distance and accuracy, and of how many runs."""
    xs, ys = [dot.x for dot in dots], [dot.accuracy for dot in dots]
    if len(dots) < 3 or len({*xs}) == 1 or len({*ys}) == 1:
        return f"{len(dots)} runs" if len(dots) != 1 else "1 run"
    return f"Spearman ρ = {signed(float(stats.spearmanr(xs, ys).statistic))}, {len(dots)} runs"


def of_runs(experiment: Experiment) -> str:
    """Which runs a picture shows."""
    runs = sum(len(arm.runs) for arm in experiment.rows)
    return f"From {runs} runs: {experiment.title}."


def mean_of(summary: Summary) -> float:
    """The mean of a figure that every finished run has."""
    assert summary.mean is not None
    return summary.mean


def facets(members: Iterable, key: Callable) -> dict:
    """Members by key, in order."""
    found: dict = {}
    for member in members:
        found.setdefault(key(member), []).append(member)
    return found
