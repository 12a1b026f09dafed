"""Control arms: trained as another arm, but with something else in place of the teacher's attention maps."""

from collections.abc import Sequence, Set

from vitkd.report.arms import Arm
from vitkd.report.parsing import Settings
from vitkd.report.settings import arm_settings, format_settings, group_of

UNCONTROLLED: Settings = {"method.control": None, "teacher.trained": True}
"""Settings with which attention is distilled from the teacher's own maps, and their defaults."""


def control_pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Every arm that learns from its teacher's own maps, with each of its controls."""
    return [
        (arm, control) for arm in arms if uses_own_maps(arm) for control in arms if is_control(control, arm)
    ]


def uses_own_maps(arm: Arm) -> bool:
    """Whether it learns from its teacher's own maps."""
    return arm.method == "attention" and not control_settings(arm)


def is_control(control: Arm, arm: Arm) -> bool:
    """Whether `control` trained as `arm` in every shared seed, but for what replaces the maps.

    If it is of another method without maps, only teacher, alpha and weighting have to be equal.
    """
    if uses_own_maps(control) or control.first.attention_weight:
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
    """What tells a control from the arm it controls."""
    if control.method != arm.method:
        return control.label_without_alpha
    differing = {name: value for name, value in control.extra.items() if arm.extra.get(name) != value}
    return format_settings(dict(sorted((differing | control_settings(control)).items())))
