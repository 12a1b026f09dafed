"""The commands that train what a comparison lacks: the student alone, and more seeds."""

import json
import shlex
from collections.abc import Iterable, Sequence
from math import prod

from vitkd.config.roles import Separates, separates
from vitkd.report.arms import ALONE, Arm, has_teacher_per_seed
from vitkd.report.experiments import Experiment
from vitkd.report.formatting import count
from vitkd.report.parsing import Settings
from vitkd.report.settings import group_by
from vitkd.report.verdicts import MIN_SEEDS

OF_ONE_RUN = ("seed", "name", "resume", "sweep", "hydra.", "hydra/")
"""What settings that are no arm's begin with."""


def missing_runs(experiment: Experiment) -> dict[str, str]:
    """What to do before gains can be judged → its command, to be typed where the other runs were started.

    Nothing for arms whose runs do not say how, nor for students merged, which have no baseline.
    """
    baseline, arms = experiment.baseline, [arm for arm in experiment.arms if arm.first.command is not None]
    if not arms or experiment.is_merged:
        return {}
    few = [arm for arm in arms if len(arm.runs.keys() & (baseline or arm).runs.keys()) < MIN_SEEDS]
    wanted = seeds_to_share(experiment.rows) if few else set()
    of_alone = wanted - baseline.runs.keys() if baseline else wanted.union(*(arm.runs for arm in arms))
    alone = settings_alone(arms[0], experiment.settings).values()
    found = {f"train the {ALONE}": command(alone, of_alone)} if of_alone else {}
    for seeds, members in group_by(few, lambda arm: frozenset(wanted - arm.runs.keys())).items():
        found |= more_seeds(members, seeds) if seeds else {}
    return found


def seeds_to_share(rows: Sequence[Arm]) -> set[int]:
    """As many seeds as a verdict needs, those that most arms have."""
    times = {seed: sum(seed in row.runs for row in rows) for row in rows for seed in row.runs}
    times = dict.fromkeys(range(MIN_SEEDS), 0) | times
    return {*sorted(times, key=lambda seed: (-times[seed], seed))[:MIN_SEEDS]}


def settings_alone(arm: Arm, shared: Settings) -> dict[str, str]:
    """As `settings_of`, for an arm's student on labels alone; both share some settings."""
    values = {name: f"{name}={json.dumps(value)}" for name, value in shared.items()}
    kept = {
        # What a setting refers to may be left out.
        name: values.get(name, argument) if "${" in argument else argument
        for name, argument in settings_of(arm).items()
        if not is_learned_from(name)
    }
    # method=token adds it to the student.
    token = "student.distillation_token"
    return kept | ({token: values[token]} if shared.get(token) else {}) | {"method": "method=none"}


def is_learned_from(setting: str) -> bool:
    """Whether it says what a student learns from besides labels."""
    return separates(setting, Separates.ARMS) and not separates(setting, Separates.EXPERIMENTS)


def settings_of(arm: Arm) -> dict[str, str]:
    """What was typed for an arm, without what is one run's alone: name of a setting or option → argument."""
    typed = {name_of(argument): argument for argument in arm.first.command or ()}
    if has_teacher_per_seed(arm.runs.values()):
        typed["teacher.seed"] = "teacher.seed=${seed}"
    return {name: typed[name] for name in typed if not name.startswith(OF_ONE_RUN)}


def name_of(argument: str) -> str:
    """`teacher.schedule` of `schedule@teacher.schedule=constant`."""
    return argument.partition("=")[0].lstrip("+~").rpartition("@")[2]


def more_seeds(arms: Sequence[Arm], seeds: Iterable[int]) -> dict[str, str]:
    """How to add seeds to arms: by one sweep, if they are all combinations of some values."""
    typed = [settings_of(arm) for arm in arms]
    values = [[*dict.fromkeys(each.get(name, "") for each in typed)] for name in typed[0]]
    are_alike = all(each.keys() == typed[0].keys() for each in typed)
    if are_alike and len({(*each.values(),) for each in typed}) == len(arms) == prod(map(len, values)):
        swept = [",".join([first, *(each.partition("=")[2] for each in rest)]) for first, *rest in values]
        what = arms[0].label if len(arms) == 1 else count(len(arms), "arm")
        return {f"add seeds to {what}": command(swept, seeds)}
    return {what: line for arm in arms for what, line in more_seeds([arm], seeds).items()}


def command(settings: Iterable[str], seeds: Iterable[int]) -> str:
    """The command line of a sweep over seeds."""
    listed = ",".join(map(str, sorted(seeds)))
    return shlex.join(["python", "-m", "vitkd.train", "-m", *settings, f"seed={listed}"])
