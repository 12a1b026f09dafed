"""Fitting one module in one run folder: the same for a teacher and for a student."""

import inspect
import math
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from vitkd.data import ImageDataModule
from vitkd.distill.modules import ClassifyModule
from vitkd.errors import ConfigError, suggest
from vitkd.models import ViT
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.console import EpochLines, ProgressBar, is_terminal
from vitkd.runs.folder import RunFolder
from vitkd.runs.tensorboard import Curves

# What Lightning's Trainer takes but vitkd decides.
DECIDED = {
    *("logger", "callbacks", "plugins", "profiler", "default_root_dir", "log_every_n_steps", "barebones"),
    *("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "use_distributed_sampler"),
    *("fast_dev_run", "overfit_batches", "max_time", "max_steps", "min_steps", "min_epochs"),
}
COUNTS = ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")


class Settings(Protocol):
    """The part of a run's configuration that fitting reads."""

    log_every_n_steps: int
    trainer: dict[str, Any]


class Fitted(NamedTuple):
    """What a fit leaves, read back from its checkpoints."""

    last: ViT
    best: ViT
    """of the epoch with the best validation accuracy, the earliest of equals; `last` without validation"""
    metrics: dict[str, Any]


class KeepLastAndBest(Callback):
    """Saves every epoch's end as last.ckpt and, when validation accuracy rises, as best.ckpt."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.acc_last: float | None = None
        self.acc_best: float | None = None
        self.best_epoch: int | None = None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # An epoch without validation must not pass off the figures of the one before as its own.
        for name in [name for name in trainer.callback_metrics if name.startswith("val/")]:
            del trainer.callback_metrics[name]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/acc")
        self.acc_last = None if accuracy is None else accuracy.item()
        if self.acc_last is not None and (self.acc_best is None or self.acc_last > self.acc_best):
            self.acc_best, self.best_epoch = self.acc_last, trainer.current_epoch + 1
            trainer.save_checkpoint(self.folder.best)
        trainer.save_checkpoint(self.folder.last)

    def state_dict(self) -> dict[str, Any]:
        return {"acc_last": self.acc_last, "acc_best": self.acc_best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


def check_trainer(settings: dict[str, Any]) -> None:
    """ConfigError unless Lightning's Trainer, and this project's use of it, take all of `settings`."""
    accepted = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} - DECIDED
    for name, value in settings.items():
        if name in DECIDED:
            raise ConfigError(f"trainer.{name}: is decided by vitkd; leave it out")
        if name not in accepted:
            raise ConfigError(f"trainer.{name}: no such setting; {suggest(name, accepted)}")
        if name in COUNTS and not (type(value) is int and value >= 1):
            raise ConfigError(f"trainer.{name}={value}: must be a whole number of at least 1")
    batches, clip = settings.get("limit_train_batches"), settings.get("gradient_clip_val")
    if batches is not None and not batches > 0:
        raise ConfigError(f"trainer.limit_train_batches={batches}: must be above 0, or null for all")
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"trainer.gradient_clip_val={clip}: must be a finite number above 0, or null")
    try:
        world_size = L.Trainer(**settings, logger=False, enable_checkpointing=False).world_size
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"trainer: {one_line(error)}; trainer=auto fits this machine") from error
    if world_size > 1:
        # The other processes would wait for the teacher's lock, and this one for them.
        raise ConfigError(f"trainer.devices: {world_size} processes for one run are not supported; use 1")


def one_line(error: Exception) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split()).rstrip(".!")


def build_trainer(folder: RunFolder, settings: Settings, callbacks: list[Callback]) -> L.Trainer:
    """Lightning's Trainer with this project's loggers and habits."""
    bar = [ProgressBar()] if is_terminal() else []
    return L.Trainer(
        **{
            "num_sanity_val_steps": 0,
            **settings.trainer,
            "logger": [Curves(folder.path), CSVLogger(folder.path, "", "", flush_logs_every_n_steps=1)],
            "callbacks": [*callbacks, KeepLastAndBest(folder), EpochLines(), *bar],
            "log_every_n_steps": settings.log_every_n_steps,
            "default_root_dir": folder.path,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            # The data module shares out the images itself, exactly and without duplicates.
            "use_distributed_sampler": False,
        }
    )


def fit(trainer: L.Trainer, module: ClassifyModule, data: ImageDataModule, folder: RunFolder) -> Fitted:
    """Train `module` and read the last and the best epoch back from `folder`."""
    start = time.perf_counter()
    try:
        trainer.fit(module, data)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
    except SystemExit as error:
        # Lightning turns an interrupt into an exit with code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    wall_seconds = time.perf_counter() - start
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    (keeper,) = (callback for callback in callbacks if isinstance(callback, KeepLastAndBest))
    last, epochs = load_from_checkpoint(folder.last)
    best = load_from_checkpoint(folder.best)[0] if keeper.best_epoch is not None else last
    metrics = {
        "val/acc_last": keeper.acc_last,
        "val/acc_best": keeper.acc_best,
        "best_epoch": keeper.best_epoch or epochs,
        "epochs": epochs,
        "steps": trainer.global_step,
        "wall_seconds": wall_seconds,
        "images_per_second": module.images_trained / module.seconds_trained,
    }
    return Fitted(last, best, metrics)


def conclude_curves(
    trainer: L.Trainer, settings: Mapping[str, Any], ignored: Collection[str], figures: Mapping[str, float]
) -> None:
    """Tell TensorBoard what the run was and what came of it."""
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.conclude(settings, ignored, figures)
