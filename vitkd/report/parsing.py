"""Values read from a run's files and checked: a file may be cut, malicious or another program's."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

Value: TypeAlias = str | int | float | bool | None
Settings: TypeAlias = dict[str, Value]
"""dotted name → value"""

REQUIRED_GROUPS = ("dataset", "student", "method", "trainer")

MAX_SETTINGS = 2_000
"""Real configurations have a hundred; YAML aliases can expand to more than fits into memory."""

MAX_DEPTH = 50
MAX_BYTES = 1 << 20
MAX_LINE = 200
"""Characters."""

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one if the file is absent, too large or holds something else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def is_of_a_run(config: Mapping[str, Any]) -> bool:
    """Whether it is the resolved configuration of a run, and safe to flatten."""
    has_groups = all(isinstance(config.get(group), dict) for group in REQUIRED_GROUPS)
    has_numbers = type(config.get("seed")) is int and number(config.get("alpha")) is not None
    return has_groups and has_numbers and is_bounded(config)


def is_bounded(config: Mapping[Any, Any]) -> bool:
    """Whether it is small and not too deep, counting values as often as YAML aliases repeat them."""
    stack: list[tuple[Any, int]] = [(config, 0)]
    visited = 0
    while stack and visited <= MAX_SETTINGS and stack[-1][1] <= MAX_DEPTH:
        node, depth = stack.pop()
        visited += 1
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
        stack += [(child, depth + 1) for child in children]
    return not stack


def flatten(config: Mapping[Any, Any], prefix: str = "") -> Settings:
    """Nested settings as dotted names → values, lists as JSON."""
    flat: Settings = {}
    for key, node in config.items():
        if isinstance(node, Mapping):
            flat |= flatten(node, f"{prefix}{key}.")
        elif isinstance(node, list):
            flat[f"{prefix}{key}"] = json.dumps(node, default=str)
        else:
            flat[f"{prefix}{key}"] = node if isinstance(node, Value) else str(node)
    return flat


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if the file is absent, cut or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def integer(value: Any) -> int | None:
    """An integer, or None."""
    return value if type(value) is int else None


def percent(value: Any) -> float | None:
    """A fraction in 0..1 as a percentage; None for anything else."""
    fraction = number(value)
    return 100 * fraction if fraction is not None and 0 <= fraction <= 1 else None


def one_line(value: Any) -> str:
    """Text on one line, shortened to `MAX_LINE`."""
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 1]}…"
