"""What every benchmark shares: interleaved timing, rows with bars, table, JSON file and command line.

A benchmark is a function from `Settings` to `Row`s; `main` does the rest. All arms multiply matrices in one
precision, that of runs: float32 on a CPU, TF32 on a GPU, where vitkd's use its Triton kernels. The table's
title says which.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vitkd.models.kernels import allow_kernels
from vitkd.process.isolation import isolated, keep_freed_memory, set_matmul_precision
from vitkd.runs.provenance import provenance

RESULTS = Path(__file__).parent / "results"
# Where there is no terminal that would say.
WIDTH = 130


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    device: torch.device
    quick: bool
    """Tiny sizes and few rounds: whether it works, not how fast it is."""
    rounds: int

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Bar:
    """What a figure is to reach."""

    limit: float
    at_least: bool = False

    def met_by(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Spread:
    """A sample's median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.low:.3g} – {self.high:.3g}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    unit: str
    figure: Spread
    ratio: Spread | None = None
    bar: Bar | None = None
    """For the ratio, or for the figure where there is none."""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the bar; None without a bar."""
        return None if self.bar is None else self.bar.met_by((self.ratio or self.figure).median)


def row(
    name: str,
    samples: Sequence[float],
    unit: str = "ms",
    ratio: Sequence[float] | None = None,
    bar: Bar | None = None,
) -> Row:
    """A row of raw samples; `ratio` holds one ratio a round (see `divided`)."""
    return Row(name, unit, Spread.of(samples), Spread.of(ratio) if ratio else None, bar)


def divided(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round down cancels out."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def interleave(
    arms: Mapping[str, Callable[[], object]], settings: Settings, repeat: int = 1, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds a call of each arm, one sample a round; each sample is the mean of `repeat` calls."""
    timers = {name: partial(timed, call, settings.device, repeat) for name, call in arms.items()}
    return in_turns(timers, settings.rounds, warmup)


def in_turns(arms: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 0) -> dict[str, list[float]]:
    """What each arm returns, one sample a round.

    Each round runs every arm, in an order of its own: noise hits all alike, and no arm always follows the
    same other one.
    """
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order, shuffle = list(arms), random.Random(0).shuffle
    for number in range(-warmup, rounds):
        shuffle(order)
        for name in order:
            sample = arms[name]()
            if number >= 0:
                samples[name].append(sample)
    return samples


def timed(call: Callable[[], object], device: torch.device, repeat: int = 1) -> float:
    """Milliseconds a call, until the device has done it all; the garbage collector keeps still."""
    gc.disable()
    try:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / repeat * 1e3
    finally:
        gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@isolated()
def main(
    name: str,
    description: str | None,
    measure: Callable[[Settings], list[Row]],
    argv: Sequence[str] | None = None,
    rounds: int = 30,
) -> list[Row]:
    """Run one benchmark as the command line asks: print its table, write its JSON file."""
    arguments = parser(name, description, rounds).parse_args(argv)
    # As every command of vitkd does.
    keep_freed_memory()
    settings = Settings(arguments.device, arguments.quick, 2 if arguments.quick else arguments.rounds)
    set_matmul_precision("auto", settings.device)
    allow_kernels("auto")
    rows = measure(settings)
    facts = provenance(settings.device)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table(name, settings, facts, rows))
    # A quick look is no figure to keep.
    if path := arguments.json or (
        None if settings.quick else RESULTS / f"{name}-{settings.device.type}.json"
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(record(name, settings, facts, rows), indent=2, ensure_ascii=False) + "\n", "utf-8"
        )
    return rows


def parser(name: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(best), help=f"here {best}")
    parser.add_argument("--json", type=Path, help=f"instead of benchmarks/results/{name}-DEVICE.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of each arm ({rounds})")
    return parser


def table(name: str, settings: Settings, facts: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """What a person reads."""
    cores, threads = facts["hardware/cpu_count"], facts["hardware/threads"]
    hardware = f"{facts['hardware/device']}, {cores} cores, {threads} threads"
    quick = ", --quick" if settings.quick else ""
    products = "float32" if facts["precision/float32_matmul"] == "highest" else "TF32"
    versions = f"torch {facts['versions/torch']}, {products} products"
    title = f"{name}: {hardware}, {versions}, {settings.rounds} rounds{quick}"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("")
    for heading in ("median", "quartiles", "ratio", "quartiles", "bar", "met"):
        shown.add_column(heading, justify="right")
    for line in rows:
        ratio = ("", "") if line.ratio is None else (f"{line.ratio.median:.3g}", str(line.ratio))
        bar = ("", "") if line.bar is None else (str(line.bar), "yes" if line.met else "NO")
        shown.add_row(line.name, f"{line.figure.median:.4g} {line.unit}", str(line.figure), *ratio, *bar)
    return shown


def record(name: str, settings: Settings, facts: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What a program reads: the table's figures, and what they depend on."""
    return {
        "benchmark": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": settings.quick,
        "rounds": settings.rounds,
        "provenance": dict(facts),
        "rows": [asdict(line) | {"bar": line.bar and str(line.bar), "met": line.met} for line in rows],
    }
