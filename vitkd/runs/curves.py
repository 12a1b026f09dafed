"""The curves of a run: metrics.csv, and TensorBoard's events.

Both are written during the run and can be continued from any step, so that a run that was killed and resumed
leaves the same curves as an uninterrupted one: no step twice, none missing.
"""

import csv
import io
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams

from vitkd.config.roles import Separates, relevant
from vitkd.runs.files import force_to_disk, read_rows, write_atomically

log = logging.getLogger("vitkd")

CHARTS = {
    "losses": {
        "training": ["Multiline", ["train/class_loss", "train/transfer_loss", "train/total_loss"]],
        "validation": ["Multiline", ["val/class_loss", "val/transfer_loss", "val/total_loss"]],
    },
    "accuracy": {"student": ["Multiline", ["train/acc", "val/acc", "val/teacher_agreement"]]},
    "weights": {
        "gradient norms": ["Multiline", ["train/gradient_norm_class", "train/gradient_norm_transfer"]],
        "terms, where they change": ["Multiline", ["train/class_weight", "train/transfer_weight"]],
    },
}
"""TensorBoard's custom scalar page: the curves that share a chart."""


class CurveLogger(Logger):
    """A logger that takes pictures too, and what is known only at a run's end."""

    def log_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Log a picture [H, W, 3] uint8."""

    def conclude(
        self, settings: Mapping[str, Any], ignored: Collection[str], metrics: Mapping[str, float]
    ) -> None:
        """Log a finished run's test metrics; `ignored` are those of its settings that had no effect."""


class MetricsFile(CurveLogger):
    """metrics.csv: one row a step, one column a curve, each row on disk as soon as it is known.

    Args:
        path: the file.
        start: the step to resume from; later rows, of an interrupted attempt, are dropped.
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = ["step"]
        self._row: dict[str, Any] = {}
        self._row_begins = 0
        before = self._rows_before()
        rows = [row for row in before if int(row["step"]) <= start]
        values = {int(row["step"]): {n: v for n, v in row.items() if v and n != "step"} for row in before}
        self.kept = {
            step: {n: float(v) for n, v in row.items()} for step, row in values.items() if step <= start
        }
        """step → the values of the curves up to `start`"""
        self.dropped = {step: {*row} for step, row in values.items() if step > start}
        """step → the curves that an interrupted attempt has logged after `start`"""
        self._columns += [name for row in rows[:1] for name in row if name != "step"]
        self._rewrite(rows)

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the step's row, or add to it if it is the last one."""
        assert step is not None, "a row has a step"
        if new := [name for name in metrics if name not in self._columns]:
            rows, _ = read_rows(self.path)
            self._columns += new
            self._rewrite(rows)
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            if self._row.get("step") == step:
                file.seek(self._row_begins)
            else:
                self._row, self._row_begins = {"step": step}, file.seek(0, io.SEEK_END)
            self._row |= metrics
            csv.DictWriter(file, self._columns).writerow(self._row)
            file.truncate()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml has them."""

    def save(self) -> None:
        """Force the rows to disk."""
        with self.path.open("r+b") as file:
            force_to_disk(file)

    def _rows_before(self) -> list[dict[str, str]]:
        """What an earlier attempt left; if not all of it can be read, the file is kept under another name."""
        if not os.path.lexists(self.path):
            return []
        try:
            rows, bad = read_rows(self.path)
        except OSError:
            rows, bad = [], 1
        if bad:
            kept = self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            log.warning("warning: %s: %d lines cannot be read; it is kept as %s", self.path, bad, kept.name)
        return rows

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows[:-1])
        self._row_begins = len(text.getvalue().encode())
        writer.writerows(rows[-1:])
        self._row = {**rows[-1], "step": int(rows[-1]["step"])} if rows else {}
        write_atomically(self.path, text.getvalue())


class TensorBoardCurves(TensorBoardLogger, CurveLogger):
    """TensorBoard events in the run folder itself.

    Args:
        folder: the run's.
        start: the step to resume from; TensorBoard discards what an interrupted attempt wrote after it.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        if not start:
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
        purge_step = start + 1 if start else None
        super().__init__(folder, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.experiment.add_custom_scalars(CHARTS)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write all values as one event: as many events as values take twenty times as long."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        # Opens the file again where Lightning has closed it.
        self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    def log_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """As `CurveLogger.log_picture`."""
        # Not add_figure: it imports pyplot, which looks for a display.
        self.experiment.add_image(tag, picture, step, dataformats="HWC")

    def save(self) -> None:
        """Write the events out; config.yaml holds what Lightning would write here a second time."""
        self.experiment.flush()

    def conclude(
        self, settings: Mapping[str, Any], ignored: Collection[str], metrics: Mapping[str, float]
    ) -> None:
        """Put the finished run on the HParams page: what separates arms of an experiment, and the seed.

        Settings that had no effect are empty cells. No run says which columns there are, or TensorBoard would
        take those of the first run by name for all: so it shows every run's, those that differ first.
        """
        shown: dict[str, Any] = {"seed": settings["seed"]}
        for name, value in relevant(settings, Separates.ARMS).items():
            if any(f"{name}.".startswith(f"{unread}.") for unread in ignored):
                continue
            if name.endswith("._target_"):
                shown[name.removesuffix("._target_")] = value.rpartition(".")[2]
            else:
                shown[name] = value if isinstance(value, int | float | str) else str(value)
        shown["dataset"] = shown.pop("dataset.name")
        self.log_metrics(metrics)
        _, start, end = hparams(shown, {})
        for summary in (start, end):
            self.experiment._get_file_writer().add_summary(summary)
        self.finalize("success")
