"""What the terminal shows of a run: what was chosen, one line an epoch, and a table at the end."""

import logging
import math
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from vitkd.process.distributed import is_first
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

JOB_COLUMNS = {
    "teacher/test_acc": "teacher",
    "val/acc_best": "val best",
    "test/acc_best": "test best",
    "test/acc_last": "test last",
}

MAX_CLASSES, MAX_MISTAKES = 5, 3
"""The classes shown as the hardest, and what else each is taken for."""

EXPECTED_WARNINGS = (
    # The data lies on the device already; loader workers would only slow it down.
    ".*does not have many workers.*",
    # The last batch of an epoch is always logged.
    ".*smaller than the logging interval.*",
    # The optimiser of steps that are replayed; the first ones are not yet.
    ".*constructed with capturable=True.*",
    # With trainer=cpu that is intended.
    ".*GPU available but not used.*",
    # A step that is replayed from a CUDA graph takes its loss with it.
    ".*`training_step` returned `None`.*",
    # The teacher in a student of method=copy, and merged students whose heads alone are trained.
    ".*in eval mode at the start of training.*",
    # Lightning 2.6 under a newer PyTorch.
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    # PyTorch 2.10, which only reads them, of the files of torch.export.
    ".*The given buffer is not writable.*",
)


@dataclass
class Job:
    """What a sweep records of one of its jobs, and shows in its closing table."""

    number: int
    settings: dict[str, str]
    """What the command line set: {"alpha": "0.5", "loss": "kl"}."""
    state: str = "not run"
    """done, done before, failed, stopped, running elsewhere, or not run."""
    folder: str | None = None
    error: str | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    """By the names of JOB_COLUMNS."""

    def take_metrics(self, metrics: Mapping[str, Any]) -> float | None:
        """Record those of a run's metrics that the table shows; returns the best accuracy on validation."""
        self.metrics = {name: metrics.get(name) for name in JOB_COLUMNS}
        return self.metrics["val/acc_best"]


class ConsoleLines(logging.Handler):
    """Prints to whatever stdout is at that moment, so that a progress bar can keep below."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def start_logging() -> None:
    """Send the log's lines to the console, and leave out Lightning's own and expected warnings."""
    if not log.handlers:
        log.addHandler(ConsoleLines() if is_first() else logging.NullHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def is_terminal() -> bool:
    """Whether stdout is a terminal, where a progress bar makes sense."""
    return sys.stdout.isatty()


def percent(value: float | None) -> str:
    """A share as a percentage with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2%}"


def print_results(metrics: Mapping[str, Any], folder: RunFolder, outputs: Path) -> None:
    """The closing table: every model's accuracy, then where everything lies."""
    table = new_table("", "parameters", "val acc", "test acc", "agrees with teacher")
    if metrics["teacher/parameters"]:
        size = f"{metrics['teacher/parameters']:,}"
        table.add_row("teacher", size, "", percent(metrics["teacher/test_acc"]), "")
    for key, label, epoch, suffix in (
        ("last", "last", "epochs", ""),
        ("best", "best-on-val", "best_epoch", "_best"),
    ):
        if metrics[f"val/acc_{key}"] is None and key == "best":
            continue  # no epoch was validated
        agreement = metrics.get(f"test/teacher_agreement{suffix}")
        table.add_row(
            f"student, {label} epoch ({metrics[epoch]})",
            f"{metrics['student/parameters']:,}",
            percent(metrics[f"val/acc_{key}"]),
            percent(metrics[f"test/acc_{key}"]),
            "" if agreement is None else percent(agreement),
        )
        for token in ("class_token", "distillation_token"):
            if (alone := metrics.get(f"test/acc_{key}_{token}")) is not None:
                table.add_row(f"  its {token.replace('_', ' ')} alone", "", "", percent(alone), "")
    places = {"run": folder.path, "pictures": folder.pictures, "model": folder.student}
    lines = [f"{name:<9} {path}" for name, path in places.items() if path.exists()]
    has_events = any(folder.path.glob("events.out.tfevents.*"))
    curves = f"tensorboard --logdir {outputs}" if has_events else folder.csv
    show("", table, "", *lines, f"curves    {curves}")


def print_jobs(jobs: Sequence[Job]) -> None:
    """All jobs of a sweep beside each other, those that failed or never ran as well; nothing for no jobs."""
    if not jobs or all(job.state == "not run" for job in jobs):
        return
    table = new_table("job", "state", *JOB_COLUMNS.values(), "folder", text=("state", "folder"))
    for job in jobs:
        settings = job.settings.items()
        own = {key: value for key, value in settings if any(value != j.settings.get(key) for j in jobs)}
        name = " ".join(f"{key}={value}" for key, value in (own or job.settings).items())
        place = Path(job.folder).name if job.folder else ""
        accuracies = (percent(job.metrics.get(key)) for key in JOB_COLUMNS)
        table.add_row(f"{job.number} {name}", job.state, *accuracies, place)
    parents = dict.fromkeys(str(Path(job.folder).parent) for job in jobs if job.folder)
    failed: dict[str, list[int]] = {}
    for job in jobs:
        if job.error:
            failed.setdefault(job.error, []).append(job.number)
    lines = [f"{names_of_jobs(numbers)} failed: {error}" for error, numbers in failed.items()]
    show("", table, "", *(f"folders   {parent}" for parent in parents), *lines)


def names_of_jobs(numbers: Iterable[int]) -> str:
    """`jobs 0-3, 7`."""
    spans: list[list[int]] = []
    for number in (ordered := sorted(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"job{'s' if len(ordered) > 1 else ''} {listed}"


def show(*parts: Table | str) -> None:
    """Print tables and lines to the terminal, or plainly to a file or pipe."""
    # Names of runs are no markup: "[red]" and ":bug:" stay what they are.
    console = Console(highlight=False, markup=False, emoji=False, width=None if is_terminal() else 120)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def new_table(first: str, *columns: str, text: Collection[str] = ()) -> Table:
    """A table without lines; its first column and those of `text` hold text, the others numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (first, *columns):
        justify: JustifyMethod = "left" if column == first or column in text else "right"
        table.add_column(column, justify=justify, overflow="fold")
    return table


def print_comparison(reported: Mapping[str, Any], measured: Mapping[str, float]) -> bool:
    """Print the metrics measured again beside the reported ones; returns whether all are equal."""
    # What is not a number is null in metrics.json.
    plain = {name: None if math.isnan(value) else value for name, value in measured.items()}
    equals = {name: name in reported and value == reported[name] for name, value in plain.items()}
    table = new_table("", "measured now", "reported by the run", "")
    for name, value in measured.items():
        verdict = "equal" if equals[name] else "differs"
        table.add_row(name, repr(value), repr(reported.get(name)), verdict)
    show(table)
    return all(equals.values())


def print_hardest_classes(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """Print the classes of lowest accuracy below 1, and what their images are taken for most often.

    `confusion` [C, C] holds how many images of each class (rows) were predicted as each class (columns).
    """
    accuracies = {true: row[true] / sum(row) for true, row in enumerate(confusion) if sum(row) > row[true]}
    if not accuracies:
        return
    hardest = sorted(accuracies, key=lambda true: (accuracies[true], true))[:MAX_CLASSES]
    table = new_table("hardest classes", "images", "accuracy", "taken for", text=("taken for",))
    for true in hardest:
        mistakes = {other: images for other, images in enumerate(confusion[true]) if images and other != true}
        most = sorted(mistakes, key=lambda other: (-mistakes[other], other))[:MAX_MISTAKES]
        named = ", ".join(f"{class_names[other]} ({mistakes[other]:,})" for other in most)
        table.add_row(class_names[true], f"{sum(confusion[true]):,}", percent(accuracies[true]), named)
    show("", table)
