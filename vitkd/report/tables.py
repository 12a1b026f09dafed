"""The tables of the report: their columns, the same in every file, and how the terminal shows them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkd.report.comparison import Comparison, Contrast, Row, control_name
from vitkd.report.formatting import DASH, duration, interval, mean_interval, mean_std, p_text
from vitkd.report.missing import missing_runs
from vitkd.report.notes import CONTROLS_HEADING, notes_on
from vitkd.report.verdicts import Outcome

COLOURS = {Outcome.REAL: "green", Outcome.HURTS: "red", Outcome.BASELINE: "bold"}

MIN_WIDTH = 130
"""Characters; on a narrower terminal only the essential columns are shown."""


class Column(NamedTuple):
    """One column of a table."""

    heading: str
    cell: Callable[[Any], str]
    """of a Row, or of a Contrast"""
    is_text: bool = False
    is_essential: bool = False
    """whether it is shown on a narrow terminal"""


BEST_ON_VAL, BEST_ON_TEST = "best on val", "best on test (optimistic)"

COLUMNS = (
    Column("arm", lambda row: row.arm.label, is_text=True, is_essential=True),
    Column("seeds", lambda row: str(row.last.n), is_essential=True),
    Column("last epoch", lambda row: mean_std(row.last), is_essential=True),
    Column("gain [95 %]", lambda row: mean_interval(row.gain.difference) if row.gain else "", False, True),
    Column("p (Holm)", lambda row: p_text(row.p_holm) if row.gain else ""),
    Column(BEST_ON_VAL, lambda row: mean_std(row.best)),
    Column("agreement", lambda row: mean_std(row.agreement)),
    Column("verdict", lambda row: row.verdict.text, is_text=True, is_essential=True),
)

DETAILS = (
    COLUMNS[0],
    Column("last epoch [95 %]", lambda row: interval(row.last.interval)),
    Column("gain, bootstrap [nominal 95 %]", lambda row: interval(row.gain.bootstrap) if row.gain else ""),
    Column("p, uncorrected", lambda row: p_text(row.gain.p) if row.gain else ""),
    Column("gain at best [95 %]", lambda row: mean_interval(row.gain_best.difference) if row.gain else ""),
    Column("p (Holm) at best", lambda row: p_text(row.p_holm_best) if row.gain else ""),
    Column("top-5", lambda row: mean_std(row.arm.summary("acc_top5"))),
    Column("macro-F1", lambda row: mean_std(row.arm.summary("f1_macro"))),
    Column("ECE", lambda row: mean_std(row.arm.summary("ece"))),
    Column("wall time", lambda row: wall_time(row)),
)

CONTRASTS = (
    Column("attention", lambda contrast: contrast.arm.label, is_text=True, is_essential=True),
    Column("control", lambda c: control_name(c.control, c.arm), is_text=True, is_essential=True),
    Column("seeds", lambda contrast: str(contrast.gain.difference.n)),
    Column("difference [95 %]", lambda contrast: mean_interval(contrast.gain.difference), False, True),
    Column("p (Holm)", lambda contrast: p_text(contrast.p_holm)),
    Column("verdict", lambda contrast: contrast.verdict.text, is_text=True, is_essential=True),
)


def main_columns(comparison: Comparison) -> list[Column]:
    """The columns of the main table that have any content."""
    heading = BEST_ON_TEST if comparison.experiment.validates_on_test else BEST_ON_VAL
    columns = [c._replace(heading=heading) if c.heading == BEST_ON_VAL else c for c in COLUMNS]
    return with_content(columns, comparison.rows)


def with_content(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """The columns with a cell that is neither empty nor a dash."""
    return [column for column in columns if any(column.cell(row).strip(DASH) for row in rows)]


def wall_time(row: Row) -> str:
    """Mean wall time of a run of the arm, marked if students were trained in stacks."""
    time = duration(row.wall_seconds.mean)
    is_stacked = any(run.stacked for run in row.arm.runs.values())
    return f"{time}, stacked" if is_stacked else time


def print_report(
    console: Console, comparisons: Sequence[Comparison], teachers: Sequence[str], remarks: Sequence[str]
) -> None:
    """Print the tables without their details, then one line for each teacher and remark."""
    for comparison in comparisons:
        columns = main_columns(comparison)
        title = Text(f"\n{comparison.experiment.title}", style="bold")
        console.print(title, table_of(columns, comparison.rows, console.width), sep="\n")
        console.print(Text(comparison.headline))
        for what, command in missing_runs(comparison.experiment).items():
            console.print(Text(f"to {what}:\n  {command}"), soft_wrap=True)
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
        table.add_column(
            column.heading,
            justify="left" if column.is_text else "right",
            no_wrap=not column.is_text,
            overflow="fold",
            ratio=1 if column is shown[-1] else None,
        )
    for row in rows:
        *cells, verdict = (Text(column.cell(row)) for column in shown)
        verdict.style = COLOURS.get(row.verdict.outcome, "")
        table.add_row(*cells, verdict)
    return table
