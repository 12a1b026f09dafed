"""What a module logs: curves as means over windows of steps, and no step that is not finite.

Written for one student or, by the leading axis that `stacked` adds, for several at once.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vitkd.train.guard import FiniteGuard
from vitkd.train.meter import Meter, Window


class LoggedModule(L.LightningModule):
    """Averages what its steps add to `window.meter` and `val_meter`, and hands the means to the loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.val_meter, self.window, self.guard = Meter(), Window(), FiniteGuard()
        self._latest: dict[str, float] = {}

    @property
    def is_logging_step(self) -> bool:
        """Whether a window of `log_every_n_steps` optimiser steps ends (and the next begins) here."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.trainer.global_step % every == 0

    def on_train_start(self) -> None:
        self.window.start()
        self.trainer.callback_metrics.update(tensors(self._latest))

    def on_train_epoch_start(self) -> None:
        self.window.start_epoch()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # The first hook after an optimiser step; a checkpoint at the step's end holds what this leaves.
        if self.is_logging_step or self.trainer.is_last_batch:
            self.check_finite()
            curves, throughput = self.window_curves(), self.window.close(self.trainer.world_size)
            for values, rate in zip(curves, scheduler.get_last_lr(), strict=True):
                # On CUDA a rate is a tensor, so that a graph can read it.
                values |= {"images_per_second": throughput, "lr": float(rate)}
            self._write("train", curves)
        scheduler.step()

    def on_validation_epoch_start(self) -> None:
        self.val_meter.reset()

    def on_validation_epoch_end(self) -> None:
        self._write("val", self.curves(self.val_meter.means(self._sum_over_processes)))

    def check_finite(self) -> None:
        """RunError if a loss or gradient so far was not finite; the weights are those before that step."""
        self.guard.check(self.trainer.global_step, self.trainer.current_epoch + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        latest = {name: value.tolist() for name, value in self.trainer.callback_metrics.items()}
        checkpoint["curves"] = {"window": self.window.state_dict(), "latest": latest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.window.load_state_dict(checkpoint["curves"]["window"], self.device)
        self._latest = checkpoint["curves"]["latest"]

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        """Each curve's name and value, of each student; several entries of a measure are several curves."""
        return [{name: value for name, (value,) in means.items()}]

    def window_curves(self) -> list[dict[str, float]]:
        """The training curves' values since the last window, of each student."""
        return self.curves(self.window.meter.means(self._sum_over_processes))

    def summary(self, curves: list[dict[str, float]]) -> Mapping[str, float | list[float]]:
        """What callbacks see of the students' curves."""
        return curves[0]

    def _write(self, phase: str, curves: list[dict[str, float]]) -> None:
        """Hand each student's values to the loggers that are its own."""
        # Not self.log: four of its calls a step cost 2 ms, and these values are means already.
        curves = [{f"{phase}/{name}": value for name, value in values.items()} for values in curves]
        self.trainer.callback_metrics.update(tensors(self.summary(curves)))
        share = len(self.loggers) // len(curves)
        for student, values in enumerate(curves):
            for logger in self.loggers[student * share : (student + 1) * share]:
                logger.log_metrics(values, step=self.trainer.global_step)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums, reduce_op="sum") if self.trainer.world_size > 1 else sums


def tensors(values: Mapping[str, float | list[float]]) -> dict[str, Tensor]:
    """Each value as a tensor, as Lightning's callbacks expect metrics."""
    return {name: torch.tensor(value) for name, value in values.items()}
