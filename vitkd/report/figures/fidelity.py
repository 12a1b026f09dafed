"""Attention fidelity against test accuracy, one dot a run."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from scipy import stats

from vitkd.report.comparison import Comparison
from vitkd.report.experiments import Experiment
from vitkd.report.figures.plots import DECADES, PlotGroup, new_axes, render, series
from vitkd.report.formatting import count, signed
from vitkd.report.parsing import last
from vitkd.report.runs import Run

LOSS_UNITS = {
    "mse": "mean squared difference of scores",
    "ce": "cross-entropy, nats a row",
    "kl": "KL(teacher ‖ student), nats a row",
    "reverse_kl": "KL(student ‖ teacher), nats a row",
    "js": "Jensen–Shannon divergence, nats a row",
}


class Distance(NamedTuple):
    """What the x axis of a plot shows."""

    title: str
    axis_label: str
    epoch: str
    """of distance and accuracy: best | last"""


class Dot(NamedTuple):
    """One run."""

    distance: float
    accuracy: float
    label: str
    """what it learned from"""
    is_hollow: bool
    """whether it learned from labels alone"""


def fidelity(comparison: Comparison) -> PlotGroup:
    """One plot for each distance: distances in different units share no axis."""
    dots = dots_of(comparison.experiment)
    labels = sorted({dot.label for of_distance in dots.values() for dot in of_distance})
    return PlotGroup(
        "Attention fidelity against accuracy",
        "One dot a run; attention is closer to its target further left. An attention loss is the distance"
        " from the arm's own target, which in a control arm is not the teacher's maps; the divergence"
        " measured by vitkd.explain is always the distance from the maps of the run's teacher, or of the one"
        " chosen there. Attention and accuracy are of the epoch on the axes. Hollow dots learned from labels"
        " alone. The runs differ in alpha too, so a correlation does not show an effect of attention.",
        [
            render(
                f"attention fidelity against test accuracy, {distance.title}, {distance.epoch} epoch",
                *(draw_dots, distance, of_distance, labels),
            )
            for distance, of_distance in dots.items()
        ],
    )


def dots_of(experiment: Experiment) -> dict[Distance, list[Dot]]:
    """A dot for each run and distance, by distance."""
    dots: dict[Distance, list[Dot]] = {}
    labelled = [(run, run.granularity or "") for run in experiment.alone]
    for arm in experiment.arms:
        label = ", ".join(filter(None, (arm.granularity or arm.objective, arm.extra_text)))
        labelled += [(run, label) for run in arm.runs.values()]
    for run, label in labelled:
        for distance, value, accuracy in distances_of(run):
            dots.setdefault(distance, []).append(Dot(value, accuracy, label, run.is_student_alone))
    return dict(sorted(dots.items()))


def distances_of(run: Run) -> Iterator[tuple[Distance, float, float]]:
    """The distances known of a run, each with its test accuracy at the same epoch."""
    value = last(run.curves.transfer) if run.method == "attention" else None
    if value is not None and run.acc_last is not None:
        unit = LOSS_UNITS.get(run.loss or "", f"in the unit of {run.loss}")
        label = f"attention loss on validation images, last epoch:\n{unit}"
        yield Distance(f"loss {run.loss}", label, "last"), value, run.acc_last
    if run.fidelity is not None:
        divergence, epoch = run.fidelity
        accuracy = run.acc_best if epoch == "best" else run.acc_last
        label = (
            f"divergence from the teacher's maps, {epoch} epoch:\nJensen–Shannon, nats a row (vitkd.explain)"
        )
        if accuracy is not None:
            yield Distance("all losses", label, epoch), divergence, accuracy


def draw_dots(figure: Figure, distance: Distance, dots: Sequence[Dot], labels: Sequence[str]) -> None:
    """One colour and marker for each label."""
    title = f"{distance.title}: {correlation(dots)}"
    axes = new_axes(figure, distance.axis_label, f"test accuracy, %\n({distance.epoch} epoch)", title)
    for number, label in enumerate(labels):
        look = series(number) | {"linestyle": "", "alpha": 0.8}
        for is_hollow in (True, False):
            own = [dot for dot in dots if dot.label == label and dot.is_hollow == is_hollow]
            at, accuracies = [dot.distance for dot in own], [dot.accuracy for dot in own]
            look |= {"markerfacecolor": "none"} if is_hollow else {"markerfacecolor": None, "label": label}
            axes.plot(at, accuracies, **look)
    lowest, highest = min(dot.distance for dot in dots), max(dot.distance for dot in dots)
    if lowest > 0 and highest / lowest > DECADES:
        axes.set_xscale("log")
        axes.set_xlabel(f"{distance.axis_label} (log scale)")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def correlation(dots: Sequence[Dot]) -> str:
    """Spearman's ρ between distance and accuracy, and the number of runs."""
    xs, ys = [dot.distance for dot in dots], [dot.accuracy for dot in dots]
    if len(dots) < 3 or len({*xs}) == 1 or len({*ys}) == 1:
        return count(len(dots), "run")
    return f"Spearman ρ = {signed(float(stats.spearmanr(xs, ys).statistic))}, {len(dots)} runs"
