"""Which settings of a run are compared, and how they are written in tables and titles."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from vitkd.config.roles import Separates, relevant, separates
from vitkd.report.parsing import Settings, Value

T = TypeVar("T")
K = TypeVar("K")

WEIGHTING, CONSTANT = "weighting._target_", "constant"
CLASS_SUFFIXES = {"method": "Distillation", "weighting": "Weighting", "student": "Config"}


def comparable(settings: Settings) -> Settings:
    """The settings that may change a result, without the seed; null counts as absent."""
    kept = {name: value for name, value in relevant(settings, Separates.ARMS).items() if value is not None}
    return dict(sorted((kept | {WEIGHTING: weighting_of(settings)}).items()))


def weighting_of(settings: Settings) -> str:
    """The option chosen in the group `weighting`, constant by default; a plugin's class by its full name."""
    target = str(settings.get(WEIGHTING) or "")
    return target if target and not target.startswith("vitkd.") else option(settings, "weighting") or CONSTANT


def arm_settings(settings: Settings) -> Settings:
    """Those that all runs of an arm share."""
    return {name: value for name, value in settings.items() if not separates(name, Separates.EXPERIMENTS)}


def group_by(members: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Members by key, in the order of their first member."""
    groups: dict[K, list[T]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def group_of(name: str) -> str:
    """`teacher` for `teacher.seed`."""
    return name.partition(".")[0]


def option(settings: Settings, group: str) -> str:
    """The option chosen in a group as one types it: `reverse_kl` for vitkd.methods.maps.losses.ReverseKL."""
    name = str(settings.get(f"{group}._target_", "")).rpartition(".")[2]
    name = name.removesuffix(CLASS_SUFFIXES.get(group, ""))
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return "none" if group == "method" and words == "no" else words


def format_settings(settings: Mapping[str, Value]) -> str:
    """Settings as one would type them."""
    return ", ".join(
        f"{name.removesuffix('._target_')}={format_value(value)}" for name, value in settings.items()
    )


def format_value(value: Value) -> str:
    """A setting's value; of a path the last two parts, of a class its name."""
    if isinstance(value, str) and "/" in value:
        return "/".join(Path(value).parts[-2:])
    if isinstance(value, str) and value.startswith("vitkd."):
        return value.rpartition(".")[2].removesuffix("Config")
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
