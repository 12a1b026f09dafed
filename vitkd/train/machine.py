"""What a run runs on: the devices, processes and hosts behind the Trainer's settings."""

import inspect
import math
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from vitkd.errors import ConfigError, one_line, suggest

# What Lightning's Trainer takes but vitkd sets.
SET_BY_VITKD = {
    *("logger", "callbacks", "plugins", "profiler", "default_root_dir", "log_every_n_steps", "barebones"),
    *("enable_checkpointing", "enable_model_summary", "enable_progress_bar", "use_distributed_sampler"),
    *("fast_dev_run", "overfit_batches", "max_time", "max_steps", "min_steps", "min_epochs"),
    # Accuracy is read, and the best epoch kept, when an epoch has ended.
    "val_check_interval",
}
COUNTS = ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")


class Machine(NamedTuple):
    """What a run runs on."""

    device: torch.device
    """this process's"""
    processes: int
    """over all hosts"""
    hosts: int


def check_trainer(settings: dict[str, Any], key: str = "trainer") -> Machine:
    """What a Trainer with these settings, which stand at `key` of the configuration, runs on.

    Raises ConfigError unless Lightning's Trainer, and this project's use of it, take all of them.
    """
    check_settings(settings, key)
    try:
        trial = L.Trainer(**settings, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{key}: {one_line(error)}; trainer=auto fits this machine") from error
    if isinstance(trial.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"{key}.strategy={settings.get('strategy')}: starts processes by itself; use ddp")
    # Not its world size: under torchrun that is what torchrun says.
    return Machine(trial.strategy.root_device, trial.num_devices * trial.num_nodes, trial.num_nodes)


def check_settings(settings: dict[str, Any], key: str) -> None:
    """ConfigError for a setting that is no argument of the Trainer's, is not free, or is out of range."""
    accepted = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"} - SET_BY_VITKD
    for name, value in settings.items():
        if name in SET_BY_VITKD:
            raise ConfigError(f"{key}.{name}: is set by vitkd; leave it out")
        if name not in accepted:
            raise ConfigError(f"{key}.{name}: no such setting; {suggest(name, accepted)}")
        if name in COUNTS and not (type(value) is int and value >= 1):
            raise ConfigError(f"{key}.{name}={value}: must be a whole number of at least 1")
    batches, clip = settings.get("limit_train_batches"), settings.get("gradient_clip_val")
    if batches is not None and not batches > 0:
        raise ConfigError(f"{key}.limit_train_batches={batches}: must be above 0, or null for all")
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"{key}.gradient_clip_val={clip}: must be a finite number above 0, or null")
