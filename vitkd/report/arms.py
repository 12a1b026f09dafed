"""Which runs are comparable: experiments that hold arms, arms that hold seeds.

An experiment is everything that the student would be without a teacher: images, model, optimiser, epochs. Its
arms are what it learns from. Within an arm runs differ in the seed alone.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vitkd.report.runs import Run, Setting, Value
from vitkd.runs.older import LATER, VIT

LEARNT_FROM = {"teacher", "method", "granularity", "loss", "alpha"}
"""The groups of settings in which arms of one experiment differ."""

ALONE = "student alone"

GRANULARITIES = {name: place for place, name in enumerate(("head", "block", "encoder"))}
USUAL: Setting = LATER | {"student._target_": VIT, "teacher._target_": VIT}
"""Values that go without saying, however many runs have them."""
OF_TOKEN = {"method.targets", "method.attention_weight"}
"""Settings that are part of an arm's name."""
LONGEST_TITLE = 4
"""Settings named in a title; more follow as a number."""

ROUNDING = 1e-6
"""Percent; accuracies that differ by less are equal."""


@dataclass
class Arm:
    """Runs that differ in the seed alone, one a seed."""

    runs: dict[int, Run]
    """seed → run"""
    extra: Setting = field(default_factory=dict)
    """what tells it from arms of the same method, granularity, loss and alpha"""
    is_baseline: bool = False

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def teaches_attention(self) -> bool:
        """Whether granularity and loss mean anything."""
        return self.method == "attention" and not self.is_baseline

    @property
    def granularity(self) -> str:
        return (self.first.granularity or "") if self.teaches_attention else ""

    @property
    def loss(self) -> str:
        return (self.first.loss or "") if self.teaches_attention else ""

    @property
    def alpha(self) -> float | None:
        return None if self.is_baseline else self.first.alpha

    @property
    def also(self) -> str:
        """`extra` in words."""
        return told(self.extra)

    @property
    def kind(self) -> str:
        """What is learned, whatever alpha."""
        if self.is_baseline:
            return ALONE
        return ", ".join(part for part in (self.what, self.also) if part)

    @property
    def label(self) -> str:
        if self.is_baseline:
            return ALONE
        at = "" if self.alpha is None else f"alpha {self.alpha:g}"
        return ", ".join(part for part in (self.what, at, self.also) if part)

    @property
    def what(self) -> str:
        """What is learned, but for settings that need no name."""
        run = self.first
        if self.teaches_attention:
            return f"{self.granularity} {self.loss}"
        if self.method != "token":
            return self.method
        taught = f"token {run.setting.get('method.targets')}"
        maps = f"{run.attention_weight:g}·{run.granularity} {run.loss}"
        return f"{taught} + {maps}" if run.attention_weight else taught

    @property
    def teachers(self) -> set[str]:
        """Digests of the teachers that its runs learned from."""
        return {run.teacher for run in self.runs.values() if run.teacher}

    def figures(self, name: str) -> dict[int, float]:
        """Seed → the runs' figure of that name, of those that have it."""
        found = {seed: getattr(run, name) for seed, run in self.runs.items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}


@dataclass
class Experiment:
    """Arms that may be compared."""

    title: str
    setting: Setting
    """what all its runs share"""
    baseline: Arm | None
    arms: list[Arm]
    """the others, in the table's order"""
    baselines: list[Run]
    """every finished run that trained on labels alone: those with alpha=1 have attention losses too"""
    notes: list[str]

    @property
    def rows(self) -> list[Arm]:
        """All arms, the baseline first."""
        return ([self.baseline] if self.baseline else []) + self.arms

    @property
    def dataset(self) -> str:
        return str(self.setting.get("dataset.name"))

    @property
    def flatters(self) -> bool:
        """Whether the best epoch was chosen on the test images."""
        return self.setting.get("dataset.validate_on") == "test"


def experiments_of(runs: Iterable[Run]) -> list[Experiment]:
    """The finished runs as experiments, those with the most runs first; teachers are left out."""
    grouped: dict[tuple[tuple[str, Value], ...], list[Run]] = {}
    for run in runs:
        if run.is_done and not run.is_teacher:
            grouped.setdefault(tuple(shared(run.setting).items()), []).append(run)
    settings = [dict(key) for key in grouped]
    titles = titles_of(settings)
    found = [
        experiment(title, setting, members)
        for title, setting, members in zip(titles, settings, grouped.values(), strict=True)
    ]
    return sorted(found, key=lambda e: (-sum(len(arm.runs) for arm in e.rows), e.title))


def shared(setting: Setting) -> Setting:
    """The part of a run's setting that makes its experiment."""
    return {name: value for name, value in setting.items() if name.partition(".")[0] not in LEARNT_FROM}


def own(setting: Setting) -> Setting:
    """The part of a run's setting that makes its arm."""
    return {name: value for name, value in setting.items() if name.partition(".")[0] in LEARNT_FROM}


def experiment(title: str, setting: Setting, runs: Sequence[Run]) -> Experiment:
    """One experiment of runs that share `setting`."""
    notes: list[str] = []
    alone = [run for run in runs if run.is_student_alone]
    baseline = Arm(newest_by_seed(alone), is_baseline=True) if alone else None
    if spare := len(alone) - len({run.seed for run in alone}):
        notes.append(
            f"{count(spare, 'more run')} of the student alone: alpha=1 and method=none are the same training,"
            " so the newest counts for each seed"
        )
    notes += disagreements(alone)
    arms, repeats = [], 0
    for members in by_arm([run for run in runs if not run.is_student_alone]):
        arms.append(Arm(newest_by_seed(members)))
        repeats += len(members) - len(arms[-1].runs)
    if repeats:
        notes.append(f"{count(repeats, 'run')} of an arm and seed that has a newer one: the newest counts")
    name_extras(arms)
    arms.sort(key=order)
    for arm in arms:
        if len(arm.teachers) > 1 and not is_tied(arm.runs.values()):
            notes.append(f"{arm.label}: its runs learned from {len(arm.teachers)} different teachers")
    return Experiment(title, setting, baseline, arms, sorted(alone, key=lambda run: run.path), notes)


def newest_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """One run a seed, the one that finished last."""
    newest = {run.seed: run for run in sorted(runs, key=lambda run: (run.finished, run.path))}
    return dict(sorted(newest.items()))


def disagreements(alone: Sequence[Run]) -> list[str]:
    """Seeds of the student alone whose runs should be equal and are not."""
    by_seed: dict[int, set[float]] = {}
    for run in alone:
        assert run.acc_last is not None
        seen = by_seed.setdefault(run.seed, set())
        if all(abs(run.acc_last - other) > ROUNDING for other in seen):
            seen.add(run.acc_last)
    apart = [seed for seed, seen in by_seed.items() if len(seen) > 1]
    if not apart:
        return []
    seeds = ", ".join(map(str, sorted(apart)))
    return [
        f"the student alone differs between runs of the same seed ({seeds}): other hardware, another"
        " version, or a stack's rounding"
    ]


def by_arm(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone; `teacher.seed` may go along with it."""
    grouped: dict[tuple[tuple[str, Value], ...], list[Run]] = {}
    for run in runs:
        setting = own(run.setting)
        setting.pop("teacher.seed", None)
        grouped.setdefault(tuple(setting.items()), []).append(run)
    arms = []
    for members in grouped.values():
        if is_tied(members):
            arms.append(members)
            continue
        by_teacher: dict[Value, list[Run]] = {}
        for run in members:
            by_teacher.setdefault(run.setting.get("teacher.seed"), []).append(run)
        arms += by_teacher.values()
    return arms


def is_tied(runs: Iterable[Run]) -> bool:
    """Whether every seed has a teacher of its own, of the same seed."""
    seeds = {(run.seed, run.setting.get("teacher.seed")) for run in runs}
    return len(seeds) > 1 and all(seed == teacher for seed, teacher in seeds)


def name_extras(arms: Sequence[Arm]) -> None:
    """Give each arm the settings that tell it from others that could be taken for it.

    A loss's own settings are looked at among arms of that loss, and so on. What is usual goes without saying.
    """
    peers: dict[tuple[str, str], list[Arm]] = {}
    for arm in arms:
        for group, choice in choices(arm).items():
            peers.setdefault((group, choice), []).append(arm)
    for (group, _), among in peers.items():
        settings = [setting_in(group, arm) for arm in among]
        for name in sorted({name for setting in settings for name in setting}):
            values = [setting.get(name) for setting in settings]
            if len({json.dumps(value) for value in values}) == 1:
                continue
            usual = json.dumps(USUAL[name]) if name in USUAL else usual_of(values)
            for arm, value in zip(among, values, strict=True):
                if json.dumps(value) != usual:
                    arm.extra[name] = value
    for arm in arms:
        arm.extra = dict(sorted(arm.extra.items()))


def choices(arm: Arm) -> dict[str, str]:
    """Group of settings → what the arm has chosen in it, as far as its settings are comparable."""
    run = arm.first
    maps = arm.teaches_attention or run.attention_weight > 0
    return {
        "teacher._target_": "",
        "teacher": str(run.setting.get("teacher._target_")),
        "method": arm.method,
        "granularity": f"{arm.method} {run.granularity if maps else ''}",
        "loss": f"{arm.method} {run.loss if maps else ''}",
    }


def setting_in(group: str, arm: Arm) -> Setting:
    """An arm's settings in one group; where teachers have their students' seeds, that is the setting."""
    setting = dict(arm.first.setting)
    if is_tied(arm.runs.values()):
        setting["teacher.seed"] = "${seed}"
    setting.pop("method._target_", None)
    if arm.method == "attention" or arm.first.attention_weight:
        setting.pop("granularity._target_", None)
        setting.pop("loss._target_", None)
    if arm.method == "token":
        setting = {name: value for name, value in setting.items() if name not in OF_TOKEN}
    return {name: value for name, value in setting.items() if name == group or name.startswith(f"{group}.")}


def usual_of(values: Sequence[Value]) -> str | None:
    """The value that goes without saying, as JSON: an empty one, else that of most, else None."""
    told = [json.dumps(value) for value in values]
    empty = {text for text in told if text in ("null", '"none"', '""')}
    if len(empty) == 1:
        return empty.pop()
    return next((text for text in told if 2 * told.count(text) > len(told)), None)


def order(arm: Arm) -> tuple[object, ...]:
    """Where an arm stands in the table: the grid by granularity, loss and alpha, then the others."""
    alpha = -1.0 if arm.alpha is None else arm.alpha
    place = GRANULARITIES.get(arm.granularity, len(GRANULARITIES))
    kind = "" if arm.method == "attention" else arm.kind
    return (arm.method != "attention", arm.also, kind, place, arm.granularity, arm.loss, alpha)


def titles_of(settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """A title for each experiment: its data set, and how it differs from others on that."""
    titles: list[str] = []
    for setting in settings:
        dataset = str(setting.get("dataset.name"))
        others = [other for other in settings if other.get("dataset.name") == setting.get("dataset.name")]
        names = sorted({name for other in others for name in other}, key=prominence)
        differ = [n for n in names if differs(n, others) and has_a(n, setting, others)]
        differ = [n for n in differ if n not in USUAL or setting[n] != USUAL[n]]
        parts = [dataset, told({n: setting.get(n) for n in differ[:LONGEST_TITLE]})]
        if len(differ) > LONGEST_TITLE:
            parts.append(f"and {count(len(differ) - LONGEST_TITLE, 'more setting')}")
        title = ", ".join(part for part in parts if part)
        titles.append(title if title not in titles else f"{title} (no. {len(titles) + 1})")
    return titles


def differs(name: str, settings: Sequence[Mapping[str, Value]]) -> bool:
    """Whether those to which the setting means anything have it at several values."""
    return len({json.dumps(each.get(name)) for each in settings if has_a(name, each, settings)}) > 1


def has_a(name: str, setting: Mapping[str, Value], others: Sequence[Mapping[str, Value]]) -> bool:
    """Whether a setting means anything for what is chosen in its group; a depth none for a ResNet."""
    target = f"{name.partition('.')[0]}._target_"
    return name in setting or any(o.get(target) == setting.get(target) for o in others if name in o)


def prominence(name: str) -> tuple[int, str]:
    """What a title names first: how long and what is trained, rather than on what terms."""
    groups = ("trainer", "student", "optimizer", "schedule")
    group = name.partition(".")[0]
    return (groups.index(group) if group in groups else len(groups), name)


def told(setting: Mapping[str, Value]) -> str:
    """Settings as one would type them."""
    return ", ".join(f"{name.removesuffix('._target_')}={shown(value)}" for name, value in setting.items())


def shown(value: Value) -> str:
    """A setting's value as a person reads it: of a path or a class the end."""
    if isinstance(value, str) and "/" in value:
        return "/".join(Path(value).parts[-2:])
    if isinstance(value, str) and value.startswith("vitkd."):
        return value.rpartition(".")[2].removesuffix("Config")
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def count(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
