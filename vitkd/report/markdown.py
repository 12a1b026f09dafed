"""The report as Markdown."""

from collections.abc import Iterable, Sequence

from vitkd.report.comparison import Comparison, Contrast, Row
from vitkd.report.notes import CONTROLS_CAPTION, CONTROLS_HEADING, READING, notes_on
from vitkd.report.tables import CONTRASTS, Column, detail_columns, main_columns

SPECIAL = "\\|*_<`["


def markdown(comparisons: Sequence[Comparison], teachers: Sequence[str], remarks: Sequence[str]) -> str:
    """The whole report as one Markdown page."""
    lines = ["# Report", "", "Accuracies and agreements in percent, gains in percentage points.", ""]
    for comparison in comparisons:
        lines += section(comparison)
    lines += list_section("Teachers", map(escape, teachers))
    lines += list_section("Runs left out", map(escape, remarks))
    return "\n".join([*lines, *list_section("How to read this", READING)])


def section(comparison: Comparison) -> list[str]:
    """The lines of one experiment."""
    lines = [f"## {escape(comparison.experiment.title)}", "", comparison.headline, ""]
    lines += [*table(main_columns(comparison), comparison.rows), ""]
    lines += [*table(detail_columns(comparison), comparison.rows), ""]
    lines += [*(f"- {escape(note)}" for note in notes_on(comparison)), ""]
    if comparison.contrasts:
        lines += [f"### {CONTROLS_HEADING}", "", CONTROLS_CAPTION, ""]
        lines += [*table(CONTRASTS, comparison.contrasts), ""]
    return lines


def list_section(heading: str, items: Iterable[str]) -> list[str]:
    """The lines of a bulleted list; none without items."""
    bullets = [f"- {item}" for item in items]
    return [f"## {heading}", "", *bullets, ""] if bullets else []


def table(columns: Sequence[Column], rows: Sequence[Row] | Sequence[Contrast]) -> list[str]:
    """The lines of a table."""
    return [
        table_row(column.heading for column in columns),
        table_row("---" if column.is_text else "---:" for column in columns),
        *(table_row(escape(column.cell(row)) for column in columns) for row in rows),
    ]


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text without meaning as Markdown."""
    for character in SPECIAL:
        text = text.replace(character, f"\\{character}")
    return text
