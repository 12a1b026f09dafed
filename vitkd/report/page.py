"""The report as one HTML page without scripts, fonts or requests."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex

from vitkd.report.comparison import Comparison
from vitkd.report.figures import plot_groups
from vitkd.report.figures.colours import RAMP
from vitkd.report.notes import CONTROLS_CAPTION, CONTROLS_HEADING, READING, notes_on, teacher_lines
from vitkd.report.runs import Run
from vitkd.report.settings import format_settings
from vitkd.report.tables import CONTRASTS, detail_columns, main_columns

# The parts of viridis that contrast with white and with black.
ON_LIGHT, ON_DARK = (0.0, 0.82), (0.32, 1.0)


def page(comparisons: Sequence[Comparison], runs: Sequence[Run], remarks: Sequence[str]) -> str:
    """The page; the same runs give the same page, byte for byte."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("vitkd.report").joinpath("page.html").read_text("utf-8"))
    return template.render(
        sections=[section(comparison) for comparison in comparisons],
        teachers=teacher_lines(runs),
        runs=[run for run in runs if not run.is_teacher],
        remarks=remarks,
        reading=READING,
        controls_heading=CONTROLS_HEADING,
        controls_caption=CONTROLS_CAPTION,
        contrast_columns=CONTRASTS,
        light=ramp_colours(*ON_LIGHT),
        dark=ramp_colours(*ON_DARK),
    )


def section(comparison: Comparison) -> dict[str, Any]:
    """What the template needs of one experiment."""
    return {
        "title": comparison.experiment.title,
        "headline": comparison.headline,
        "columns": main_columns(comparison),
        "details": detail_columns(comparison),
        "rows": comparison.rows,
        "contrasts": comparison.contrasts,
        "notes": notes_on(comparison),
        "settings": format_settings(comparison.experiment.settings),
        "plot_groups": [
            group._replace(plots=[plot._replace(svg=Markup(plot.svg)) for plot in group.plots])
            for group in plot_groups(comparison)
        ],
    }


def ramp_colours(low: float, high: float) -> list[str]:
    """The colours of ordered lines, evenly spaced on a part of viridis."""
    colours = matplotlib.colormaps["viridis"]
    steps = len(RAMP) - 1
    return [to_hex(colours(low + (high - low) * place / steps)) for place in range(len(RAMP))]
