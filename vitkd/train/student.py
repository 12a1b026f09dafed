"""Train one student in its run folder, from first weights to test metrics; a teacher is trained so, too."""

from typing import Any

import torch

from vitkd.config import Config
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.models import Model, ModelConfig
from vitkd.process.distributed import is_first, rank, wait_for_all
from vitkd.runs import results
from vitkd.runs.folder import RunFolder
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_generators, seed_of
from vitkd.runs.stack_folder import restart_alone, stacks_folder
from vitkd.train.build import build_module, facts_of
from vitkd.train.callbacks import attention_pictures, faster_steps
from vitkd.train.compilation import compile_training
from vitkd.train.conclude import measure_student, measure_teacher
from vitkd.train.fit import fit


def prepare(group: str, model: ModelConfig) -> None:
    """Fetch what building `model` takes from a network; ConfigError, naming its group, if that fails."""
    try:
        model.prepare()
    except ConfigError as error:
        raise ConfigError(f"{group}.{error}") from error


def load_data(config: Config) -> ImageDataModule:
    """The configuration's data set, read before anything is written, should it turn out to be damaged."""
    data = ImageDataModule(config.dataset, config.paths.data, seed_of(config.seed, ORDER, config.student))
    data.setup()
    return data


def train_student(
    config: Config, teacher: Model | None, data: ImageDataModule, device: torch.device, folder: RunFolder
) -> dict[str, Any]:
    """Train the configuration's student in `folder`, measure it, and return what `metrics.json` holds.

    If an earlier attempt in `folder` was interrupted, training resumes where that was saved. Of several
    processes only the first measures and writes; the others return {}.
    """
    with folder.running(config.resolved):
        if is_first():
            restart_alone(folder, stacks_folder(config.paths.outputs))
        student = first_weights(config.seed, config.student)
        module = build_module(config, student, teacher, facts_of(data))
        # Before training, which may change the precision of its weights.
        measured_teacher = measure_teacher(teacher if is_first() else None, data, device)
        have_maps = teacher is not None and student.attention and teacher.attention
        pictures = attention_pictures(config, data, folder) if have_maps else None
        if module.objective is not None and module.objective.pairs and is_first():
            results.write_pairs(folder, module.objective.pairs)
        # Training draws the same random numbers whatever was drawn before it.
        seed_generators(config.seed, DROPOUT, config.student, process=rank())
        if config.compile:
            compile_training(module)
        callbacks = [*([pictures] if pictures else []), *faster_steps(config, data)]
        fitted = fit(module, data, folder, config, callbacks)
        metrics = {}
        if is_first():
            if pictures and not folder.pictures.exists():
                # An earlier attempt was interrupted between its last step and here.
                pictures.on_train_end(fitted.trainer, module)
            metrics = measure_student(config, fitted, measured_teacher, data, device, folder)
        wait_for_all()
    return metrics
