"""The report as one HTML page that needs nothing else: no script, no font, no request."""

from collections.abc import Sequence
from importlib.resources import files

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.colors import to_hex

from vitkd.report.arms import told
from vitkd.report.comparison import Comparison
from vitkd.report.curves import Reader
from vitkd.report.drawing import RAMP
from vitkd.report.plots import plates
from vitkd.report.runs import Run
from vitkd.report.tables import ANSWERS, CONTRASTS, QUESTION, READING, columns_for, notes_of, teacher_lines

# Of viridis, what stands out against white, and against black.
ON_LIGHT, ON_DARK = (0.0, 0.82), (0.32, 1.0)


def page(comparisons: Sequence[Comparison], runs: Sequence[Run], remarks: Sequence[str]) -> str:
    """The page; it depends on the runs alone, so the same runs give the same page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("vitkd.report").joinpath("page.html").read_text("utf-8"))
    read = Reader()
    sections = [
        {
            "title": comparison.experiment.title,
            "headline": comparison.headline,
            "columns": columns_for(comparison, are_narrow=True),
            "rows": comparison.rows,
            "contrasts": comparison.contrasts,
            "notes": notes_of(comparison),
            "setting": told(comparison.experiment.setting),
            "plates": [
                plate._replace(pictures=[p._replace(svg=Markup(p.svg)) for p in plate.pictures])
                for plate in plates(comparison, read)
            ],
        }
        for comparison in comparisons
    ]
    return template.render(
        sections=sections,
        teachers=teacher_lines([run for run in runs if run.is_teacher]),
        runs=[run for run in runs if not run.is_teacher],
        remarks=remarks,
        reading=READING,
        question=QUESTION,
        answers=ANSWERS,
        contrast_columns=CONTRASTS,
        light=ramp_colours(*ON_LIGHT),
        dark=ramp_colours(*ON_DARK),
    )


def ramp_colours(low: float, high: float) -> list[str]:
    """The colours of ordered lines, evenly spaced on a part of viridis."""
    colours = matplotlib.colormaps["viridis"]
    steps = len(RAMP) - 1
    return [to_hex(colours(low + (high - low) * place / steps)) for place in range(len(RAMP))]
