"""When a run is saved, and everything that it needs to resume bit for bit."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Signals
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from vitkd.models import Model, describe
from vitkd.process.distributed import gather, rank
from vitkd.process.signals import TERMINATED, PostponedSignals
from vitkd.runs.checkpoints import write_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackFolder

log = logging.getLogger("vitkd")

# What Lightning's validation loop counts before its first batch: resumed from these counts, it validates all.
NO_BATCH_YET = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


class Checkpointing(Callback):
    """Saves last.ckpt at every epoch's end, every few minutes and before a signal takes effect.

    Everything that a resumed run needs lies in that one file, the best epoch's weights included, so that no
    two files can disagree. best.ckpt is a copy of those weights.

    Args:
        folder: the run's, or a stack's.
        minutes: after so long a step is saved too; 0 saves every step.
        signals: those that wait for a checkpoint.
    """

    def __init__(self, folder: RunFolder | StackFolder, minutes: float, signals: PostponedSignals) -> None:
        self.folder, self.seconds, self.signals = folder, 60 * minutes, signals
        self.acc_last: Any = None
        self.acc_best: Any = None
        """the validation accuracies, in a stack a list with each student's; None before the first"""
        self.best: dict[str, Any] | None = None
        """the best epoch and its weights"""
        self._has_improved = False
        self._seconds_before = 0.0
        self._start = self._saved = time.perf_counter()
        self._random_state: dict[str, Tensor] | None = None

    @property
    def wall_seconds(self) -> float:
        """How long this run has trained: now, and in earlier attempts up to their last saves."""
        return self._seconds_before + time.perf_counter() - self._start

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has installed a handler of its own, which ends the run without saving.
        self.signals.install()
        if self._random_state is not None:
            set_random_state(self._random_state, trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # An epoch without validation must not show the metrics of the one before.
        for name in [name for name in trainer.callback_metrics if name.startswith("val/")]:
            del trainer.callback_metrics[name]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # A run that resumes from a step does not validate after it.
        if has_stepped(trainer) and not is_validation_next(trainer) and self._is_due(trainer):
            self._save(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.sanity_checking or not has_stepped(trainer):
            return
        if self._anywhere(trainer, bool(self.signals.waiting)):
            with training_weights(trainer):
                self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/acc")
        self.acc_last = None if accuracy is None else accuracy.item()
        if self.acc_last is not None and (self.acc_best is None or self.acc_last > self.acc_best):
            self.acc_best, self._has_improved = self.acc_last, True
        self._save(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["random_state"] = random_state(trainer.strategy.root_device)
        if trainer.validating:
            progress = {"total": dict(NO_BATCH_YET), "current": dict(NO_BATCH_YET)}
            checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] |= progress
        if self._has_improved:
            # Not from the module: where weights are averaged, these are the average, as it was validated. Of
            # an objective's projections and banks there is no best.
            weights = {
                name: values.detach().to("cpu", copy=True)
                for name, values in checkpoint["state_dict"].items()
                if name.startswith("model.")
            }
            self.best, self._has_improved = {"epoch": trainer.current_epoch, "state_dict": weights}, False
        checkpoint["training"] = {
            "acc_last": self.acc_last,
            "acc_best": self.acc_best,
            "best": self.best,
            "wall_seconds": self.wall_seconds,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        saved = checkpoint["training"]
        self.acc_last, self.acc_best, self.best = saved["acc_last"], saved["acc_best"], saved["best"]
        self._seconds_before = saved["wall_seconds"]
        self._random_state = checkpoint["random_state"]

    def write_best(self, model: Model) -> None:
        """Write the best epoch's weights, shaped as `model`, to best.ckpt."""
        if self.best is not None:
            write_checkpoint(self.folder.best, {**self.best, "model": describe(model)})

    def _is_due(self, trainer: L.Trainer) -> bool:
        waited_long = time.perf_counter() - self._saved >= self.seconds
        return self._anywhere(trainer, waited_long or bool(self.signals.waiting))

    @staticmethod
    def _anywhere(trainer: L.Trainer, condition: bool) -> bool:
        """Whether the condition holds in any process of the run, so that all of them save together."""
        return trainer.strategy.reduce_boolean_decision(condition, all=False)

    def _save(self, trainer: L.Trainer) -> None:
        """Write the curves, then the checkpoint, then let signals take effect."""
        for logger in trainer.loggers:
            logger.save()
        improved = self._has_improved
        trainer.save_checkpoint(self.folder.last)
        if improved and trainer.is_global_zero:
            self.write_best(trainer.lightning_module.model)  # type: ignore[arg-type]
        self._saved = time.perf_counter()
        if not self._anywhere(trainer, bool(self.signals.waiting)):
            # A signal that arrives later waits for the next save: all processes must stop together.
            return
        if trainer.is_global_zero:
            names = " ".join(Signals(number).name for number in self.signals.waiting)
            log.info("%s: saved at step %d; resume=auto resumes from there", names, trainer.global_step)
        if not self.signals.waiting:
            # Another process of this run received the signal.
            sys.exit(TERMINATED)
        self.signals.deliver()


def has_stepped(trainer: L.Trainer) -> bool:
    """Whether the last batch completed a step; gradients still being accumulated are not saved."""
    batches = trainer.fit_loop.epoch_loop.batch_idx + 1
    return trainer.is_last_batch or batches % trainer.accumulate_grad_batches == 0


def is_validation_next(trainer: L.Trainer) -> bool:
    """Whether Lightning may validate after this training batch."""
    loop = trainer.fit_loop.epoch_loop
    batches = 1 + (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx)
    return trainer.is_last_batch or batches % (trainer.val_check_batch or math.inf) == 0


def averages_of(trainer: L.Trainer) -> list[WeightAveraging]:
    """The callbacks that average the weights."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


@contextmanager
def training_weights(trainer: L.Trainer) -> Iterator[None]:
    """During validation by averaged weights, put the trained weights back while the body runs."""
    module = trainer.lightning_module
    averages = averages_of(trainer)
    for average in averages:
        average.on_validation_epoch_end(trainer, module)
    yield
    for average in averages:
        average.on_validation_epoch_start(trainer, module)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that training on `device` draws from: [processes, bytes] each."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return {name: gather(state) for name, state in states.items()}


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put this process's generators into the state that `random_state` found there."""
    if rank() >= len(states["cpu"]):
        return  # there were fewer processes then; this one keeps its seed
    # Clones: PyTorch reads past the end of a row that does not lie at its storage's beginning.
    own = {name: state[rank()].clone() for name, state in states.items()}
    torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
    elif device.type == "mps" and "mps" in own:
        torch.mps.set_rng_state(own["mps"])
