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

MAX_BYTES = 1 << 20
MAX_LINE = 200
"""Characters."""

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_config(path: Path) -> dict[str, Any] | None:
    """A run's resolved configuration; None if the file holds anything else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if not isinstance(config, dict):
        return None
    if not all(isinstance(config.get(group), dict) for group in REQUIRED_GROUPS):
        return None
    alpha, seed = config.get("alpha"), config.get("seed")
    is_run = type(seed) is int and (alpha is None or number(alpha) is not None)
    return config if is_run and flatten(config) is not None else None


def flatten(config: Mapping[Any, Any]) -> Settings | None:
    """Nested settings as dotted names → values, lists as JSON; None if there are too many."""
    flat: Settings = {}
    stack: list[tuple[str, Any]] = [("", config)]
    visited = 0
    while stack:
        prefix, node = stack.pop()
        if (visited := visited + 1) > MAX_SETTINGS:
            return None
        if isinstance(node, Mapping):
            stack += [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in node.items()]
        elif isinstance(node, list):
            if (text := list_as_json(node)) is None:
                return None
            flat[prefix] = text
        else:
            flat[prefix] = node if isinstance(node, Value) else str(node)
    return flat


def list_as_json(values: list[Any]) -> str | None:
    """The list as text; None if it is too long or contains itself."""
    try:
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError):
        return None
    return text if len(text) <= MAX_BYTES else None


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
