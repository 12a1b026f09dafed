"""Values read from a run's files and checked: a file may be cut, malicious or another program's."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vitkd.config.roles import flatten
from vitkd.report.formatting import shortened
from vitkd.runs.files import read_mapping, read_rows

Value: TypeAlias = str | int | float | bool | None
Settings: TypeAlias = dict[str, Value]
"""dotted name → value"""

FACTORS = {"val/acc": 100.0, "val/transfer_loss": 1.0, "train/gradient_ratio": 1.0}
"""The column of metrics.csv for each field of `Curves` → the factor to the field's unit."""

MAX_LINE = 200
"""Characters."""
MAX_NUMBER = 1e50
"""Squares and sums of larger numbers may be infinite."""


class Curves(NamedTuple):
    """Curves of one run, each step → value."""

    validation: dict[int, float]
    """validation accuracy, in percent"""
    transfer: dict[int, float]
    """transfer loss on the validation images, in the loss's own unit"""
    ratio: dict[int, float]
    """gradient norm of the weighted transfer loss over that of the weighted class loss"""


class Bins(NamedTuple):
    """Test images in bins of their confidence, [B] each."""

    images: tuple[int, ...]
    confidence: tuple[float | None, ...]
    """mean, in percent; None for a bin without images"""
    accuracy: tuple[float | None, ...]
    """in percent; None for a bin without images"""


class Details(NamedTuple):
    """Where a student is right on its test images, at its last epoch."""

    class_names: tuple[str, ...]
    class_images: tuple[int, ...]
    class_accuracy: tuple[float | None, ...]
    """in percent; None for a class without images"""
    bins: Bins


def is_of_a_run(config: Mapping[str, Any]) -> bool:
    """Whether it is the resolved configuration of a run."""
    groups = ("dataset", "student", "method", "trainer")
    has_groups = all(isinstance(config.get(group), dict) for group in groups)
    has_seed = type(config.get("seed")) is int and 0 <= config["seed"] < 2**32
    return has_groups and has_seed and percent(config.get("alpha")) is not None


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Nested settings as dotted names → values, lists and infinities as text: JSON has no infinity."""

    def plain(value: Any) -> Value:
        is_plain = isinstance(value, Value) and value not in (math.inf, -math.inf) and value == value
        return value if is_plain else json.dumps(value, default=str)

    return {name: plain(value) for name, value in flatten(config) if value != {}}


def entries(value: Value) -> list[Any]:
    """What is in a list that `settings_of` holds as text; nothing if it is none."""
    with suppress(ValueError, RecursionError):
        found = json.loads(str(value))
        return found if isinstance(found, list) else []
    return []


def number(value: Any) -> float | None:
    """A number of no more than `MAX_NUMBER`, or None."""
    is_number = type(value) in (int, float) and abs(value) <= MAX_NUMBER
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
    return shortened(" ".join(str(value).split()), MAX_LINE)


def read_curves(path: Path) -> Curves:
    """The curves in the file `path`, of those lines that can be read; empty if it is absent."""
    try:
        rows, _ = read_rows(path)
    except OSError:
        rows = []
    return Curves(*(curve(rows, column, factor) for column, factor in FACTORS.items()))


def curve(rows: Sequence[Mapping[str, str]], column: str, factor: float) -> dict[int, float]:
    """Step → finite value of a column, times `factor`."""
    values = {int(row["step"]): factor * float(row[column]) for row in rows if row.get(column)}
    return {step: value for step, value in values.items() if number(value) is not None}


def last(curve: dict[int, float]) -> float | None:
    """The value at the last step."""
    return curve[max(curve)] if curve else None


def median_ratio(curves: Curves) -> float | None:
    """The median of a run's gradient ratio over its training; None if it was never measured or is 0."""
    median = float(np.median([*curves.ratio.values()])) if curves.ratio else 0.0
    return median if median > 0 else None


def read_details(path: Path) -> Details | None:
    """What the file `path` says of a student's last epoch; None without it, or if it holds something else."""
    content = read_mapping(path)
    with suppress(TypeError, KeyError, ValueError):
        last = content["last"]
        bins = last["confidence_bins"]
        classes = counts(content["class_images"]), shares(last["class_accuracy"])
        details = Details(
            tuple(map(one_line, content["class_names"])),
            *classes,
            Bins(counts(bins["images"]), shares(bins["confidence"]), shares(bins["accuracy"])),
        )
        lengths = [{*map(len, columns)} for columns in (details[:3], details.bins)]
        return details if all(len(length) == 1 and 0 not in length for length in lengths) else None
    return None


def counts(values: Iterable[Any]) -> tuple[int, ...]:
    """Numbers of images; ValueError if they are none."""
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise ValueError("no numbers of images")
    return numbers


def shares(values: Iterable[Any]) -> tuple[float | None, ...]:
    """Fractions in 0..1 as percentages, None for None; ValueError if they are none."""
    given = tuple(values)
    percentages = tuple(map(percent, given))
    if [value is None for value in given] != [value is None for value in percentages]:
        raise ValueError("no fractions")
    return percentages
