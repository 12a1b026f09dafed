"""The report for programs: CSV and JSON, unrounded."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from vitkd.report.comparison import Comparison, Contrast, Row
from vitkd.report.missing import missing_runs
from vitkd.report.notes import INTERVALS, READING, notes_on
from vitkd.report.runs import Run
from vitkd.report.statistics import Summary


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """One line an arm."""
    rows = [arm_facts(comparison, row) for comparison in comparisons for row in comparison.rows]
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: literal(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def literal(value: Any) -> Any:
    """A cell on one line that no spreadsheet takes for a formula; numbers stay numbers."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text or value


def json_text(comparisons: Sequence[Comparison], runs: Sequence[Run], remarks: Sequence[str]) -> str:
    """Each arm with its runs, and each run with its state."""
    content = {
        "units": {"_pct": "percent", "_pp": "percentage points", "_seconds": "seconds"},
        "intervals": INTERVALS,
        "experiments": [experiment_facts(comparison) for comparison in comparisons],
        "runs": [run_facts(run) for run in runs],
        "remarks": list(remarks),
        "reading": READING,
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def experiment_facts(comparison: Comparison) -> dict[str, Any]:
    """One experiment."""
    return {
        "title": comparison.experiment.title,
        "headline": comparison.headline,
        "settings": comparison.experiment.settings,
        "notes": notes_on(comparison),
        "missing": missing_runs(comparison.experiment),
        "arms": [
            arm_facts(comparison, row)
            | {
                "paired_with_seeds": list(row.gain.seeds) if row.gain else [],
                "runs": {str(seed): str(run.path) for seed, run in row.arm.runs.items()},
                "teachers": sorted(row.arm.teachers),
            }
            for row in comparison.rows
        ],
        "controls": [contrast_facts(contrast) for contrast in comparison.contrasts],
    }


def arm_facts(comparison: Comparison, row: Row) -> dict[str, Any]:
    """An arm's metrics by column; `_pct` is percent, `_pp` percentage points."""
    arm, gain, gain_best = row.arm, row.gain, row.gain_best
    return {
        "experiment": comparison.experiment.title,
        "dataset": comparison.experiment.settings.get("dataset.name"),
        "arm": arm.label,
        "method": "none" if arm.is_baseline else arm.method,
        "granularity": arm.granularity,
        "loss": arm.loss,
        "alpha": arm.alpha,
        "weighting": arm.weighting,
        "other_settings": arm.extra_text,
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
        **flat("acc_top5", "pct", arm.summary("acc_top5")),
        **flat("f1_macro", "pct", arm.summary("f1_macro")),
        **flat("ece", "pp", arm.summary("ece")),
        **flat("agreement", "pct", row.agreement),
        "wall_seconds_mean": row.wall_seconds.mean,
        "wall_seconds_std": row.wall_seconds.std,
        "seeds_needed": row.needed,
        "spread_from": row.spread.source if row.spread else None,
        "verdict": row.verdict.outcome.value,
        "verdict_text": row.verdict.text,
    }


def flat(name: str, unit: str, summary: Summary | None) -> dict[str, float | None]:
    """A summary as columns."""
    _, mean, std, interval = summary or (0, None, None, None)
    low, high = interval or (None, None)
    columns = {"mean": mean, "std": std, "low": low, "high": high}
    return {f"{name}_{column}_{unit}": value for column, value in columns.items()}


def contrast_facts(contrast: Contrast) -> dict[str, Any]:
    """An attention arm against a control."""
    return {
        "attention": contrast.arm.label,
        "control": contrast.control.label,
        "paired_with_seeds": list(contrast.gain.seeds),
        **flat("difference", "pp", contrast.gain.difference),
        "p": contrast.gain.p,
        "p_holm": contrast.p_holm,
        "seeds_needed": contrast.needed,
        "verdict": contrast.verdict.outcome.value,
        "verdict_text": contrast.verdict.text,
    }


def run_facts(run: Run) -> dict[str, Any]:
    """One run."""
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
        "weighting": run.weighting if run.settings else None,
        "seed": run.seed if run.settings else None,
        "test_last_pct": run.acc_last,
        "test_best_on_val_pct": run.acc_best,
        "acc_top5_pct": run.acc_top5,
        "f1_macro_pct": run.f1_macro,
        "ece_pp": run.ece,
        "agreement_pct": run.agreement,
        "wall_seconds": run.wall_seconds,
        "teacher": run.teacher,
        "teacher_test_pct": run.teacher_acc,
    }
