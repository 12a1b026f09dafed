"""The report on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkd.report.comparison import Comparison, Contrast, Row
from vitkd.report.notes import CONTROLS_HEADING, notes_on
from vitkd.report.tables import CONTRASTS, Column, main_columns
from vitkd.report.verdicts import Outcome

COLOURS = {Outcome.REAL: "green", Outcome.HURTS: "red", Outcome.BASELINE: "bold"}

MIN_WIDTH = 130
"""Characters; on a narrower terminal only the essential columns are shown."""


def print_report(
    console: Console, comparisons: Sequence[Comparison], teachers: Sequence[str], remarks: Sequence[str]
) -> None:
    """Print the tables without their details, then one line for each teacher and remark."""
    for comparison in comparisons:
        columns = main_columns(comparison)
        title = Text(f"\n{comparison.experiment.title}", style="bold")
        console.print(title, table_of(columns, comparison.rows, console.width), sep="\n")
        console.print(Text(comparison.headline))
        for note in notes_on(comparison):
            console.print(Text(f"note: {note}"), soft_wrap=True)
        if comparison.contrasts:
            heading = Text(f"\n{CONTROLS_HEADING}", style="bold")
            console.print(heading, table_of(CONTRASTS, comparison.contrasts, console.width), sep="\n")
    console.print("")
    for line in [*(f"teacher: {teacher}" for teacher in teachers), *remarks]:
        console.print(Text(line), soft_wrap=True)


def table_of(columns: Sequence[Column], rows: Sequence[Row] | Sequence[Contrast], width: int) -> Table:
    """One line a row; accuracies in percent."""
    shown = [column for column in columns if column.is_essential or width >= MIN_WIDTH]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in shown:
        is_last = column is shown[-1]
        table.add_column(
            column.heading,
            justify="left" if column.is_text else "right",
            no_wrap=not column.is_text,
            overflow="fold",
            ratio=int(is_last) or None,
        )
    for row in rows:
        *cells, verdict = (Text(column.cell(row)) for column in shown)
        verdict.style = COLOURS.get(row.verdict.outcome, "")
        table.add_row(*cells, verdict)
    return table
