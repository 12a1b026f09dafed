"""Arms: runs that differ in the seed alone, and names that distinguish them."""

import json
from collections.abc import Iterable, Sequence

from vitkd.report.parsing import Settings, Value
from vitkd.report.runs import Run
from vitkd.report.settings import CONSTANT, WEIGHTING, arm_settings, format_settings, group_by
from vitkd.report.statistics import Summary, summarise

ALONE, MERGED = "student alone", "students merged"

GRANULARITIES = {name: place for place, name in enumerate(("head", "block", "encoder"))}

# As in vitkd.models, whose import would load PyTorch.
VIT = "vitkd.models.ViTConfig"
VIT_DEFAULTS: Settings = {"tokenizer": "patch", "attention": "msa", "distillation_token": False}
DEFAULTS: Settings = {
    **{f"{model}._target_": VIT for model in ("student", "teacher")},
    **{f"{model}.{name}": value for model in ("student", "teacher") for name, value in VIT_DEFAULTS.items()},
    "teacher.trained": True,
}
"""Values left out of names, however many runs have them."""


class Arm:
    """Runs that differ in the seed alone, one a seed.

    Args:
        runs: seed → run.
        is_baseline: whether it is the student alone.

    Attributes:
        granularity, loss: empty if it does not distill attention.
        is_merged_alone: whether it is several students merged, which had labels alone.
        alpha: weight of the class loss; 1 for students that had labels alone, even with method=none.
        extra: settings that distinguish it from arms of the same method, granularity, loss and alpha.
    """

    def __init__(self, runs: dict[int, Run], is_baseline: bool = False) -> None:
        self.runs, self.is_baseline = runs, is_baseline
        self.first = run = next(iter(runs.values()))
        self.method, self.weighting = run.method, run.weighting
        self.distills_attention = run.method == "attention" and not is_baseline
        self.granularity = (run.granularity or "") if self.distills_attention else ""
        self.loss = (run.loss or "") if self.distills_attention else ""
        self.is_merged_alone = run.is_merged and run.method == "none"
        has_labels_alone = is_baseline or self.is_merged_alone
        self.alpha = 1.0 if has_labels_alone or run.alpha is None else run.alpha
        self.extra: Settings = {}

    @property
    def extra_text(self) -> str:
        return format_settings(self.extra)

    @property
    def label(self) -> str:
        """Its name, unique in its experiment."""
        if self.is_baseline or self.is_merged_alone:
            return self.label_without_alpha
        return ", ".join(filter(None, (self.objective, f"alpha {self.alpha:g}", self.extra_text)))

    @property
    def label_without_alpha(self) -> str:
        return ALONE if self.is_baseline else ", ".join(filter(None, (self.objective, self.extra_text)))

    @property
    def objective(self) -> str:
        """The transfer loss: `block kl`, `logit`, `token hard + 1·block kl`, `1·block kl + 0.5·logit`.

        Of students that are merged it is what they are, and then that, if there is one.
        """
        if self.is_merged_alone:
            return MERGED
        return f"{MERGED}, {self.transfer}" if self.first.is_merged else self.transfer

    @property
    def transfer(self) -> str:
        """The transfer loss, whatever the student."""
        run = self.first
        if self.method == "token":
            token = f"token {run.settings.get('method.targets')}"
            maps = f"{run.attention_weight:g}·{run.granularity} {run.loss}"
            return f"{token} + {maps}" if run.attention_weight else token
        if run.parts:
            return " + ".join(f"{weight:g}·{self.part(name)}" for name, weight in run.parts.items())
        return self.part(self.method)

    def part(self, method: str) -> str:
        """A method by what it compares: `block kl`, `block relation`, `block copy`, `logit`."""
        compared = {"attention": self.first.loss, "relation": "relation", "copy": "copy"}.get(method)
        return f"{self.first.granularity} {compared}" if compared else method

    def learns(self, *methods: str) -> bool:
        """Whether one of `methods` is the arm's, or a part of it."""
        maps = {"attention"} if self.first.attention_weight else set()
        return not maps.union(self.first.parts, {self.method}).isdisjoint(methods)

    @property
    def teachers(self) -> set[str]:
        """Digests of the teachers of its runs."""
        return {run.teacher for run in self.runs.values() if run.teacher}

    def metric(self, name: str) -> dict[int, float]:
        """Seed → the metric of that name, of the runs that have it."""
        values = {seed: getattr(run, name) for seed, run in self.runs.items()}
        return {seed: float(value) for seed, value in values.items() if value is not None}

    def summary(self, name: str) -> Summary:
        """That metric over seeds."""
        return summarise([*self.metric(name).values()])


def arms_of(runs: Iterable[Run]) -> list[Arm]:
    """The arms that `runs` form, named and in the table's order, with the newest run of each seed."""
    arms = [Arm(newest_by_seed(group)) for group in group_by_arm(runs)]
    name_extras(arms)
    return sorted(arms, key=table_order)


def newest_by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    """One run a seed, the one that finished last."""
    newest = {run.seed: run for run in sorted(runs, key=lambda run: (run.finished, run.path))}
    return dict(sorted(newest.items()))


def group_by_arm(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups of runs that differ in `seed` alone, or in `seed` and `teacher.seed` together."""
    ignored = {"teacher.seed": None}
    groups = group_by(runs, lambda run: frozenset((arm_settings(run.settings) | ignored).items()))
    arms: list[list[Run]] = []
    for group in groups.values():
        if has_teacher_per_seed(group):
            arms.append(group)
        else:
            arms += group_by(group, lambda run: run.settings.get("teacher.seed")).values()
    return arms


def has_teacher_per_seed(runs: Iterable[Run]) -> bool:
    """Whether every seed has a teacher of its own, of the same seed."""
    seeds = {(run.seed, run.settings.get("teacher.seed")) for run in runs}
    return len(seeds) > 1 and all(seed == teacher for seed, teacher in seeds)


def name_extras(arms: Sequence[Arm]) -> None:
    """Set `extra` of each arm: the settings that distinguish it from similar arms.

    The settings of a loss are compared among arms of that loss, and so on.
    """
    for arm in arms:
        arm.extra = {} if arm.weighting == CONSTANT else {WEIGHTING: arm.weighting}
    chosen = [(choice, arm) for arm in arms for choice in choices(arm).items()]
    for (group, _), members in group_by(chosen, lambda pair: pair[0]).items():
        add_differences(group, [arm for _, arm in members])
    for arm in arms:
        arm.extra = dict(sorted(arm.extra.items()))


def add_differences(group: str, arms: Sequence[Arm]) -> None:
    """Add the settings of a group in which `arms` differ to `extra`, except usual values."""
    settings = [settings_in(group, arm) for arm in arms]
    for name in sorted({name for each in settings for name in each}):
        values = [each.get(name) for each in settings]
        if len({json.dumps(value) for value in values}) == 1:
            continue
        usual = json.dumps(DEFAULTS[name]) if name in DEFAULTS else usual_value(values)
        for arm, value in zip(arms, values, strict=True):
            if json.dumps(value) != usual:
                arm.extra[name] = value


def choices(arm: Arm) -> dict[str, str]:
    """Group of settings → the arm's option in it; settings are compared where both are equal."""
    run = arm.first
    has_maps = arm.learns("attention") and not arm.is_baseline
    has_blocks = has_maps or arm.learns("relation", "copy")
    method = " ".join([arm.method, *run.parts])
    return {
        "teacher._target_": "",
        "teacher": str(run.settings.get("teacher._target_")),
        "weighting": arm.weighting,
        "method": method,
        "granularity": f"{method} {run.granularity if has_blocks else ''}",
        "loss": f"{method} {run.loss if has_maps else ''}",
    }


def settings_in(group: str, arm: Arm) -> Settings:
    """An arm's settings in one group, without those that its label names anyway."""
    settings = dict(arm.first.settings)
    if has_teacher_per_seed(arm.runs.values()):
        settings["teacher.seed"] = "${seed}"
    named = {"method._target_"}
    if arm.learns("attention", "relation", "copy"):
        named |= {"granularity._target_", "loss._target_"}
    if arm.method == "token":
        named |= {"method.targets", "method.attention_weight"}
    if arm.first.parts:
        named |= {"method.parts", "method.weights"}
    return {
        name: value
        for name, value in settings.items()
        if name not in named and (name == group or name.startswith(f"{group}."))
    }


def usual_value(values: Sequence[Value]) -> str | None:
    """The value to leave out, as JSON: an empty one, else the majority's, else None."""
    texts = [json.dumps(value) for value in values]
    empty = {text for text in texts if text in ("null", '"none"', '""')}
    if len(empty) == 1:
        return empty.pop()
    return next((text for text in texts if 2 * texts.count(text) > len(texts)), None)


def table_order(arm: Arm) -> tuple[object, ...]:
    """Sort key: attention arms by granularity, loss and alpha, then the others."""
    place = GRANULARITIES.get(arm.granularity, len(GRANULARITIES))
    name = "" if arm.method == "attention" else arm.label_without_alpha
    return (arm.method != "attention", arm.extra_text, name, place, arm.granularity, arm.loss, arm.alpha)
