"""The report as one HTML page without scripts, fonts or requests, and as Markdown."""

import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.colors import to_hex

from vitkd.report import notes, tables
from vitkd.report.comparison import Comparison
from vitkd.report.figures.calibration import calibration
from vitkd.report.figures.classes import class_gains
from vitkd.report.figures.fidelity import fidelity
from vitkd.report.figures.gains import gains, heat_map
from vitkd.report.figures.lines import accuracy_over_alpha, gradient_ratios, learning_curves
from vitkd.report.figures.plots import RAMP, STYLE, PlotGroup
from vitkd.report.missing import missing_runs
from vitkd.report.runs import Run
from vitkd.report.settings import format_settings

# The parts of viridis that contrast with white and with black.
ON_LIGHT, ON_DARK = (0.0, 0.82), (0.32, 1.0)


def pages(comparisons: Sequence[Comparison], runs: Sequence[Run], remarks: Sequence[str]) -> dict[str, str]:
    """File name → page; the same runs give the same pages, byte for byte."""
    environment = templates()
    tools = {"notes": notes, "tables": tables, "plot_groups": plot_groups, "format_settings": format_settings}
    environment.globals.update(tools, missing_runs=missing_runs)
    content = {
        "comparisons": comparisons,
        "teachers": notes.teacher_lines(runs),
        "runs": [run for run in runs if not run.is_teacher],
        "remarks": remarks,
        "light": ramp_colours(*ON_LIGHT),
        "dark": ramp_colours(*ON_DARK),
    }
    texts = {kind: environment.get_template(f"page.{kind}").render(content) for kind in ("html", "md")}
    return {f"report.{kind}": f"{text.rstrip()}\n" for kind, text in texts.items()}


def templates() -> Environment:
    """The templates of the pages, without what the pages show."""
    environment = Environment(
        loader=PackageLoader("vitkd.report", "."),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["literal"] = literal
    return environment


def markdown_table(comparison: Comparison) -> str:
    """The main table of an experiment, as the Markdown page has it."""
    table = templates().get_template("table.md").module.table  # type: ignore[attr-defined]
    return str(table(tables.main_columns(comparison), comparison.rows)).rstrip()


def plot_groups(comparison: Comparison) -> list[PlotGroup]:
    """All plots for which the runs of an experiment have data."""
    makers = [gains, heat_map, accuracy_over_alpha, class_gains, calibration]
    makers += [learning_curves, gradient_ratios, fidelity]
    if len(comparison.rows) == 1:
        makers = [calibration, learning_curves]
    with matplotlib.rc_context(STYLE):
        groups = [make(comparison) for make in makers]
    runs = sum(len(arm.runs) for arm in comparison.experiment.rows)
    source = f"From {runs} runs: {comparison.experiment.title}."
    return [group._replace(caption=f"{group.caption} {source}") for group in groups if group.plots]


def ramp_colours(low: float, high: float) -> list[str]:
    """The colours of ordered lines, evenly spaced on a part of viridis."""
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(low, high, len(RAMP)))]


def literal(text: str) -> str:
    """Text without meaning as Markdown."""
    return re.sub(r"([\\|*_<`\[])", r"\\\1", text)
