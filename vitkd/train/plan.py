"""What a job is to do, decided before anything takes time or is written."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from vitkd.cli.command import ignored_settings, job_command, run_path, should_resume
from vitkd.config.run import Config, parse
from vitkd.models import Model
from vitkd.process.distributed import agree
from vitkd.runs.folder import RunFolder
from vitkd.train.compilation import check_compiler
from vitkd.train.machine import Machine, check_trainer

log = logging.getLogger("vitkd")


class Earlier(NamedTuple):
    """A run of the same configuration, from an earlier command."""

    path: Path
    state: str


@dataclass(frozen=True)
class Plan:
    """What one job does: with which settings, where, on what, and after which earlier run."""

    config: Config
    machine: Machine
    path: Path
    """where its run folder goes; `path`-2, … if that is taken"""
    earlier: Earlier | None
    """the run to skip or to resume, if there is one and the job is to look for it"""
    warnings: tuple[str, ...]
    """what to say of settings of the command line that have no effect"""
    command: tuple[str, ...]
    """the command line that starts one more process of this job"""

    @property
    def is_taken(self) -> bool:
        """Whether there is nothing left to do here: an earlier run is done, or another process runs it."""
        return self.earlier is not None and self.earlier.state in ("running", "done")

    def warn(self) -> None:
        """Log which settings of the command line have no effect."""
        for warning in self.warnings:
            log.warning("warning: %s", warning)

    def claim_folder(self) -> RunFolder:
        """The folder of the run to resume, or a new one; the same in all processes of the run."""
        return RunFolder(
            agree(lambda: self.earlier.path if self.earlier else RunFolder.claim(self.path).path)
        )


def make_plan(composed: DictConfig) -> Plan:
    """The plan of the job that Hydra composed; nothing is written.

    Raises ConfigError for the first setting that is wrong or does not suit this machine.
    """
    config = parse(composed)
    machine = check_trainer(config.trainer)
    if config.compile:
        check_compiler(machine.device)
    path = run_path(config)
    folder = RunFolder.latest(path, config.resolved) if should_resume(config) else None
    earlier = Earlier(folder.path, folder.state) if folder else None
    return Plan(config, machine, path, earlier, tuple(ignored_settings(config.method)), tuple(job_command()))


def announce(config: Config, given_teacher: Model | None) -> None:
    """Log the data set, the teacher and the student, before anything takes time."""
    dataset = config.dataset
    hint = " (embedded; dataset=cifar100 is the report's)" if dataset.name == "digits" else ""
    size = f"{dataset.image_size}×{dataset.image_size}"
    log.info("dataset: %s, %d classes, %s pixels%s", dataset.name, dataset.num_classes, size, hint)
    if dataset.validate_on == "test":
        log.warning("warning: the best epoch is chosen on the test images; its test accuracy is optimistic")
    if config.method.needs_teacher:
        log.info("teacher: %s", given_teacher.config if given_teacher else config.teacher.model)
    log.info("student: %s", config.student)
