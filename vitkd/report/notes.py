"""What the report says in sentences: how to read it, notes on tables, and runs that were left out."""

from collections.abc import Sequence
from pathlib import Path

from vitkd.report.comparison import Comparison
from vitkd.report.formatting import count
from vitkd.report.runs import Run, run_folders
from vitkd.report.settings import group_by
from vitkd.report.statistics import BOOTSTRAP_COVERAGE, MIN_TO_RESAMPLE
from vitkd.report.verdicts import MIN_SEEDS

MAX_LINES = 5
"""Runs of the same state that are listed; more are counted."""

COVERAGE = " and ".join(f"{share:.0%} with {n}".replace("%", " %") for n, share in BOOTSTRAP_COVERAGE.items())

INTERVALS = {
    "_low, _high": "95 % of the mean, two-sided, Student's t",
    "gain_bootstrap_low_pp, gain_bootstrap_high_pp": "nominally 95 % of the mean, two-sided, expanded BCa"
    f" bootstrap; its coverage for normally distributed differences is {COVERAGE} seeds",
}

CONTROLS_HEADING = "Do the teacher's own maps matter?"
CONTROLS_CAPTION = (
    "Attention distillation against each of its controls at the last epoch, paired by seed. Real gain: the"
    " teacher's own maps are better than the control. Hurts: they are worse. No evidence: the control may be"
    " as good, whatever the gain of either over the student alone."
)

READING = (
    "Accuracy is measured on the test split, once a model. The primary comparison is at the last epoch, which"
    " was not selected; the epoch with the best validation accuracy is given for comparison.",
    "mean ± standard deviation over seeds; [ ] is the 95 % interval of the mean (Student's t).",
    "The gain is paired by seed with the student alone (alpha=1 or method=none, the same training). p is of"
    " the two-sided paired t test; if all seeds differ by the same amount, of the exact sign-flip test.",
    "p (Holm) is corrected for all arms of the section; comparisons with controls are corrected separately."
    f" A gain is called real, or an arm harmful, if p (Holm) is at most 0.05 with {MIN_SEEDS} seeds or more.",
    "The number of seeds that a gap needs is for a true gap of the observed size, itself uncertain: power"
    " 0.8, paired t test at 5 %, uncorrected. With fewer than three seeds the spread of other arms, or"
    " of the student alone, is used.",
    f"The bootstrap interval (expanded BCa, 9,999 resamples, fixed seed) needs {MIN_TO_RESAMPLE} seeds. It is"
    " nominally a 95 % interval, but with few seeds too narrow: its coverage for normally distributed"
    f" differences is {COVERAGE} seeds. Verdicts use Student's t.",
    "Top-5 counts an image as right if its class is among the five likeliest, with six classes or more;"
    " macro-F1 is the mean over classes; ECE is the expected calibration error in percentage points (15 bins,"
    " Guo et al. 2017), 0 for a student that is as sure as it is right. All are of the last epoch.",
    "Wall time is that of a whole run with validation; students trained in one stack share it.",
    "The results hold for other seeds with these images and this teacher, not for other images or teachers.",
)


def notes_on(comparison: Comparison) -> list[str]:
    """Notes below a table."""
    notes = list(comparison.experiment.notes)
    if comparison.experiment.validates_on_test:
        notes.append("the best epoch was chosen on the test images: that column is optimistic")
    if granularities := equivalent_arms(comparison):
        notes.append(f"{granularities}: ce and kl have the same gradient, so a pair is one result, not two")
    unpaired = [row for row in comparison.rows if row.gain and 0 < row.gain.difference.n < row.last.n]
    if unpaired:
        notes.append(
            f"{count(len(unpaired), 'arm')} with seeds that the student alone lacks: gains leave these out"
        )
    return notes


def equivalent_arms(comparison: Comparison) -> str:
    """The granularities of arms that differ in ce or kl alone, as `block, head`; empty if there are none."""
    arms = [row.arm for row in comparison.rows if row.arm.loss in ("ce", "kl")]
    pairs = group_by(arms, lambda arm: (arm.granularity, arm.alpha, arm.extra_text))
    return ", ".join(dict.fromkeys(granularity for (granularity, *_), pair in pairs.items() if len(pair) > 1))


def remarks_on(runs: Sequence[Run], folders: Sequence[Path]) -> list[str]:
    """One line for each run that was left out, or for many of one state, and on images and empty folders."""
    lines = []
    unfinished = group_by((run for run in runs if run.state != "done"), lambda run: run.state)
    for state, affected in unfinished.items():
        reasons = [f" ({run.problem})" if run.problem else "" for run in affected]
        if len(affected) > MAX_LINES:
            reason = reasons[0] if len({*reasons}) == 1 else ""
            lines.append(f"{count(len(affected), 'run')} {state}{reason}: left out; report.json lists them")
        else:
            lines += [f"{r.path}: {state}{why}, left out" for r, why in zip(affected, reasons, strict=True)]
    empty = [folder for folder in folders if not any(run_folders(folder))]
    students = [run for run in runs if run.state == "done" and not run.is_teacher]
    for made in group_by(students, lambda run: (run.dataset, run.settings.get("dataset.root"))).values():
        found = sorted({str(run.settings.get("dataset.contents", "unknown")) for run in made})
        which = f"{len(found)} different sets of images (dataset.contents: {', '.join(found)})"
        if len(found) > 1:
            lines.append(f"{made[0].dataset}: runs on {which} are not compared with each other")
    return lines + [f"{folder}: no runs in it" for folder in empty]


def teacher_lines(runs: Sequence[Run]) -> list[str]:
    """One line a teacher of the store."""
    lines = []
    for run in runs:
        if run.is_teacher:
            acc = "" if run.acc_best is None else f", test accuracy {run.acc_best:.2f} % (best on val)"
            epochs = "" if run.epochs is None else f", {count(run.epochs, 'epoch')}"
            lines.append(f"{run.dataset}, seed {run.seed}: {run.state}{epochs}{acc}; {run.path}")
    return lines
