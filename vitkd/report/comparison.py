"""Experiments with their metrics: every arm against the student alone, and attention against its controls."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from vitkd.report.arms import Arm
from vitkd.report.experiments import Experiment
from vitkd.report.formatting import count
from vitkd.report.parsing import Settings
from vitkd.report.settings import arm_settings, format_settings, group_of
from vitkd.report.statistics import Gain, Summary, paired_gain, pooled_std
from vitkd.report.verdicts import MIN_SEEDS, Outcome, Spread, Verdict, judge, seeds_to_detect
from vitkd.statistics import holm

UNCONTROLLED: Settings = {"method.control": None, "teacher.trained": True}
"""Settings with which attention is distilled from the teacher's own maps, and their defaults."""


@dataclass(frozen=True)
class Row:
    """An arm's metrics; accuracies in percent, gains in percentage points."""

    arm: Arm
    last: Summary
    best: Summary
    gain: Gain | None
    """at the last epoch, the primary comparison; None without a baseline and for the baseline itself"""
    gain_best: Gain | None
    """at the epoch with the best validation accuracy"""
    p_holm: float | None
    """p-value of `gain`, corrected for all arms of the experiment"""
    p_holm_best: float | None
    agreement: Summary
    wall_seconds: Summary
    spread: Spread | None
    needed: int | None
    """seeds that detect a gap of the observed size with power 0.8; None if unknown or too many"""
    verdict: Verdict


@dataclass(frozen=True)
class Contrast:
    """An attention arm against one of its controls, in percentage points.

    That one of two gains is significant does not make their difference so (Gelman and Stern 2006).
    """

    arm: Arm
    """learned from the teacher's own maps"""
    control: Arm
    gain: Gain
    """arm − control, at the last epoch"""
    p_holm: float | None
    """p-value of `gain`, corrected for all contrasts of the experiment"""
    needed: int | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """One experiment's rows, the baseline first."""

    experiment: Experiment
    rows: list[Row]
    contrasts: list[Contrast]

    @property
    def headline(self) -> str:
        """The result in a sentence."""
        outcomes = [row.verdict.outcome for row in self.rows if not row.arm.is_baseline]
        if not outcomes:
            return "Only the student alone: nothing to compare."
        if self.experiment.is_merged:
            return "Students merged: they are no student alone, so there is no baseline and no gain."
        if self.experiment.baseline is None:
            # method=token adds a token to the student.
            has_token = self.experiment.settings.get("student.distillation_token")
            settings = "method=none student.distillation_token=true," if has_token else "method=none"
            return f"No run of the student alone ({settings} or alpha=1): gains cannot be computed."
        words = {
            Outcome.HURTS: "harmful",
            Outcome.NO_EVIDENCE: "without evidence",
            Outcome.TOO_FEW: "with too few seeds",
            Outcome.NOT_COMPARABLE: "without a shared seed",
        }
        parts = [count(outcomes.count(Outcome.REAL), "real gain")]
        parts += [f"{outcomes.count(outcome)} {words[outcome]}" for outcome in words if outcome in outcomes]
        return f"{count(len(outcomes), 'arm')} against the student alone: {', '.join(parts)}."


def compare(experiment: Experiment) -> Comparison:
    """All metrics of an experiment."""
    baseline, arms = experiment.baseline, experiment.rows
    gains = [gain_over(baseline, arm, "acc_last") for arm in arms]
    gains_best = [gain_over(baseline, arm, "acc_best") for arm in arms]
    corrected = holm([gain and gain.p for gain in gains])
    corrected_best = holm([gain and gain.p for gain in gains_best])
    spreads = spreads_of(baseline, gains)
    itself = Verdict(Outcome.BASELINE, "baseline")
    rows = [
        Row(
            arm=arm,
            last=arm.summary("acc_last"),
            best=arm.summary("acc_best"),
            gain=gains[i],
            gain_best=gains_best[i],
            p_holm=corrected[i],
            p_holm_best=corrected_best[i],
            agreement=arm.summary("agreement"),
            wall_seconds=arm.summary("wall_seconds"),
            spread=spreads[i],
            needed=seeds_to_detect(gains[i], spreads[i]),
            verdict=itself if arm.is_baseline else judge(gains[i], corrected[i], spreads[i]),
        )
        for i, arm in enumerate(arms)
    ]
    return Comparison(experiment, rows, contrasts_of(experiment))


def contrasts_of(experiment: Experiment) -> list[Contrast]:
    """Every arm that learned from its teacher's own maps against each of its controls."""
    arms = experiment.arms
    own = [arm for arm in arms if uses_own_maps(arm)]
    pairs = [(arm, control) for arm in own for control in arms if is_control(control, arm)]
    gains = [paired_gain(arm.metric("acc_last"), control.metric("acc_last")) for arm, control in pairs]
    corrected = holm([gain.p for gain in gains])
    spreads = spreads_of(experiment.baseline, gains)
    return [
        Contrast(*pair, gain, p_holm, seeds_to_detect(gain, spread), judge(gain, p_holm, spread))
        for pair, gain, p_holm, spread in zip(pairs, gains, corrected, spreads, strict=True)
    ]


def gain_over(baseline: Arm | None, arm: Arm, metric: str) -> Gain | None:
    """An arm's gain; None for the baseline itself, and without one."""
    if baseline is None or arm.is_baseline:
        return None
    return paired_gain(arm.metric(metric), baseline.metric(metric))


def spreads_of(baseline: Arm | None, gains: Sequence[Gain | None]) -> list[Spread | None]:
    """The spread of each arm's differences; with too few seeds that of other arms or of the baseline."""
    pooled = pooled_std([gain.difference for gain in gains if gain and gain.difference.n >= MIN_SEEDS])
    alone = baseline.summary("acc_last").std if baseline else None
    borrowed: Spread | None = None
    if pooled:
        borrowed = Spread(pooled, "other arms")
    elif alone:
        # The difference of two independent arms has twice the variance of one.
        borrowed = Spread(alone * math.sqrt(2), "the student alone")
    return [
        Spread(gain.difference.std, "own")
        if gain and gain.difference.n >= MIN_SEEDS and gain.difference.std
        else gain and borrowed
        for gain in gains
    ]


def uses_own_maps(arm: Arm) -> bool:
    """Whether it learns from its teacher's own maps."""
    return arm.method == "attention" and not control_settings(arm)


def is_control(control: Arm, arm: Arm) -> bool:
    """Whether `control` trained as `arm` in every shared seed, but for what replaces the maps.

    If it is of another method without maps, only teacher, alpha and weighting have to be equal.
    """
    is_of_another_method = control.method in ("logit", "token") and not control.first.attention_weight
    if uses_own_maps(control) or not (control.method == arm.method or is_of_another_method):
        return False
    ignored = {*UNCONTROLLED}
    if control.method != arm.method:
        ignored |= {"method", "granularity", "loss"}
    if control.first.settings.get("teacher.trained") is False:
        ignored |= {"teacher.seed", "teacher.checkpoint"}  # which random weights it has is chance
    seeds = sorted(control.runs.keys() & arm.runs.keys())
    return bool(seeds) and all(
        settings_at(seed, control, ignored) == settings_at(seed, arm, ignored) for seed in seeds
    )


def settings_at(seed: int, arm: Arm, ignored: Set[str]) -> Settings:
    """The settings of an arm's run, without those and the groups in `ignored`."""
    settings = arm_settings(arm.runs[seed].settings)
    return {name: value for name, value in settings.items() if not {name, group_of(name)} & ignored}


def control_settings(arm: Arm) -> Settings:
    """Its settings that replace the teacher's own maps."""
    values = {name: arm.first.settings.get(name, default) for name, default in UNCONTROLLED.items()}
    return {name: value for name, value in values.items() if value != UNCONTROLLED[name]}


def control_name(control: Arm, arm: Arm) -> str:
    """How a control differs from the arm it controls."""
    if control.method != arm.method:
        return control.label_without_alpha
    differing = {name: value for name, value in control.extra.items() if arm.extra.get(name) != value}
    return format_settings(dict(sorted((differing | control_settings(control)).items())))
