"""The report in figures: on the terminal, as Markdown, CSV and JSON. Accuracies are in percent."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitkd.report.arms import count
from vitkd.report.comparison import Comparison, Contrast, Row
from vitkd.report.controls import name_of
from vitkd.report.runs import Run, run_folders
from vitkd.report.statistics import FEWEST_TO_RESAMPLE, Gain, Interval, Summary
from vitkd.report.verdicts import FEWEST_SEEDS, Kind, digits_of, signed

MINUS, DASH = "−", "–"

COLOURS = {Kind.REAL: "green", Kind.HURTS: "red", Kind.BASELINE: "bold"}

MOST_LINES = 5
"""Of runs in the same state; more are counted."""

WIDE = 130
"""Characters; a narrower terminal is shown the four columns that the verdict stands on."""

READING = (
    "Accuracy is measured on the test split, once a model, as the run left it. The primary comparison is the"
    " last epoch, which nobody chose; the epoch that was best on validation stands beside it.",
    "mean ± standard deviation over seeds; [ ] is the 95 % interval of the mean (Student's t). In a verdict ±"
    " is half that interval.",
    "The gain is paired by seed with the student alone (alpha=1 or method=none, the same training). p is of"
    " the paired t test, two-sided; where all seeds differ by the same amount, of the exact sign-flip test.",
    "p (Holm) is corrected for all arms of the section; comparisons with controls are corrected among"
    " themselves. A gain is called real, or an arm hurtful, where"
    f" p (Holm) is at most 0.05 with {FEWEST_SEEDS} seeds or more; never from one seed.",
    "The number of seeds that would resolve a gap is for the gap observed, itself uncertain: power 0.8,"
    " paired t test at 5 %, uncorrected.",
    f"The bootstrap interval (BCa, 9,999 resamples, seeded) is given from {FEWEST_TO_RESAMPLE} seeds on; with"
    " so few it is too narrow, so verdicts rest on t.",
    "Wall time is a run's own, with validation; stacked runs trained together, in one and the same time.",
    "All this speaks of other seeds with these test images and this teacher, not of other images or of"
    " other teachers.",
)


class Column(NamedTuple):
    """One column of the table for people."""

    heading: str
    cell: Callable[[Any], str]
    """of a Row, or of a Contrast"""
    is_text: bool = False


COLUMNS = (
    Column("granularity", lambda row: row.arm.granularity or row.arm.kind, is_text=True),
    Column("loss", lambda row: row.arm.loss, is_text=True),
    Column("alpha", lambda row: "" if row.arm.alpha is None else f"{row.arm.alpha:g}"),
    Column("and", lambda row: row.arm.also if row.arm.granularity else "", is_text=True),
    Column("seeds", lambda row: str(row.last.n)),
    Column("last epoch", lambda row: mean_std(row.last)),
    Column("gain", lambda row: gain_text(row.gain) if row.gain else ""),
    Column("p (Holm)", lambda row: p_text(row.p_holm) if row.gain else ""),
    Column("verdict", lambda row: row.verdict.words, is_text=True),
    Column("95 % of the mean", lambda row: interval(row.last.interval)),
    Column("95 % of the gain", lambda row: interval(row.gain.difference.interval) if row.gain else ""),
    Column("bootstrap", lambda row: interval(row.gain.bootstrap) if row.gain else ""),
    Column("p", lambda row: p_text(row.gain.p) if row.gain else ""),
    Column("best on val", lambda row: mean_std(row.best)),
    Column("agrees with teacher", lambda row: mean_std(row.agreement)),
    Column("wall time", lambda row: wall_time(row)),
)


QUESTION = "Is it the teacher's pattern?"
ANSWERS = (
    "Attention beside each of its controls at the last epoch, paired by seed. Real: the teacher's own maps"
    " give more than the control does. Hurts: they give less. No evidence: the control may do as well,"
    " whatever each of the two shows beside the student alone."
)
CONTRASTS = (
    Column("attention", lambda found: found.plain.label, is_text=True),
    Column("control", lambda found: name_of(found.control, found.plain), is_text=True),
    Column("seeds", lambda found: str(found.gain.difference.n)),
    Column("difference", lambda found: gain_text(found.gain)),
    Column("95 % of it", lambda found: interval(found.gain.difference.interval)),
    Column("p", lambda found: p_text(found.gain.p)),
    Column("p (Holm)", lambda found: p_text(found.p_holm)),
    Column("verdict", lambda found: found.verdict.words, is_text=True),
)

ARM = Column("arm", lambda row: row.arm.label, is_text=True)
"""Where there is no room for four columns, in place of them."""

WHAT_IS_LEARNT = ("granularity", "loss", "alpha", "and")


def columns_for(comparison: Comparison, *, are_narrow: bool = False) -> list[Column]:
    """The columns that say anything here, named as they are here."""
    kept = [ARM] if are_narrow else []
    for column in COLUMNS:
        if are_narrow and column.heading in WHAT_IS_LEARNT:
            continue
        if not any(column.cell(row).strip(DASH) for row in comparison.rows):
            continue
        if column.heading == "best on val" and comparison.experiment.flatters:
            column = column._replace(heading="best on test (flatters)")
        kept.append(column)
    return kept


def print_report(
    console: Console, comparisons: Sequence[Comparison], teachers: Sequence[Run], remarks: Sequence[str]
) -> None:
    """The tables, narrower than in the files: without intervals of accuracies and uncorrected p."""
    for comparison in comparisons:
        title = Text(comparison.experiment.title, style="bold")
        console.print(
            "", title, terminal_table(comparison, console.width), Text(comparison.headline), sep="\n"
        )
        for note in notes_of(comparison):
            console.print(Text(f"note: {note}"), soft_wrap=True)
        if comparison.contrasts:
            question = Text(f"\n{QUESTION}", style="bold")
            console.print(question, terminal_contrasts(comparison.contrasts, console.width), sep="\n")
    if teachers:
        console.print("")
    for teacher in teachers:
        told = "" if teacher.acc_best is None else f", {teacher.acc_best:.2f} % on the test split"
        console.print(Text(f"teacher: {teacher.path}: {teacher.state}{told}"), soft_wrap=True)
    for remark in remarks:
        console.print(Text(remark), soft_wrap=True)


def terminal_table(comparison: Comparison, width: int) -> Table:
    """One line an arm; accuracies in percent; where `width` is small, less of them."""
    best = "best on test" if comparison.experiment.flatters else "best on val"
    headings = ["arm", "seeds", "last epoch, %", "gain", "p (Holm)", f"{best}, %", "agrees, %", "time"]
    headings = headings if width >= WIDE else headings[:4]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        left = heading == "arm"
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    table.add_column("verdict", overflow="fold", ratio=1)
    for row in comparison.rows:
        style = COLOURS.get(row.verdict.kind, "")
        cells = (
            row.arm.label,
            str(row.last.n),
            mean_std(row.last),
            gain_text(row.gain) if row.gain else "",
            p_text(row.p_holm) if row.gain else "",
            mean_std(row.best),
            mean_std(row.agreement),
            wall_time(row),
        )
        verdict = Text(row.verdict.words, style=style)
        table.add_row(*(Text(cell) for cell in cells[: len(headings)]), verdict)
    return table


def terminal_contrasts(contrasts: Sequence[Contrast], width: int) -> Table:
    """One line a control; where `width` is small, without seeds, interval and p-values."""
    left_out = {"95 % of it", "p"} if width >= WIDE else {"seeds", "95 % of it", "p", "p (Holm)"}
    columns = [column for column in CONTRASTS if column.heading not in left_out]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.heading,
            justify="left" if column.is_text else "right",
            no_wrap=not column.is_text,
            overflow="fold",
            ratio=1 if column.heading == "verdict" else None,
        )
    for found in contrasts:
        style = COLOURS.get(found.verdict.kind, "")
        *cells, verdict = (Text(column.cell(found)) for column in columns)
        table.add_row(*cells, Text(verdict.plain, style=style))
    return table


def markdown(comparisons: Sequence[Comparison], teachers: Sequence[Run], remarks: Sequence[str]) -> str:
    """The whole report as one Markdown page."""
    lines = ["# Report", "", "Accuracies and agreements in percent, gains in percentage points.", ""]
    for comparison in comparisons:
        columns = columns_for(comparison)
        lines += [f"## {escape(comparison.experiment.title)}", "", comparison.headline, ""]
        lines += markdown_table(columns, comparison.rows)
        lines += ["", *(f"- {escape(note)}" for note in notes_of(comparison)), ""]
        if comparison.contrasts:
            lines += [f"### {QUESTION}", "", ANSWERS, ""]
            lines += [*markdown_table(CONTRASTS, comparison.contrasts), ""]
    if teachers:
        lines += ["## Teachers", "", *(f"- {escape(line)}" for line in teacher_lines(teachers)), ""]
    if remarks:
        lines += ["## Runs without figures", "", *(f"- {escape(remark)}" for remark in remarks), ""]
    return "\n".join([*lines, "## How to read this", "", *(f"- {line}" for line in READING), ""])


def markdown_table(columns: Sequence[Column], rows: Sequence[Row] | Sequence[Contrast]) -> list[str]:
    """The lines of a table."""
    return [
        markdown_row([column.heading for column in columns]),
        markdown_row(["---" if column.is_text else "---:" for column in columns]),
        *(markdown_row([escape(column.cell(row)) for column in columns]) for row in rows),
    ]


def markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Text that Markdown takes for nothing else."""
    for sign in "\\|*_<`[":
        text = text.replace(sign, f"\\{sign}")
    return text


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """One line an arm, unrounded."""
    rows = [csv_row(comparison, row) for comparison in comparisons for row in comparison.rows]
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def csv_row(comparison: Comparison, row: Row) -> dict[str, Any]:
    """An arm's figures by column; `_pct` is percent, `_pp` percentage points."""
    arm, gain, gain_best = row.arm, row.gain, row.gain_best
    return {
        "experiment": comparison.experiment.title,
        "dataset": comparison.experiment.dataset,
        "arm": arm.label,
        "method": "none" if arm.is_baseline else arm.method,
        "granularity": arm.granularity,
        "loss": arm.loss,
        "alpha": arm.alpha,
        "and": arm.also,
        "seeds": row.last.n,
        **flat("last", "pct", row.last),
        **flat("best_on_val", "pct", row.best),
        "paired_seeds": gain.difference.n if gain else None,
        **flat("gain", "pp", gain.difference if gain else None),
        "gain_bootstrap_low_pp": gain.bootstrap.low if gain and gain.bootstrap else None,
        "gain_bootstrap_high_pp": gain.bootstrap.high if gain and gain.bootstrap else None,
        "p": gain.p if gain else None,
        "p_holm": row.p_holm,
        **flat("gain_best_on_val", "pp", gain_best.difference if gain_best else None),
        "p_best_on_val": gain_best.p if gain_best else None,
        "p_holm_best_on_val": row.p_holm_best,
        **flat("agreement", "pct", row.agreement),
        "wall_seconds_mean": row.wall_seconds.mean,
        "wall_seconds_std": row.wall_seconds.std,
        "seeds_needed": row.needed,
        "spread_from": row.spread.source if row.spread else None,
        "verdict": row.verdict.kind.value,
        "words": row.verdict.words,
    }


def flat(name: str, unit: str, summary: Summary | None) -> dict[str, float | None]:
    """A summary as columns."""
    interval = summary.interval if summary else None
    return {
        f"{name}_mean_{unit}": summary.mean if summary else None,
        f"{name}_std_{unit}": summary.std if summary else None,
        f"{name}_low_{unit}": interval.low if interval else None,
        f"{name}_high_{unit}": interval.high if interval else None,
    }


def json_text(comparisons: Sequence[Comparison], runs: Sequence[Run], remarks: Sequence[str]) -> str:
    """Everything, for programs: figures unrounded, each arm with its runs, each run with its state."""
    content = {
        "units": {"_pct": "percent", "_pp": "percentage points", "_seconds": "seconds"},
        "interval": "95 %, two-sided",
        "experiments": [
            {
                "title": comparison.experiment.title,
                "headline": comparison.headline,
                "setting": comparison.experiment.setting,
                "notes": notes_of(comparison),
                "arms": [
                    csv_row(comparison, row)
                    | {
                        "paired_with_seeds": list(row.gain.seeds) if row.gain else [],
                        "runs": {str(seed): str(run.path) for seed, run in row.arm.runs.items()},
                        "teachers": sorted(row.arm.teachers),
                    }
                    for row in comparison.rows
                ],
                "controls": [contrast_facts(found) for found in comparison.contrasts],
            }
            for comparison in comparisons
        ],
        "runs": [run_facts(run) for run in runs],
        "remarks": list(remarks),
        "reading": READING,
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def contrast_facts(found: Contrast) -> dict[str, Any]:
    """Attention beside a control, unrounded."""
    return {
        "attention": found.plain.label,
        "control": found.control.label,
        "paired_with_seeds": list(found.gain.seeds),
        **flat("difference", "pp", found.gain.difference),
        "p": found.gain.p,
        "p_holm": found.p_holm,
        "seeds_needed": found.needed,
        "verdict": found.verdict.kind.value,
        "words": found.verdict.words,
    }


def run_facts(run: Run) -> dict[str, Any]:
    """What a report knows of one run."""
    return {
        "path": str(run.path),
        "state": run.state,
        "problem": run.problem or None,
        "is_teacher": run.is_teacher,
        "dataset": run.dataset or None,
        "method": run.method or None,
        "granularity": run.granularity,
        "loss": run.loss,
        "alpha": run.alpha,
        "seed": run.seed if run.setting else None,
        "test_last_pct": run.acc_last,
        "test_best_on_val_pct": run.acc_best,
        "agreement_pct": run.agreement,
        "wall_seconds": run.wall_seconds,
        "teacher": run.teacher,
        "teacher_test_pct": run.teacher_acc,
    }


def notes_of(comparison: Comparison) -> list[str]:
    """What a reader of the table has to know besides."""
    notes = list(comparison.experiment.notes)
    baseline = comparison.experiment.baseline
    if comparison.experiment.flatters:
        notes.append("the best epoch was chosen on the test images: that column flatters")
    missing = [
        row.arm.label
        for row in comparison.rows
        if baseline and row.gain and row.gain.difference.n < row.last.n and row.gain.difference.n
    ]
    if missing:
        notes.append(
            f"{count(len(missing), 'arm')} with seeds that the student alone lacks: the gain is of the others"
        )
    return notes


def remarks_on(runs: Sequence[Run], folders: Sequence[Path]) -> list[str]:
    """One line for each run without figures, or for each state of many, and for each folder without runs."""
    lines = []
    for state in ("running", "stopped", "failed", "damaged", "foreign"):
        concerned = [run for run in runs if run.state == state]
        if len(concerned) > MOST_LINES:
            lines.append(f"{count(len(concerned), 'run')} {state}: left out; report.json names them")
            continue
        for run in concerned:
            why = f" ({run.problem})" if run.problem else ""
            lines.append(f"{run.path}: {state}{why}, left out")
    empty = [folder for folder in folders if not any(run_folders(folder))]
    return lines + [f"{folder}: no runs in it" for folder in empty]


def teacher_lines(teachers: Sequence[Run]) -> list[str]:
    """One line a teacher of the store."""
    lines = []
    for run in teachers:
        told = "" if run.acc_best is None else f", {run.acc_best:.2f} % on the test split, best on validation"
        epochs = "" if run.epochs is None else f", {count(run.epochs, 'epoch')}"
        lines.append(f"{run.dataset}, seed {run.seed}: {run.state}{epochs}{told}; {run.path}")
    return lines


def mean_std(summary: Summary) -> str:
    """`95.43 ± 1.41`; without a spread for one value, a dash for none."""
    if summary.mean is None:
        return DASH
    return f"{summary.mean:.2f}" if summary.std is None else f"{summary.mean:.2f} ± {summary.std:.2f}"


def interval(found: Interval | None) -> str:
    """`[94.10, 96.02]`, or a dash."""
    return DASH if found is None else f"[{found.low:.2f}, {found.high:.2f}]".replace("-", MINUS)


def gain_text(gain: Gain) -> str:
    """`+0.17` or `−0.67`, or a dash."""
    return DASH if gain.difference.mean is None else signed(gain.difference.mean)


def p_text(p: float | None) -> str:
    """A p-value in a column, or a dash."""
    return DASH if p is None else "<0.001" if p < 0.001 else digits_of(p)


def wall_time(row: Row) -> str:
    """How long a run of the arm took; of runs that trained as one stack, how many shared that time."""
    together = {run.stacked for run in row.arm.runs.values()}
    told = duration(row.wall_seconds.mean)
    return told if together == {None} else f"{told}, stacked"


def duration(seconds: float | None) -> str:
    """`7.3 s`, `4 min`, `3.1 h`, or a dash."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
