"""Which arms control which: the same training, but for what stands in place of the teacher's maps."""

from collections.abc import Sequence, Set

from vitkd.report.arms import LEARNT_FROM, Arm, own, told
from vitkd.report.runs import Setting

PLAIN: Setting = {"method.control": None, "teacher.trained": True}
"""What it takes for attention to be learned from the teacher's own maps, and the values by default."""


def pairs_of(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Every arm that learns from its teacher's own maps, with each arm that controls it."""
    return [(plain, arm) for plain in arms if is_plain(plain) for arm in arms if is_control(arm, plain)]


def is_plain(arm: Arm) -> bool:
    """Whether it learns from its teacher's own maps."""
    return arm.method == "attention" and not departures(arm)


def is_control(arm: Arm, plain: Arm) -> bool:
    """Whether `arm` trained as `plain` did, but for what it was taught in place of the maps, seed by seed.

    Of another method that compares no maps only the teacher and alpha have to be equal.
    """
    if is_plain(arm) or arm.first.attention_weight:
        return False
    groups = LEARNT_FROM if arm.method == plain.method else {"teacher", "alpha"}
    free = {*PLAIN}
    if arm.first.setting.get("teacher.trained") is False:
        free |= {"teacher.seed", "teacher.checkpoint"}  # which random weights is chance, as a student's are
    seeds = sorted(arm.runs.keys() & plain.runs.keys())
    return bool(seeds) and all(
        setting_at(seed, arm, groups, free) == setting_at(seed, plain, groups, free) for seed in seeds
    )


def setting_at(seed: int, arm: Arm, groups: Set[str], free: Set[str]) -> Setting:
    """What the arm learned from in its run of a seed: `groups` of settings, without those in `free`."""
    return {
        name: value
        for name, value in own(arm.runs[seed].setting).items()
        if name.partition(".")[0] in groups and name not in free
    }


def departures(arm: Arm) -> Setting:
    """Its settings that put something else in place of the teacher's maps."""
    found = {name: arm.first.setting.get(name, usual) for name, usual in PLAIN.items()}
    return {name: value for name, value in found.items() if value != PLAIN[name]}


def name_of(control: Arm, plain: Arm) -> str:
    """A control in the words that tell it from the arm it controls."""
    if control.method != plain.method:
        return control.kind
    apart = {name: value for name, value in control.extra.items() if plain.extra.get(name) != value}
    return told(dict(sorted((apart | departures(control)).items())))
