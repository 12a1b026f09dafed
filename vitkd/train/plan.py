"""What a job is to do and on what, decided before anything takes time or is written."""

import inspect
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import lightning as L
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf import DictConfig

from vitkd.cli.command import ignored_settings, job_command, run_path, should_resume
from vitkd.config.run import Config, parse
from vitkd.config.schema import converted, in_words
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError, naming, one_line, suggest
from vitkd.models import Model
from vitkd.process.distributed import agree, is_first
from vitkd.process.isolation import check_device
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import known_hashes
from vitkd.train.build import check_compiler

log = logging.getLogger("vitkd")

EPOCHS = "set {owner}max_epochs; nothing stops a run earlier"
# What Lightning's Trainer takes but vitkd sets, and what to set instead.
SET_BY_VITKD = {
    "logger": "choose logger=tensorboard, wandb or mlflow",
    "default_root_dir": "set paths.outputs",
    "log_every_n_steps": "set log_every_n_steps",
    "enable_checkpointing": "set checkpoint_minutes",
    "fast_dev_run": "set debug=fast",
    "overfit_batches": "set debug=overfit",
    "profiler": "set debug=profile",
    "max_steps": EPOCHS,
    "max_time": EPOCHS,
    "min_steps": EPOCHS,
    "min_epochs": EPOCHS,
    # Accuracy is read, and the best epoch kept, when an epoch has ended.
    "val_check_interval": "set {key}.check_val_every_n_epoch",
    "enable_progress_bar": "a terminal has one, a file has not",
    "enable_model_summary": "a line says what each model is",
    "use_distributed_sampler": "each process has its own images",
    **dict.fromkeys(("callbacks", "plugins", "barebones"), "nothing replaces it"),
}
# What it takes and nothing here asks for: the test split is measured whole, once, without it.
WITHOUT_EFFECT = {
    *("limit_test_batches", "limit_predict_batches", "inference_mode", "reload_dataloaders_every_n_epochs"),
    *("enable_autolog_hparams", "model_registry"),
}
MOST = 10**6
SHARES = ("limit_train_batches", "limit_val_batches")
COUNTS = ("max_epochs", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes")


class Machine(NamedTuple):
    """What a run runs on."""

    device: torch.device
    """this process's"""
    processes: int
    """over all hosts"""
    hosts: int


class Earlier(NamedTuple):
    """A run of the same configuration, from an earlier command."""

    path: Path
    state: str

    @property
    def is_taken(self) -> bool:
        """Whether there is nothing left to do: it is done, or another process runs it."""
        return self.state in ("running", "done")


@dataclass(frozen=True)
class Plan:
    """What one job does: with which settings, where and on what."""

    config: Config
    machine: Machine
    path: Path
    """where its run folder goes; `path`-2, … if that is taken"""
    warnings: tuple[str, ...]
    """what to say of settings of the command line that have no effect"""
    command: tuple[str, ...]
    """the command line that starts one more process of this job"""

    def warn(self) -> None:
        """Log which settings of the command line have no effect."""
        for warning in self.warnings:
            log.warning("warning: %s", warning)

    def earlier(self, inputs: Mapping[str, Any]) -> Earlier | None:
        """The run to skip or to resume, if one is looked for: of the same settings, and `inputs` if known."""
        config = self.config
        folder = RunFolder.latest(self.path, config.resolved, inputs) if should_resume(config) else None
        return Earlier(folder.path, "stopped" if folder.is_unmeasured else folder.state) if folder else None

    def claim_folder(self, inputs: Mapping[str, Any], earlier: Earlier | None) -> RunFolder:
        """The folder of the run to resume, or a new one; the same in all processes of the run.

        It is not the `earlier` one if that had another teacher than the one that is known by now.
        """
        return RunFolder(agree(lambda: ((earlier and self.earlier(inputs)) or self.claim_new()).path))

    def claim_new(self) -> RunFolder:
        """A new folder for the run, which says how it was started."""
        folder = RunFolder.claim(self.path)
        _, _, _, *arguments = self.command  # python -m vitkd.train
        write_atomically(folder.command, json.dumps(arguments) + "\n")
        return folder


def make_plan(composed: DictConfig) -> Plan:
    """The plan of the job that Hydra composed; nothing is written.

    Raises ConfigError for the first setting that is wrong or does not suit this machine, RunError if an
    earlier job has made its GPU unusable.
    """
    config = parse(composed)
    check_files(config)
    check_memory(config)
    machine = check_trainer(config.trainer)
    for option in config.loggers.values():
        option.check_ready()
    check_device(machine.device)
    if config.compile:
        check_compiler(machine.device)
    command = tuple(job_command())
    warnings = tuple(ignored_settings(config.method, config.dataset.augment))
    return Plan(config, machine, run_path(config), warnings, command)


def check_files(config: Config) -> None:
    """ConfigError for a setting that names a file or folder which is not there; none is read.

    That of `teacher.checkpoint` is the first to be read, before the images are.
    """
    root = getattr(config.dataset, "root", None)
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"dataset.root={root}: there is no such folder; name one with CLASS/IMAGE files")
    with naming("student."):
        config.student.check_files()
    if config.method.needs_teacher and config.teacher.checkpoint is None:
        with naming("teacher."):
            config.teacher.model.check_files()


def check_memory(config: Config) -> None:
    """ConfigError for a model that this machine could not hold while it trains."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group, model in (("student", config.student), ("teacher", config.teacher.model)):
        if model.least_bytes > memory:
            least, have = (f"{size / 2**30:,.0f} GiB" for size in (model.least_bytes, memory))
            raise ConfigError(f"{group}={model}: takes {least} or more, this machine has {have}; shrink it")


def check_trainer(settings: dict[str, Any], key: str = "trainer") -> Machine:
    """What a Trainer with these settings, which stand at `key` of the configuration, runs on.

    Raises ConfigError unless Lightning's Trainer, and this project's use of it, take all of them.
    """
    check_settings(settings, key)
    try:
        trial = L.Trainer(**settings, logger=False, enable_checkpointing=False)
    except Exception as error:  # Lightning and the accelerators raise many kinds
        raise ConfigError(f"{key}: {one_line(error)}; trainer=auto fits this machine") from error
    if trial.precision == "16-true":
        # (1 − beta2)·gradient² is 0 in float16 for gradients below 0.005; steps come out 4.5 times too long.
        what = f"{key}.precision=16-true: AdamW's squared gradients vanish in float16"
        raise ConfigError(f"{what}, its steps are too long; use bf16-true, or 16-mixed on a GPU")
    if isinstance(trial.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigError(f"{key}.strategy={settings.get('strategy')}: starts processes by itself; use ddp")
    # Not its world size: under torchrun that is what torchrun says.
    return Machine(trial.strategy.root_device, trial.num_devices * trial.num_nodes, trial.num_nodes)


def check_settings(settings: dict[str, Any], key: str) -> None:
    """ConfigError for a setting that is no argument of the Trainer's, is not free, or is out of range."""
    hints = get_type_hints(L.Trainer.__init__)
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    accepted = arguments.difference(SET_BY_VITKD, WITHOUT_EFFECT)
    for name, value in settings.items():
        if name in SET_BY_VITKD:
            owner = "teacher." if key == "teacher.trainer" else "trainer."
            instead = SET_BY_VITKD[name].format(key=key, owner=owner)
            raise ConfigError(f"{key}.{name}: is set by vitkd, leave it out; {instead}")
        if name in WITHOUT_EFFECT:
            raise ConfigError(f"{key}.{name}: has no effect here; leave it out")
        if name not in accepted:
            raise ConfigError(f"{key}.{name}: no such setting; {suggest(name, accepted)}")
        if name in COUNTS and not (type(value) is int and 1 <= value <= MOST):
            raise ConfigError(f"{key}.{name}={value}: must be a whole number of at least 1, at most {MOST:,}")
        if type(converted(f"{key}.{name}", value, hints[name])) is not type(value):
            raise ConfigError(f"{key}.{name}={value!r}: must be {in_words(hints[name])}")
        if name in SHARES and isinstance(value, int | float) and not is_share(value):
            allowed = "a whole number of batches, or a share of them from 0.0 to 1.0"
            raise ConfigError(f"{key}.{name}={value}: must be {allowed}")
        if name == "devices" and re.search(r"\d{5}", str(value)):
            raise ConfigError(f"{key}.{name}={value}: no machine has so many")
    batches, clip = settings.get("limit_train_batches"), settings.get("gradient_clip_val")
    if batches is not None and not batches > 0:
        raise ConfigError(f"{key}.limit_train_batches={batches}: must be above 0, or null for all")
    if clip is not None and not 0 < clip < math.inf:
        raise ConfigError(f"{key}.gradient_clip_val={clip}: must be a finite number above 0, or null")
    if clip is None and (algorithm := settings.get("gradient_clip_algorithm")) is not None:
        what = f"{key}.gradient_clip_algorithm={algorithm}: has no effect without {key}.gradient_clip_val"
        raise ConfigError(f"{what}; set both or none")


def is_share(value: float) -> bool:
    """Whether a Trainer takes `value` as so many batches, or as a share of all."""
    return value >= 0 and (isinstance(value, int) or value <= 1)


def announce(config: Config, given_teacher: Model | None, data: ImageDataModule) -> None:
    """Log the data set and its files, the teacher and the student, before anything takes time."""
    dataset = config.dataset
    hint = " (embedded; dataset=cifar100 is the report's)" if dataset.name == "digits" else ""
    size = f"{dataset.image_size}×{dataset.image_size}"
    log.info("dataset: %s, %d classes, %s pixels%s", dataset.name, dataset.num_classes, size, hint)
    for note in data.notes(known_hashes(config)) if is_first() else ():
        log.info("%s", note)
    if dataset.validate_on == "test":
        log.warning("warning: the best epoch is chosen on the test images; its test accuracy is optimistic")
    if config.method.needs_teacher:
        log.info("teacher: %s", given_teacher.config if given_teacher else config.teacher.model)
    log.info("student: %s", config.student)
