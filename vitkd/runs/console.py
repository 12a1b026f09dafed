"""What a person reads while a run goes on: what was chosen, one line an epoch, and a table at the end."""

import logging
import math
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vitkd.runs.folder import RunFolder
from vitkd.runs.processes import is_first

log = logging.getLogger("vitkd")

EPOCH_COLUMNS = {
    "train/total_loss": "loss {:.4f}",
    "train/transfer_loss": "transfer {:.4f}",
    "train/acc": "train {:.1%}",
    "val/acc": "val {:.1%}",
    "val/teacher_agreement": "agreement {:.1%}",
    "train/images_per_second": "{:,.0f} images/s",
}
JOB_COLUMNS = {
    "teacher/test_acc": "teacher",
    "val/acc_best": "val best",
    "test/acc_best": "test best",
    "test/acc_last": "test last",
}

KNOWN_AND_MEANT = (
    # The data lies on the device already; loader workers would only slow it down.
    ".*does not have many workers.*",
    # The last batch of an epoch is always logged.
    ".*smaller than the logging interval.*",
    # The optimiser of steps that are replayed; the first ones are not yet.
    ".*constructed with capturable=True.*",
    # trainer=cpu is meant.
    ".*GPU available but not used.*",
    # A step that is replayed from a CUDA graph takes its loss with it.
    ".*`training_step` returned `None`.*",
    # Lightning 2.6 under a newer PyTorch.
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",
)


@dataclass
class Job:
    """What a sweep's record and its closing table tell of one of its jobs."""

    number: int
    settings: dict[str, str]
    """What the command line set: {"alpha": "0.5", "loss": "kl"}."""
    state: str = "not run"
    """done, done before, failed, stopped, running elsewhere, or not run."""
    folder: str | None = None
    error: str | None = None
    figures: dict[str, float | None] = field(default_factory=dict)
    """By the names of JOB_COLUMNS."""


class EpochLines(L.Callback):
    """One plain line an epoch, to the console and the log file."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        told = told_figures({name: value.item() for name, value in metrics.items()})
        log.info("epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, told)


class StackLines(L.Callback):
    """One plain line an epoch about the students of a stack: of every figure the median."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        medians = {name: values.nanquantile(0.5).item() for name, values in trainer.callback_metrics.items()}
        students = len(next(iter(trainer.callback_metrics.values())))
        told = f"median of {students}: {told_figures(medians)}"
        log.info("epoch %d/%s  %s", trainer.current_epoch + 1, trainer.max_epochs, told)


def told_figures(metrics: Mapping[str, float]) -> str:
    """An epoch's figures; what is not a number is left out."""
    known = {
        name: text for name, text in EPOCH_COLUMNS.items() if not math.isnan(metrics.get(name, math.nan))
    }
    return "  ".join(text.format(metrics[name]) for name, text in known.items())


class ProgressBar(L.Callback):
    """One bar for the whole training, below the epochs' lines; gone when it ends."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._task = self._progress.add_task("", total=trainer.estimated_stepping_batches)
        self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.update(self._task, description=epoch, completed=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._progress.stop()


class ConsoleLines(logging.Handler):
    """Prints to whatever stdout is at that moment, so that a progress bar can keep below."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def start_logging() -> None:
    """Send the log's lines to the console, and quieten what Lightning says about itself."""
    if not log.handlers:
        log.addHandler(ConsoleLines() if is_first() else logging.NullHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in KNOWN_AND_MEANT:
        warnings.filterwarnings("ignore", message=message)


def is_terminal() -> bool:
    """Whether a person watches, so that a progress bar makes sense."""
    return sys.stdout.isatty()


def percent(value: float | None) -> str:
    """A share as a percentage with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2%}"


def print_results(metrics: Mapping[str, Any], folder: RunFolder, outputs: str) -> None:
    """The closing table: every model's accuracy, then where everything lies."""
    table = new_table("", "parameters", "val acc", "test acc", "agrees with teacher")
    if metrics["teacher/parameters"]:
        size = f"{metrics['teacher/parameters']:,}"
        table.add_row("teacher", size, "", percent(metrics["teacher/test_acc"]), "")
    for key, label, epoch, suffix in (
        ("last", "last", "epochs", ""),
        ("best", "best-on-val", "best_epoch", "_best"),
    ):
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
    show("", table, "", *lines, f"curves    tensorboard --logdir {outputs}")


def print_jobs(jobs: Sequence[Job]) -> None:
    """All jobs of a sweep beside each other, those that failed or never ran as well; nothing for no jobs."""
    if not jobs or all(job.state == "not run" for job in jobs):
        return
    table = new_table("job", "state", *JOB_COLUMNS.values(), "folder", text=("state", "folder"))
    for job in jobs:
        settings = job.settings.items()
        told = {key: value for key, value in settings if any(value != j.settings.get(key) for j in jobs)}
        name = " ".join(f"{key}={value}" for key, value in (told or job.settings).items())
        place = Path(job.folder).name if job.folder else ""
        accuracies = (percent(job.figures.get(key)) for key in JOB_COLUMNS)
        table.add_row(f"{job.number} {name}", job.state, *accuracies, place)
    parents = dict.fromkeys(str(Path(job.folder).parent) for job in jobs if job.folder)
    errors = [f"job {job.number} failed: {job.error}" for job in jobs if job.error]
    show("", table, "", *(f"folders   {parent}" for parent in parents), *errors)


def show(*parts: Table | str) -> None:
    """Print tables and lines to the terminal, or plainly to a file or pipe."""
    console = Console(highlight=False, width=None if is_terminal() else 120)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def new_table(first: str, *columns: str, text: Collection[str] = ()) -> Table:
    """A table without lines; its first column and those of `text` hold text, the others figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (first, *columns):
        justify: JustifyMethod = "left" if column == first or column in text else "right"
        table.add_column(column, justify=justify, overflow="fold")
    return table


def print_comparison(reported: Mapping[str, Any], measured: Mapping[str, float]) -> bool:
    """The figures measured again, each beside the reported one; returns whether all are equal."""
    table = new_table("", "measured now", "reported by the run", "")
    for name, value in measured.items():
        verdict = "equal" if value == reported.get(name) else "differs"
        table.add_row(name, repr(value), repr(reported.get(name)), verdict)
    show(table)
    return all(value == reported.get(name) for name, value in measured.items())
