"""The progress of a training on the terminal: a line an epoch, and a bar."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

log = logging.getLogger("vitkd")

EPOCH_COLUMNS = {
    "train/total_loss": "loss {:.4f}",
    "train/transfer_loss": "transfer {:.4f}",
    "train/acc": "train {:.1%}",
    "val/acc": "val {:.1%}",
    "val/teacher_agreement": "agreement {:.1%}",
    "train/images_per_second": "{:,.0f} images/s",
}


class EpochLines(L.Callback):
    """One plain line an epoch, to the console and the log file; of a stack the median of every metric."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        columns = format_metrics({name: values.nanquantile(0.5).item() for name, values in metrics.items()})
        stacked = next(iter(metrics.values())).shape
        median = f"median of {stacked[0]}: " if stacked else ""
        log.info("epoch %d/%s  %s%s", trainer.current_epoch + 1, trainer.max_epochs, median, columns)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """An epoch's metrics in columns; what is absent or not a number is left out."""
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
