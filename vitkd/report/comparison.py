"""Experiments with their figures: every arm beside the student alone, and attention beside its controls."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitkd.report.arms import Arm, Experiment, count
from vitkd.report.controls import pairs_of
from vitkd.report.statistics import Gain, Summary, paired_gain, pooled_std, seeds_needed, summarise
from vitkd.report.verdicts import FEWEST_SEEDS, Kind, Spread, Verdict, judge
from vitkd.statistics import holm


@dataclass(frozen=True)
class Row:
    """An arm in figures; accuracies in percent, gains in percentage points."""

    arm: Arm
    last: Summary
    best: Summary
    gain: Gain | None
    """at the last epoch, which nobody chose: the primary comparison; None for and without a baseline"""
    gain_best: Gain | None
    """at the epoch that was best on validation"""
    p_holm: float | None
    """of `gain`, corrected for all arms of the experiment"""
    p_holm_best: float | None
    agreement: Summary
    wall_seconds: Summary
    spread: Spread | None
    needed: int | None
    """seeds that would show the observed gap with power 0.8; None if none would, or none can be told"""
    verdict: Verdict


@dataclass(frozen=True)
class Contrast:
    """Attention beside one of its controls, in percentage points.

    One real gain and one without evidence do not make a difference between the two (Gelman and Stern 2006).
    """

    plain: Arm
    """learned from the teacher's own maps"""
    control: Arm
    gain: Gain
    """plain − control, at the last epoch"""
    p_holm: float | None
    """of `gain`, corrected for all contrasts of the experiment, and for nothing else"""
    needed: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """One experiment's rows, the baseline first."""

    experiment: Experiment
    rows: list[Row]
    contrasts: list[Contrast]

    @property
    def _missing(self) -> str:
        """What would train the student alone, which is the same student: method=token adds a token to it."""
        if self.experiment.setting.get("student.distillation_token"):
            return "method=none student.distillation_token=true, or alpha=1"
        return "method=none or alpha=1"

    @property
    def headline(self) -> str:
        """What came of it, in a sentence."""
        judged = [row.verdict.kind for row in self.rows if row.verdict.kind != Kind.BASELINE]
        if not judged:
            return "Only the student alone: nothing to compare."
        if self.experiment.baseline is None:
            return f"No run of the student alone ({self._missing}): no gain can be told."
        counts = {
            "hurting": judged.count(Kind.HURTS),
            "without evidence": judged.count(Kind.NO_EVIDENCE),
            "with too few seeds to say": judged.count(Kind.TOO_FEW),
            "without a seed in common": judged.count(Kind.NOT_COMPARABLE),
        }
        parts = [count(judged.count(Kind.REAL), "real gain")]
        parts += [f"{number} {what}" for what, number in counts.items() if number]
        return f"{count(len(judged), 'arm')} beside the student alone: {', '.join(parts)}."


def compare(experiment: Experiment) -> Comparison:
    """All figures of an experiment."""
    baseline = experiment.baseline
    gains = [gain_over(baseline, arm, "acc_last") for arm in experiment.rows]
    gains_best = [gain_over(baseline, arm, "acc_best") for arm in experiment.rows]
    corrected = holm([gain and gain.p for gain in gains])
    corrected_best = holm([gain and gain.p for gain in gains_best])
    spreads = spreads_of(baseline, gains)
    rows = []
    for place, arm in enumerate(experiment.rows):
        gain, spread = gains[place], spreads[place]
        alone = Verdict(Kind.BASELINE, "the student alone")
        rows.append(
            Row(
                arm=arm,
                last=summarise([*arm.figures("acc_last").values()]),
                best=summarise([*arm.figures("acc_best").values()]),
                gain=gain,
                gain_best=gains_best[place],
                p_holm=corrected[place],
                p_holm_best=corrected_best[place],
                agreement=summarise([*arm.figures("agreement").values()]),
                wall_seconds=summarise([*arm.figures("wall_seconds").values()]),
                spread=spread,
                needed=needed(gain, spread),
                verdict=alone if arm.is_baseline else judge(gain, corrected[place], spread),
            )
        )
    return Comparison(experiment, rows, contrasts_of(experiment))


def contrasts_of(experiment: Experiment) -> list[Contrast]:
    """Every arm that learned from its teacher's own maps beside each of its controls."""
    pairs = pairs_of(experiment.arms)
    gains = [paired_gain(plain.figures("acc_last"), control.figures("acc_last")) for plain, control in pairs]
    corrected = holm([gain.p for gain in gains])
    spreads = spreads_of(experiment.baseline, gains)
    return [
        Contrast(
            *pair,
            gain,
            p_holm,
            needed(gain, spread),
            judge(gain, p_holm, spread, family="the controls"),
        )
        for pair, gain, p_holm, spread in zip(pairs, gains, corrected, spreads, strict=True)
    ]


def gain_over(baseline: Arm | None, arm: Arm, figure: str) -> Gain | None:
    """An arm's gain; None for the baseline itself, and without one."""
    if baseline is None or arm.is_baseline:
        return None
    return paired_gain(arm.figures(figure), baseline.figures(figure))


def needed(gain: Gain | None, spread: Spread | None) -> int | None:
    """Seeds that would show the observed gap; three at least."""
    if gain is None or gain.difference.mean is None or spread is None:
        return None
    seeds = seeds_needed(gain.difference.mean, spread.std)
    return None if seeds is None else max(seeds, FEWEST_SEEDS)


def spreads_of(baseline: Arm | None, gains: Sequence[Gain | None]) -> list[Spread | None]:
    """How far each arm's differences lie apart, borrowed where its own seeds are too few to tell."""
    pooled = pooled_std([gain.difference for gain in gains if gain and gain.difference.n >= FEWEST_SEEDS])
    alone = summarise([*baseline.figures("acc_last").values()]).std if baseline else None
    spreads: list[Spread | None] = []
    for gain in gains:
        if gain is None:
            spreads.append(None)
        elif gain.difference.n >= FEWEST_SEEDS and gain.difference.std:
            spreads.append(Spread(gain.difference.std, "own"))
        elif pooled:
            spreads.append(Spread(pooled, "other arms"))
        elif alone:
            # Two arms that vary independently.
            spreads.append(Spread(alone * math.sqrt(2), "the student alone"))
        else:
            spreads.append(None)
    return spreads
