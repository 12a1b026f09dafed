"""What a finished run gives to an export: student, teacher, class names and test images.

Shapes: B images, C channels, H × W pixels.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkd.config.run import Config
from vitkd.data.spec import differences
from vitkd.data.split import FileSplit
from vitkd.errors import ConfigError
from vitkd.export.classifier import Classifier
from vitkd.models import read_header
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import class_names
from vitkd.runs.load import config_of, find_teacher, load_student

log = logging.getLogger("vitkd")

IMAGES = 7


class Sources(NamedTuple):
    """What is exported, and what it is compared with."""

    student: Classifier
    teacher: Classifier | None
    class_names: list[str]
    """by label"""
    pixels: Tensor
    """[B, C, H, W] uint8: a few test images"""


def read_sources(path: Path, epoch: str, data: str | None, root: str | None) -> Sources:
    """The run in `path` after its "best" or "last" epoch.

    Args:
        data, root: `paths.data` and `dataset.root`, if they have changed since training.

    Raises ConfigError if there is no finished run, or a file of it is damaged.
    """
    folder = RunFolder.existing(path)
    config = config_of(folder, data, root)
    if folder.state != "done":
        raise ConfigError(
            f"run={path}: is not finished (it is {folder.state}); let its command finish it, with resume=auto"
        )
    model, normalisation = load_student(folder, epoch), (config.dataset.mean, config.dataset.std)
    for name, value, expected in differences(config.dataset, model.config):
        raise ConfigError(f"run={path}: its student has {name}={value}, its config.yaml {expected}")
    names = class_names(read_header(folder.student)) or class_names(folder.read_inputs())
    if len(names) != model.config.num_classes:
        raise ConfigError(
            f"run={path}: names {len(names)} classes and its student has {model.config.num_classes}; "
            "train it again"
        )
    student = Classifier(model, *normalisation).eval()
    return Sources(student, teacher_of(folder, config), names, sample_pixels(config))


def teacher_of(folder: RunFolder, config: Config) -> Classifier | None:
    """The run's teacher; None, with a warning, if it is missing or damaged, or if there was none."""
    try:
        teacher = find_teacher(folder, config, None)
    except ConfigError as error:
        log.warning("warning: %s; the table is without the teacher", error)
        return None
    return teacher if teacher is None else Classifier(teacher, config.dataset.mean, config.dataset.std).eval()


def sample_pixels(config: Config) -> Tensor:
    """The first test images, [B, C, H, W] uint8; random ones where they cannot be read without a download."""
    dataset = config.dataset
    offline: dict[str, Any] = {"download": False} if hasattr(dataset, "download") else {}
    try:
        test = replace(dataset, **offline).load(Path(config.paths.data))["test"]
    except ConfigError:
        log.info("the test images of %s cannot be read: random ones check the file", dataset.name)
        shape = (IMAGES, dataset.channels, dataset.image_size, dataset.image_size)
        return torch.randint(256, shape, dtype=torch.uint8)
    count = min(IMAGES, len(test))
    return test.read(range(count)) if isinstance(test, FileSplit) else test.images[:count]
