"""The figures of the evidence: run folders → results → a table by arm, with intervals.

Its columns are test accuracies in percent over seeds:

last epoch           no choice at all
best on validation   the epoch that was best on the held-out tenth of the training images
report's protocol    the best epoch on the *test* images, trained on all others. It flatters, and stands here
                     only because the report's figures read that way.

A gain is the mean over seeds of what an arm has over the student alone with the same seed, with a 95 %
interval by Student's t. All students have one teacher, so the interval is over students of this teacher.
"""

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from scipy import stats

REPORTED = {
    "teacher": 46.18,
    "student alone": 41.08,
    "encoder mse 0.00015": 42.86,
    "block mse 0.015": 42.17,
    "block kl 0.5": 43.33,
}
"""the report's accuracies in percent, one run each"""
ALONE, TEACHER = "student alone", "teacher"
PROTOCOL = "protocol"


@dataclass(frozen=True)
class Result:
    """What one run found, accuracies in percent."""

    stage: str
    arm: str
    seed: int
    last: float
    best: float
    """of the epoch that was best on whatever it validated with"""
    chosen: float | None
    """the accuracy by which that epoch was chosen"""
    device: str
    dataset: str


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    """of the mean's 95 % interval; None for a single seed"""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        mean = statistics.fmean(values)
        if len(values) < 2:
            return cls(mean, None, None, None)
        std = statistics.stdev(values)
        half = float(stats.t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
        return cls(mean, std, mean - half, mean + half)


def run_folders(place: Path) -> list[Path]:
    """The run folders below a stage's outputs."""
    return sorted(path.parent for path in place.glob("**/metrics.json"))


def state_of(folder: Path) -> str:
    """As a run's status.json says."""
    try:
        return str(json.loads((folder / "status.json").read_text("utf-8"))["state"])
    except (OSError, ValueError, KeyError):
        return "unknown"


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration."""
    text = (folder / "config.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return content


def results_of(outputs: Path) -> dict[Path, Result]:
    """Run folder → what it found, of all runs that are done."""
    return {
        path: read_result(stage.name, path)
        for stage in sorted(place for place in outputs.glob("*") if place.is_dir())
        for path in run_folders(stage)
        if state_of(path) == "done"
    }


def read_result(stage: str, folder: Path) -> Result:
    """One run's figures."""
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    config = read_config(folder)
    return Result(
        stage,
        TEACHER if stage.endswith(TEACHER) else arm_of(config),
        config["seed"],
        100 * metrics["test/acc_last"],
        100 * metrics["test/acc_best"],
        None if metrics["val/acc_best"] is None else 100 * metrics["val/acc_best"],
        metrics["hardware/device"],
        config["dataset"]["name"],
    )


def arm_of(config: dict[str, Any]) -> str:
    """What a student learned from: `block kl 0.5`."""
    if config["method"]["_target_"].endswith("NoDistillation") or config["alpha"] == 1:
        return ALONE
    granularity, loss = (
        config[key]["_target_"].rpartition(".")[2].lower() for key in ("granularity", "loss")
    )
    return f"{granularity} {loss} {config['alpha']:g}"


@dataclass(frozen=True)
class Line:
    """An arm's line of the table."""

    stage: str
    arm: str
    seeds: list[int]
    reported: float | None
    last: Estimate
    best: Estimate
    protocol: Estimate | None
    """the best epoch on the test images"""
    gain_last: Estimate | None
    gain_best: Estimate | None
    gain_protocol: Estimate | None


class Table:
    """All arms, stage by stage."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = sorted(results, key=lambda r: (r.stage, r.arm, r.seed))

    @cached_property
    def lines(self) -> list[Line]:
        """One an arm; the report's own come first."""
        order = [*REPORTED]
        arms = {(r.stage, r.arm) for r in self.results if not r.stage.startswith(PROTOCOL)}
        ranked = sorted(
            (stage == "grid", order.index(arm) if stage != "grid" else 0, stage, arm) for stage, arm in arms
        )
        return [self._line(stage, arm) for _, _, stage, arm in ranked]

    def _line(self, stage: str, arm: str) -> Line:
        own = self._of(stage, arm)
        alone = {} if arm in (ALONE, TEACHER) else self._of("cells", ALONE)
        protocol_stage = f"{PROTOCOL}-{stage}"
        chosen = self._chosen(protocol_stage, arm)
        chosen_alone = {} if arm in (ALONE, TEACHER) else self._chosen(protocol_stage, ALONE)
        return Line(
            stage,
            arm,
            sorted(own),
            REPORTED.get(arm) if all(r.dataset == "cifar100" for r in own.values()) else None,
            Estimate.of([result.last for result in own.values()]),
            Estimate.of([result.best for result in own.values()]),
            Estimate.of([*chosen.values()]) if chosen else None,
            gain({s: r.last for s, r in own.items()}, {s: r.last for s, r in alone.items()}),
            gain({s: r.best for s, r in own.items()}, {s: r.best for s, r in alone.items()}),
            gain(chosen, chosen_alone),
        )

    def _of(self, stage: str, arm: str) -> dict[int, Result]:
        """Seed → result; of several alike (alpha = 1 in a grid) one."""
        return {r.seed: r for r in self.results if (r.stage, r.arm) == (stage, arm)}

    def _chosen(self, stage: str, arm: str) -> dict[int, float]:
        return {s: r.chosen for s, r in self._of(stage, arm).items() if r.chosen is not None}

    def markdown(self, title: str) -> str:
        """What a person reads."""
        heads = [
            "",
            "seeds",
            "report",
            "last epoch",
            "gain",
            "best on validation",
            "gain",
            "report's protocol",
            "gain",
        ]
        rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
        rows += [
            [
                f"{line.arm} (grid)" if line.stage == "grid" else line.arm,
                str(len(line.seeds)),
                "" if line.reported is None else f"{line.reported:.2f}",
                *(spread(line.last), interval(line.gain_last)),
                *(spread(line.best), interval(line.gain_best)),
                *(spread(line.protocol), interval(line.gain_protocol)),
            ]
            for line in self.lines
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
        return f"# {title}\n\n{table}\n\n{LEGEND}\n"


LEGEND = """\
Test accuracy in percent, mean ± standard deviation over seeds; gains over the student alone, paired by seed,
with their 95 % interval. `report` is the report's figure of one run. `report's protocol` is the best epoch on
the test images, trained without held-out images; empty where that was not run. An arm's number is alpha, the
weight of the class loss."""


def gain(own: dict[int, float], alone: dict[int, float]) -> Estimate | None:
    """What `own` has over `alone`, by the seeds that both have; None if there are none."""
    shared = sorted(own.keys() & alone.keys())
    return Estimate.of([own[seed] - alone[seed] for seed in shared]) if shared else None


def spread(estimate: Estimate | None) -> str:
    """`42.10 ± 0.31`"""
    if estimate is None:
        return ""
    return f"{estimate.mean:.2f}" + ("" if estimate.std is None else f" ± {estimate.std:.2f}")


def interval(estimate: Estimate | None) -> str:
    """`+0.52 [−0.10, +1.14]`"""
    if estimate is None:
        return ""
    known = [value for value in (estimate.mean, estimate.low, estimate.high) if value is not None]
    # Adding 0 turns a rounded −0 into 0.
    signed = [f"{round(value, 2) + 0.0:+.2f}".replace("-", "−") for value in known]
    return signed[0] + (f" [{signed[1]}, {signed[2]}]" if len(signed) == 3 else "")


def collect(outputs: Path, place: Path) -> Path | None:
    """Copy the figures of all finished runs below `place`, and say where their table is; None without any."""
    results = results_of(outputs)
    if not results:
        return None
    device = " and ".join(sorted({result.device for result in results.values()}))
    home = place / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    for folder, result in results.items():
        copy = home / "runs" / result.stage / f"{result.arm.replace(' ', '_')}-seed_{result.seed}"
        copy.mkdir(parents=True, exist_ok=True)
        (copy / "metrics.json").write_bytes((folder / "metrics.json").read_bytes())
        write_rounded(folder / "metrics.csv", copy / "metrics.csv")
    table = Table(results.values())
    epochs = sorted({read_config(folder)["trainer"]["max_epochs"] for folder in results})
    title = f"Evidence: {device}, {' and '.join(map(str, epochs))} epochs"
    (home / "table.md").write_text(table.markdown(title), "utf-8")
    content = {"title": title, "arms": [*map(asdict, table.lines)], "runs": [*map(asdict, table.results)]}
    (home / "table.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return home / "table.md"


def write_rounded(source: Path, target: Path) -> None:
    """Copy a CSV file of numbers in six digits."""
    with (
        source.open(newline="", encoding="utf-8") as read,
        target.open("w", newline="", encoding="utf-8") as write,
    ):
        rows = csv.reader(read)
        writer = csv.writer(write, lineterminator="\n")
        writer.writerow(next(rows))
        for step, *values in rows:
            writer.writerow([step, *(f"{float(value):.6g}" if value else "" for value in values)])
