"""What a module logs: curves as means over windows of steps, and no step that is not finite.

Written for one student or, by the leading axis that `stacked` adds, for several at once.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vitkd.models.output import at_least_float32
from vitkd.train.guard import FiniteGuard


class Meter:
    """Sums of per-image values over batches; reading costs one host sync, adding none.

    The sums keep their place in memory, so that a CUDA graph can add to them. torchmetrics, which measures
    finished runs, does not serve here: `MulticlassAccuracy` puts new tensors in place of its state at each
    update, a `MeanMetric` makes one mean of what a stack keeps apart, and each metric is reduced and read by
    itself. For three losses and an accuracy it takes 5.6 times as long as the meter, which is 0.22 ms a step
    more (one thread of a CPU, `OMP_NUM_THREADS=1 python -m benchmarks.overhead`, rows `curves`).
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """What was added since the last reset."""
        return [name for name, count in self._counts.items() if count]

    def reset(self) -> None:
        """Forget everything."""
        self.images = 0
        self._counts = dict.fromkeys(self._counts, 0)
        for total in self._sums.values():
            total.zero_()

    def add(self, means: Mapping[str, Tensor], images: int) -> None:
        """Add one batch of `images` images: per name its mean over them, any shape."""
        for name, mean in means.items():
            value = at_least_float32(mean.detach())
            if name in self._sums:
                self._sums[name].add_(value, alpha=images)
            else:
                self._sums[name] = value * images
        self.count(means.keys(), images)

    def count(self, names: Collection[str], images: int) -> None:
        """Count a batch whose values `names` a CUDA graph has added."""
        self.images += images
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + images

    def counts(self) -> tuple[int, dict[str, int]]:
        """What the host knows: how many images, and of how many each value is the sum."""
        return self.images, dict(self._counts)

    def set_counts(self, counts: tuple[int, dict[str, int]]) -> None:
        """Undo the counting of batches since `counts`, which were not taken after all."""
        self.images, self._counts = counts[0], dict(counts[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything added, as plain data and tensors."""
        sums = {name: self._sums[name] for name in self.names}
        return {"images": self.images, "counts": {name: self._counts[name] for name in sums}, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from `state`."""
        self.images, self._counts = state["images"], dict(state["counts"])
        self._sums = {name: tensor.to(device) for name, tensor in state["sums"].items()}

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, list[float]]:
        """Per name the means so far, flattened; empty if nothing was added.

        `reduce` sums a tensor over processes, so that uneven shares of images still count exactly.
        """
        names = self.names
        if not names:
            return {}
        flat = [self._sums[name].flatten() for name in names]
        counts = torch.tensor([float(self._counts[name]) for name in names], device=flat[0].device)
        numbers = iter(reduce(torch.cat([counts, *flat])).tolist())
        images = [next(numbers) for _ in names]
        return {
            name: [next(numbers) / count for _ in tensor]
            for name, count, tensor in zip(names, images, flat, strict=True)
        }


class Window:
    """The training curves since they were last logged, and the throughput, without time for validation."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.images_trained, self.seconds_trained = 0, 0.0
        self._start, self._seconds_before = 0.0, 0.0
        self._norms: dict[str, Tensor] = {}

    def start(self) -> None:
        """Time runs from now."""
        self._start = time.perf_counter()

    def start_epoch(self) -> None:
        """Time runs from now, and what was measured of the window before does not count."""
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def keep_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Keep a logged step's gradient norms, as copies: the next replay of a graph overwrites them."""
        self._norms = {name: norm.clone() for name, norm in norms.items()}

    def take_norms(self) -> dict[str, Tensor]:
        """The gradient norms of the last logged step, once."""
        norms, self._norms = self._norms, {}
        return norms

    def close(self, processes: int) -> float:
        """End the window, and begin the next; returns images per second over all processes."""
        now = time.perf_counter()
        seconds = self._seconds_before + now - self._start
        images = self.meter.images * processes
        self.images_trained += images
        self.seconds_trained += seconds
        self.meter.reset()
        self._start, self._seconds_before = now, 0.0
        return images / seconds

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data and tensors."""
        return {
            "meter": self.meter.state_dict(),
            "seconds": self._seconds_before + time.perf_counter() - self._start,
            "images_trained": self.images_trained,
            "seconds_trained": self.seconds_trained,
            "gradient_norms": dict(self._norms),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Continue from `state`."""
        self.meter.load_state_dict(state["meter"], device)
        self._seconds_before = state["seconds"]
        self.images_trained, self.seconds_trained = state["images_trained"], state["seconds_trained"]
        self._norms = {name: norm.to(device) for name, norm in state["gradient_norms"].items()}


class LoggedModule(L.LightningModule):
    """Averages what its steps add to `window.meter` and `val_meter`, and hands the means to the loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.val_meter, self.window, self.guard = Meter(), Window(), FiniteGuard()
        self.average: Callable[[L.LightningModule], None] | None = None
        """averages the weights of the module after each step, if anything does"""
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
            for values, rate in zip(curves, self.learning_rates(scheduler), strict=True):
                # On CUDA a rate is a tensor, so that a graph can read it.
                values |= {"images_per_second": throughput, "lr": float(rate)}
            self._write("train", curves)
        scheduler.step()

    def learning_rates(self, scheduler: Any) -> list[float]:
        """The learning rate now, of each student; the head's, where each layer has one of its own."""
        return [max(scheduler.get_last_lr())]

    def average_weights(self) -> None:
        """The end of each step, within a CUDA graph of it."""
        if self.average is not None:
            self.average(self)

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
