"""Whose maps a student learns from: a teacher that was given, stored, left untrained, or trained now."""

import logging
from contextlib import closing
from pathlib import Path

import torch

from vitkd.config.run import Config, teacher_run
from vitkd.models import Model
from vitkd.process.distributed import agree
from vitkd.runs.folder import RunFolder
from vitkd.runs.seeding import first_weights
from vitkd.runs.teacher_store import fingerprint, given_teacher, stored_teacher
from vitkd.train.machine import check_trainer
from vitkd.train.student import load_data, prepare, train_student

log = logging.getLogger("vitkd")


def read_given_teacher(config: Config) -> Model | None:
    """The teacher of `teacher.checkpoint`, if one is named and the method learns from a teacher.

    Raises ConfigError if it cannot be read, or was made for other images or classes.
    """
    return given_teacher(config.teacher.checkpoint, config.dataset) if config.method.needs_teacher else None


def check_pair(config: Config, given: Model | None) -> None:
    """ConfigError if the student cannot learn from its teacher by the chosen method."""
    config.method.check(config.student, given.config if given else config.teacher.model, config)


def obtain_teacher(config: Config, given: Model | None, device: torch.device) -> Model | None:
    """The teacher to learn from; None if the method needs none.

    That is the `given` one, or the stored one of this configuration, trained now if no run has needed it
    before. One that is not to be trained is not stored either.
    """
    if given is not None or not config.method.needs_teacher:
        return given
    own = teacher_run(config)
    if not config.teacher.trained:
        agree(lambda: prepare("teacher", own.student))
        log.info("teacher: not trained, random weights (teacher.trained=false), as a control")
        return first_weights(own.seed, own.student)
    check_trainer(own.trainer, "teacher.trainer")
    mark = fingerprint(own, own.dataset.contents(Path(own.paths.data)))
    store = Path(config.paths.outputs, "teachers", own.dataset.name, mark)
    if not store.exists():
        agree(lambda: prepare("teacher", own.student))

    def train(folder: RunFolder) -> None:
        with closing(load_data(own)) as data:
            train_student(own, None, data, device, folder)

    return stored_teacher(store, own.resolved, train)
