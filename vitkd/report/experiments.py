"""Experiments: arms that may be compared, because everything but what they learn from is equal.

That is images, student, optimizer and length of training; teacher, method and loss may differ.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitkd.report.arms import (
    DEFAULTS,
    Arm,
    group_by_arm,
    has_teacher_per_seed,
    name_extras,
    newest_by_seed,
    table_order,
)
from vitkd.report.formatting import count
from vitkd.report.parsing import Settings, Value
from vitkd.report.runs import Run
from vitkd.report.settings import experiment_settings, format_settings, group_of

MAX_TITLE_SETTINGS = 4
"""Settings named in a title; the rest are counted."""

TITLE_GROUPS = ("trainer", "student", "optimizer", "schedule")
"""Groups that a title names first."""

TOLERANCE = 1e-6
"""Percent; accuracies that differ by less are equal."""


@dataclass
class Experiment:
    """Arms that may be compared."""

    title: str
    settings: Settings
    """those that all its runs share"""
    baseline: Arm | None
    """the student alone"""
    arms: list[Arm]
    """the others, in the table's order"""
    alone: list[Run]
    """every finished run of the student alone, also those whose seed has a newer one"""
    notes: list[str]

    @property
    def rows(self) -> list[Arm]:
        """All arms, the baseline first."""
        return ([self.baseline] if self.baseline else []) + self.arms

    @property
    def dataset(self) -> str:
        return str(self.settings.get("dataset.name"))

    @property
    def validates_on_test(self) -> bool:
        """Whether the best epoch was chosen on the test images."""
        return self.settings.get("dataset.validate_on") == "test"


def find_experiments(runs: Iterable[Run]) -> list[Experiment]:
    """The experiments of the finished runs, those with the most runs first; teachers are left out."""
    groups: dict[tuple[tuple[str, Value], ...], list[Run]] = {}
    for run in runs:
        if run.is_done and not run.is_teacher:
            groups.setdefault(tuple(experiment_settings(run.settings).items()), []).append(run)
    settings = [dict(key) for key in groups]
    experiments = [
        make_experiment(title, shared, members)
        for title, shared, members in zip(titles(settings), settings, groups.values(), strict=True)
    ]
    return sorted(experiments, key=lambda e: (-sum(len(arm.runs) for arm in e.rows), e.title))


def make_experiment(title: str, settings: Settings, runs: Sequence[Run]) -> Experiment:
    """One experiment of runs that share `settings`."""
    alone = [run for run in runs if run.is_student_alone]
    groups = group_by_arm(run for run in runs if not run.is_student_alone)
    arms = [Arm(newest_by_seed(group)) for group in groups]
    name_extras(arms)
    arms.sort(key=table_order)
    older = sum(map(len, groups)) - sum(len(arm.runs) for arm in arms)
    return Experiment(
        title,
        settings,
        Arm(newest_by_seed(alone), is_baseline=True) if alone else None,
        arms,
        sorted(alone, key=lambda run: run.path),
        [*notes_on_alone(alone), *notes_on_arms(arms, older)],
    )


def notes_on_alone(alone: Sequence[Run]) -> list[str]:
    """How runs of the student alone with the same seed were treated, and whether they agree."""
    notes = []
    if repeats := len(alone) - len({run.seed for run in alone}):
        notes.append(
            f"{count(repeats, 'repeated run')} of the student alone left out: alpha=1 and method=none are the"
            " same training, and only the newest run of each seed is used"
        )
    if differing := ", ".join(str(seed) for seed in differing_seeds(alone)):
        notes.append(
            f"runs of the student alone with the same seed differ (seed {differing}): other hardware, other"
            " library versions, or the rounding of stacked training"
        )
    return notes


def differing_seeds(runs: Sequence[Run]) -> list[int]:
    """Seeds whose runs have different accuracies."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        assert run.acc_last is not None
        by_seed.setdefault(run.seed, []).append(run.acc_last)
    return sorted(seed for seed, accs in by_seed.items() if max(accs) - min(accs) > TOLERANCE)


def notes_on_arms(arms: Sequence[Arm], older: int) -> list[str]:
    """How many `older` runs were left out, and which arms mix teachers."""
    notes = []
    if older:
        notes.append(f"{count(older, 'older run')} left out: only the newest of each arm and seed is used")
    for arm in arms:
        if len(arm.teachers) > 1 and not has_teacher_per_seed(arm.runs.values()):
            notes.append(f"{arm.label}: its runs have {len(arm.teachers)} different teachers")
    return notes


def titles(experiments: Sequence[Mapping[str, Value]]) -> list[str]:
    """A title for each experiment's settings: its data set, and how it differs from others on that."""
    unique: list[str] = []
    for settings in experiments:
        title = title_among(settings, experiments)
        unique.append(title if title not in unique else f"{title} (no. {len(unique) + 1})")
    return unique


def title_among(settings: Mapping[str, Value], experiments: Sequence[Mapping[str, Value]]) -> str:
    """Data set and differing settings; equal for two that differ in more settings than a title names."""
    dataset = settings.get("dataset.name")
    peers = [other for other in experiments if other.get("dataset.name") == dataset]
    names = sorted({name for peer in peers for name in peer}, key=title_order)
    differing = [
        name
        for name in names
        if applies(name, settings, peers)
        and differs(name, peers)
        and not (name in DEFAULTS and settings[name] == DEFAULTS[name])
    ]
    named, more = differing[:MAX_TITLE_SETTINGS], len(differing) - MAX_TITLE_SETTINGS
    parts = [str(dataset), format_settings({name: settings.get(name) for name in named})]
    parts += [f"and {count(more, 'more setting')}"] if more > 0 else []
    return ", ".join(part for part in parts if part)


def differs(name: str, experiments: Sequence[Mapping[str, Value]]) -> bool:
    """Whether the experiments to which the setting applies have several values of it."""
    values = {json.dumps(each.get(name)) for each in experiments if applies(name, each, experiments)}
    return len(values) > 1


def applies(name: str, settings: Mapping[str, Value], others: Sequence[Mapping[str, Value]]) -> bool:
    """Whether the class chosen in the setting's group has the setting: a ResNet has no depth."""
    target = f"{group_of(name)}._target_"
    return name in settings or any(
        other.get(target) == settings.get(target) for other in others if name in other
    )


def title_order(name: str) -> tuple[int, str]:
    """Sort key of settings in a title."""
    group = group_of(name)
    return (TITLE_GROUPS.index(group) if group in TITLE_GROUPS else len(TITLE_GROUPS), name)
