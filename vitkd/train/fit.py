"""Fitting one module in one run folder: the same for a teacher and for a student."""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from vitkd.cli.console import is_terminal
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError, one_line, suggest
from vitkd.models import Model
from vitkd.process.distributed import agree, is_first, wait_for_all
from vitkd.process.signals import PostponedSignals
from vitkd.runs.checkpoints import DurableCheckpointIO, load_from_checkpoint, newest_good
from vitkd.runs.curves import MetricsFile, TensorBoardCurves
from vitkd.runs.folder import RunFolder
from vitkd.train.checkpointing import Checkpointing
from vitkd.train.module import DistillModule
from vitkd.train.progress import EpochLines, ProgressBar

log = logging.getLogger("vitkd")

# What Lightning's Trainer takes but vitkd decides.
DECIDED = {
    *("logger", "callbacks", "plugins", "profiler", "default_root_dir", "log_every_n_steps", "barebones"),
    *("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "use_distributed_sampler"),
    *("fast_dev_run", "overfit_batches", "max_time", "max_steps", "min_steps", "min_epochs"),
    # Accuracy is read, and the best epoch kept, when an epoch has ended.
    "val_check_interval",
}
COUNTS = ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")


class Settings(Protocol):
    """The part of a run's configuration that fitting reads."""

    log_every_n_steps: int
    checkpoint_minutes: float
    ema_decay: float | None
    trainer: dict[str, Any]


class Machine(NamedTuple):
    """What a run runs on."""

    device: torch.device
    """this process's"""
    processes: int
    hosts: int


class Fitted(NamedTuple):
    """What a fit leaves, the models read back from its checkpoints."""

    trainer: L.Trainer
    loggers: list[Logger]
    last: Model
    best: Model
    """of the epoch with the best validation accuracy, the earliest of equals; `last` without validation"""
    metrics: dict[str, Any]


def check_trainer(settings: dict[str, Any], key: str = "trainer") -> Machine:
    """What a Trainer with these settings, which stand at `key` of the configuration, runs on.

    Raises ConfigError unless Lightning's Trainer, and this project's use of it, take all of them.
    """
    accepted = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} - DECIDED
    for name, value in settings.items():
        if name in DECIDED:
            raise ConfigError(f"{key}.{name}: is decided by vitkd; leave it out")
        if name not in accepted:
            raise ConfigError(f"{key}.{name}: no such setting; {suggest(name, accepted)}")
        if name in COUNTS and not (type(value) is int and value >= 1):
            raise ConfigError(f"{key}.{name}={value}: must be a whole number of at least 1")
    batches, clip = settings.get("limit_train_batches"), settings.get("gradient_clip_val")
    if batches is not None and not batches > 0:
        raise ConfigError(f"{key}.limit_train_batches={batches}: must be above 0, or null for all")
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"{key}.gradient_clip_val={clip}: must be a finite number above 0, or null")
    try:
        trial = L.Trainer(**settings, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{key}: {one_line(error)}; trainer=auto fits this machine") from error
    if isinstance(trial.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"{key}.strategy={settings.get('strategy')}: its processes share one; use ddp")
    # Not its world size: under torchrun that is what torchrun says.
    return Machine(trial.strategy.root_device, trial.num_devices * trial.num_nodes, trial.num_nodes)


def fit(
    module: DistillModule,
    data: ImageDataModule,
    folder: RunFolder,
    settings: Settings,
    callbacks: Sequence[Callback],
) -> Fitted:
    """Train `module` in `folder`, from where an earlier attempt there was saved, if there was one.

    Raises:
        RunError: a loss or gradient is not finite, or the disk is full.
        ConfigError: a setting of the Trainer does not suit it after all.
    """
    checkpoint, start = agree(lambda: where_to_go_on(folder.last))
    with PostponedSignals() as signals:
        checkpointing = Checkpointing(folder, settings.checkpoint_minutes, signals)
        trainer = build_trainer(
            folder.path,
            settings,
            [*averaging(settings), *callbacks, EpochLines(), *progress_bar(), checkpointing],
            curves_of(folder, start) if is_first() else [],
        )
        run_trainer(trainer, module, data, checkpoint)
    if start and is_first():
        # The attempt that was cut off may have left an older one.
        checkpointing.write_best(module.model)
    wait_for_all()
    last, epochs = load_from_checkpoint(folder.last)
    best = load_from_checkpoint(folder.best)[0] if checkpointing.best else last
    metrics = {
        "val/acc_last": checkpointing.acc_last,
        "val/acc_best": checkpointing.acc_best,
        "best_epoch": checkpointing.best_epoch or epochs,
        "epochs": epochs,
        "steps": trainer.global_step,
        "wall_seconds": checkpointing.wall_seconds,
        "images_per_second": module.window.images_trained / module.window.seconds_trained,
    }
    return Fitted(trainer, trainer.loggers, last, best, metrics)


def run_trainer(trainer: L.Trainer, module: DistillModule, data: ImageDataModule, start: Path | None) -> None:
    """Train from the checkpoint `start`, or from the beginning; raises as `fit` does."""
    try:
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
    except SystemExit as error:
        # Lightning turns an interrupt into an exit with code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def where_to_go_on(last: Path) -> tuple[Path | None, int]:
    """The checkpoint that an earlier attempt left at `last`, if one did, and how many steps it holds."""
    found = newest_good(last)
    if found is None:
        return None, 0
    path, content = found
    log.info("resuming %s after step %d", last.parent.parent, content["global_step"])
    return path, content["global_step"]


def averaging(settings: Settings) -> list[Callback]:
    """What keeps an average of the weights for validation and for good, if that is asked for."""
    return [] if settings.ema_decay is None else [WeightAveraging(avg_fn=warm_average(settings.ema_decay))]


def warm_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """An exponential moving average whose decay grows with the `count` of averaged steps up to `decay`.

    min(decay, (1 + count) / (10 + count)), as TensorFlow's ExponentialMovingAverage: with a constant decay a
    short run would keep most of its first, random weights.
    """

    def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
        if not averaged.is_floating_point():
            return current  # batch normalisation counts its batches
        kept = ((1 + count) / (10 + count)).clamp(max=decay).to(averaged)
        return kept * averaged + (1 - kept) * current

    return average


def curves_of(folder: RunFolder, start: int) -> list[Logger]:
    """What writes a run's curves, going on from step `start`."""
    return [TensorBoardCurves(folder.path, start), MetricsFile(folder.csv, start)]


def progress_bar() -> list[Callback]:
    """A bar, where a person watches."""
    return [ProgressBar()] if is_terminal() and is_first() else []


def build_trainer(
    root: Path, settings: Settings, callbacks: list[Callback], loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer with this project's habits."""
    return L.Trainer(
        **{
            "num_sanity_val_steps": 0,
            **settings.trainer,
            "logger": loggers,
            "callbacks": callbacks,
            "plugins": [DurableCheckpointIO(), *scheduler()],
            "log_every_n_steps": settings.log_every_n_steps,
            "default_root_dir": root,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            # The data module shares out the images itself, exactly and without duplicates.
            "use_distributed_sampler": False,
        }
    )


def scheduler() -> list[SLURMEnvironment]:
    """Under SLURM, keeps Lightning from queueing the job again by itself, beside whoever submitted it."""
    alone = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if alone else []


def conclude_curves(
    loggers: Iterable[Logger],
    settings: Mapping[str, Any],
    ignored: Collection[str],
    figures: Mapping[str, float],
) -> None:
    """Tell TensorBoard what the run was and what came of it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardCurves):
            logger.conclude(settings, ignored, figures)
