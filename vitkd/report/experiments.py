"""Experiments: arms that may be compared, because everything but what they learn from is equal.

That is images, student, optimizer and length of training; teacher, method and loss may differ.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vitkd.config.roles import Separates, relevant
from vitkd.report.arms import DEFAULTS, Arm, arms_of, has_teacher_per_seed, newest_by_seed
from vitkd.report.formatting import count
from vitkd.report.parsing import Settings, Value
from vitkd.report.runs import Run
from vitkd.report.settings import format_settings, group_by, group_of

MAX_TITLE_SETTINGS = 4
"""Settings named in a title; the rest are counted."""
TITLE_GROUPS = ("trainer", "student", "optimizer", "schedule")

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
    def is_merged(self) -> bool:
        """Whether its students are several merged: there is no student alone of that kind."""
        return any(arm.first.is_merged for arm in self.arms)

    @property
    def validates_on_test(self) -> bool:
        """Whether the best epoch was chosen on the test images."""
        return self.settings.get("dataset.validate_on") == "test"


def find_experiments(runs: Iterable[Run]) -> list[Experiment]:
    """The experiments of the finished runs, those with the most runs first; teachers are left out."""
    students = [run for run in runs if run.state == "done" and not run.is_teacher]
    groups = group_by(students, lambda run: tuple(relevant(run.settings, Separates.EXPERIMENTS).items()))
    settings = [dict(key) for key in groups]
    experiments = [
        make_experiment(title, shared, members)
        for title, shared, members in zip(titles(settings), settings, groups.values(), strict=True)
    ]
    return sorted(experiments, key=lambda e: (-sum(len(arm.runs) for arm in e.rows), e.title))


def make_experiment(title: str, settings: Settings, runs: Sequence[Run]) -> Experiment:
    """One experiment of runs that share `settings`."""
    alone = [run for run in runs if run.is_student_alone]
    arms = arms_of(run for run in runs if not run.is_student_alone)
    older = len(runs) - len(alone) - sum(len(arm.runs) for arm in arms)
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
    by_seed = group_by(alone, lambda run: run.seed)
    notes = []
    if repeats := len(alone) - len(by_seed):
        notes.append(
            f"{count(repeats, 'repeated run')} of the student alone left out: alpha=1 and method=none are the"
            " same training, and only the newest run of each seed is used"
        )
    accuracies = {seed: [run.acc_last or 0.0 for run in runs] for seed, runs in sorted(by_seed.items())}
    differing = [str(seed) for seed, accs in accuracies.items() if max(accs) - min(accs) > TOLERANCE]
    if differing:
        notes.append(
            f"runs of the student alone with the same seed differ (seed {', '.join(differing)}): other"
            " hardware, other library versions, or the rounding of stacked training"
        )
    return notes


def notes_on_arms(arms: Sequence[Arm], older: int) -> list[str]:
    """How many `older` runs were left out, and which arms mix teachers."""
    notes = [f"{count(older, 'older run')} left out: only the newest of each arm and seed is used"]
    return notes[: bool(older)] + [
        f"{arm.label}: its runs have {len(arm.teachers)} different teachers"
        for arm in arms
        if len(arm.teachers) > 1 and not has_teacher_per_seed(arm.runs.values())
    ]


def titles(experiments: Sequence[Mapping[str, Value]]) -> list[str]:
    """A title for each experiment's settings: its data set, and how it differs from others on that."""
    unique: list[str] = []
    for settings in experiments:
        peers = [peer for peer in experiments if peer.get("dataset.name") == settings.get("dataset.name")]
        names = sorted({name for peer in peers for name in peer}, key=title_order)
        differing = [name for name in names if distinguishes(name, settings, peers)]
        named = {name: settings.get(name) for name in differing[:MAX_TITLE_SETTINGS]}
        parts = [str(settings.get("dataset.name")), format_settings(named)]
        if len(differing) > MAX_TITLE_SETTINGS:
            parts.append(f"and {count(len(differing) - MAX_TITLE_SETTINGS, 'more setting')}")
        title = ", ".join(filter(None, parts))
        unique.append(title if title not in unique else f"{title} (no. {len(unique) + 1})")
    return unique


def distinguishes(name: str, settings: Mapping[str, Value], others: Sequence[Mapping[str, Value]]) -> bool:
    """Whether a title names the setting: it applies, is no default, and the others have another value."""
    values = {json.dumps(other.get(name)) for other in others if applies(name, other, others)}
    is_default = name in DEFAULTS and settings.get(name) == DEFAULTS[name]
    return applies(name, settings, others) and len(values) > 1 and not is_default


def applies(name: str, settings: Mapping[str, Value], others: Sequence[Mapping[str, Value]]) -> bool:
    """Whether the class chosen in the setting's group has the setting: a ResNet has no depth."""
    target = f"{group_of(name)}._target_"
    return name in settings or any(o.get(target) == settings.get(target) for o in others if name in o)


def title_order(name: str) -> tuple[int, str]:
    """Sort key of settings in a title: what is trained and how long comes first."""
    group = group_of(name)
    return (TITLE_GROUPS.index(group) if group in TITLE_GROUPS else len(TITLE_GROUPS), name)
