"""Fit one module in one run folder: the same for a teacher and for a student."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from vitkd.config.loggers import LoggedRun
from vitkd.config.run import Config
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError, RunError, one_line
from vitkd.models import Model
from vitkd.process.distributed import agree, is_first, wait_for_all
from vitkd.process.signals import PostponedSignals
from vitkd.runs.checkpoints import DurableCheckpointIO, load_from_checkpoint, newest_good
from vitkd.runs.curves import MetricsFile
from vitkd.runs.folder import RunFolder
from vitkd.train.averaging import WarmAverage
from vitkd.train.checkpointing import Checkpointing
from vitkd.train.module import DistillModule

log = logging.getLogger("vitkd")


class Fitted(NamedTuple):
    """What a fit leaves, the models read back from its checkpoints."""

    trainer: L.Trainer
    loggers: list[Logger]
    last: Model
    best: Model
    """of the epoch with the best validation accuracy, the earliest of equals; `last` without validation"""
    metrics: dict[str, Any]


def fit(
    module: DistillModule,
    data: ImageDataModule,
    folder: RunFolder,
    settings: Config,
    callbacks: Sequence[Callback],
) -> Fitted:
    """Train `module` in `folder`, from the checkpoint of an earlier attempt there, if there is one.

    Raises:
        RunError: a loss or gradient is not finite, or the disk is full.
        ConfigError: a setting of the Trainer does not suit it after all.
    """
    checkpoint, start = agree(lambda: find_checkpoint(folder.last))
    with PostponedSignals() as signals:
        checkpointing = Checkpointing(folder, settings.checkpoint_minutes, signals)
        loggers = curve_loggers(folder, settings, start) if is_first() else []
        trainer = build_trainer(settings, callbacks, checkpointing, loggers)
        run_trainer(trainer, module, data, checkpoint)
    if start and is_first():
        # The interrupted attempt may have left an older one.
        checkpointing.write_best(module.model)
    wait_for_all()
    last, epochs = load_from_checkpoint(folder.last)
    best = load_from_checkpoint(folder.best)[0] if checkpointing.best else last
    metrics = {
        "val/acc_last": checkpointing.acc_last,
        "val/acc_best": checkpointing.acc_best,
        "best_epoch": checkpointing.best["epoch"] + 1 if checkpointing.best else epochs,
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
    except RuntimeError as error:
        # Lightning clears the GPU after an error, which may fail in turn.
        if isinstance(error.__context__, RunError):
            raise error.__context__ from None
        raise
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
    except SystemExit as error:
        # Lightning turns an interrupt into an exit with code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def find_checkpoint(last: Path) -> tuple[Path | None, int]:
    """The checkpoint that an earlier attempt left at `last`, if there is one, and after how many steps."""
    checkpoint = newest_good(last)
    if checkpoint is None:
        return None, 0
    path, content = checkpoint
    if "global_step" not in content:
        return None, 0  # a student's weights from a stack, which cannot be resumed from
    log.info("resuming %s after step %d", last.parent.parent, content["global_step"])
    return path, content["global_step"]


def curve_loggers(folder: RunFolder, settings: Config, start: int) -> list[Logger]:
    """What writes a run's curves, from step `start` on; of a stack `settings` are any student's."""
    file = MetricsFile(folder.csv, start)
    name = folder.path.relative_to(settings.paths.outputs).as_posix().removesuffix(".unfinished")
    run = LoggedRun(folder.path, name, folder.read_config(), start, file.kept, file.dropped)
    return [*(option.open(run) for option in settings.loggers.values()), file]


def build_trainer(
    settings: Config, callbacks: Sequence[Callback], checkpointing: Checkpointing, loggers: list[Logger]
) -> L.Trainer:
    """Lightning's Trainer, set up as every training here needs it."""
    decay = settings.ema_decay
    averaging = [] if decay is None else [WarmAverage(decay)]
    plugins: list[Any] = [DurableCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # The launcher queues an interrupted job again; Lightning must not do so as well.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return L.Trainer(
        **{
            "num_sanity_val_steps": 0,
            **settings.trainer,
            "logger": loggers,
            "callbacks": [*averaging, *callbacks, checkpointing],
            "plugins": plugins,
            "log_every_n_steps": settings.log_every_n_steps,
            "default_root_dir": checkpointing.folder.path,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            # The data module shares out the images itself, exactly and without duplicates.
            "use_distributed_sampler": False,
        }
    )
