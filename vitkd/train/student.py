"""Train one student in its run folder, from first weights to test metrics; its teacher first, if need be.

Shapes: N test images, C classes.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkd.cli.console import percent
from vitkd.cli.messages import calling_by_option
from vitkd.config.run import Config, teacher_run
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError, naming
from vitkd.evaluate.measure import evaluate, measure_both
from vitkd.explain.maps.recording import has_maps
from vitkd.models import Model, ModelConfig, count_parameters, digest, save_model
from vitkd.models.initialisation import InitialisedConfig
from vitkd.process.distributed import agree, is_first, rank, wait_for_all
from vitkd.runs.curves import CurveLogger
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import check_teacher_classes, inputs_of
from vitkd.runs.provenance import provenance
from vitkd.runs.seeding import DROPOUT, ORDER, first_weights, seed_generators, seed_of
from vitkd.runs.stack_folder import restart_alone, stacks_folder
from vitkd.runs.teacher_store import given_teacher, store_of, stored_teacher, uses_store
from vitkd.train.build import build_module, compile_training, facts_of
from vitkd.train.callbacks import attention_pictures, faster_steps, progress
from vitkd.train.confusion import confusion_figure
from vitkd.train.debugging import debug_callbacks
from vitkd.train.fit import Fitted, fit
from vitkd.train.pictures import log_picture, rendered
from vitkd.train.plan import announce, check_trainer

log = logging.getLogger("vitkd")


def prepare(group: str, model: ModelConfig) -> None:
    """Fetch what building `model` takes from a network; ConfigError, naming its group, if that fails."""
    with naming(f"{group}."):
        model.prepare()
        if isinstance(model, InitialisedConfig) and model.init is not None:
            first_weights(0, model)  # by now: what cannot be had should leave no run behind


def load_data(config: Config) -> ImageDataModule:
    """The configuration's data set, which is read when it is first used."""
    seed, overfits = seed_of(config.seed, ORDER, config.student), config.debug == "overfit"
    return ImageDataModule(config.dataset, config.paths.data, seed, one_batch=overfits)


def read_data(config: Config, given: Model | None, data: ImageDataModule, processes: int = 1) -> None:
    """Announce the run, read its images and check what depends on them, before anything is written."""
    announce(config, given, data)
    data.setup()
    check_shares(config, data, processes)
    check_fractions(config, data, processes)
    check_teacher_classes(config, data)
    config.method.check_data(facts_of(data))


def check_shares(config: Config, data: ImageDataModule, processes: int) -> None:
    """ConfigError for a share of a process's batches, the teacher's training too, that is none of them."""
    for key, trainer in (("trainer", config.trainer), ("teacher.trainer", config.teacher.trainer)):
        for split in ("train", "val") if config.dataset.validates else ("train",):
            share = trainer.get(name := f"limit_{split}_batches")
            if not isinstance(share, float) or share == 0:
                continue
            batches = len(data.loader(split, "cpu", rank=0, world_size=processes))
            if int(share * batches) == 0:
                setting = f"{key}.{name}"
                raise ConfigError(f"{setting}={share}: is not one of {batches} batches; set {setting}=1")


def check_fractions(config: Config, data: ImageDataModule, processes: int) -> None:
    """ConfigError for a share of the training images, the teacher's training too, that fills no batch."""
    fractions = {"dataset.train_fraction": config.dataset.train_fraction}
    if uses_store(config):
        fractions["teacher.train_fraction"] = config.teacher.train_fraction
    batch, passes = config.dataset.batch_size * processes, config.dataset.passes
    for setting, fraction in fractions.items():
        if fraction < 1 and (count := len(data.training_images(fraction))) * passes < batch:
            left = f"leaves {count:,} of {len(data.training_images(1)):,} training images"
            fix = f"less than a batch of {batch:,}; raise it or lower dataset.batch_size"
            raise ConfigError(f"{setting}={fraction:g}: {left}, {fix}")


def read_given_teacher(config: Config) -> Model | None:
    """The teacher of `teacher.checkpoint`, if one is named and the method learns from a teacher.

    Raises ConfigError if it cannot be read, or was made for other images or classes.
    """
    return given_teacher(config.teacher.checkpoint, config.dataset) if config.method.needs_teacher else None


def check_pair(config: Config, given: Model | None) -> None:
    """ConfigError if the student cannot learn from its teacher by the chosen method."""
    teacher = given.config if given else config.teacher.model
    of_options = {"student": config.student} | ({} if given else {"teacher": teacher})
    if config.method.needs_teacher and given is None:
        with naming("teacher."):
            config.teacher.model.check_source(None)
    with calling_by_option(of_options):
        with naming("student."):
            config.student.check_source(teacher if config.method.needs_teacher else None)
        config.method.check(config.student, teacher, config)


def obtain_teacher(
    config: Config, given: Model | None, contents: str | None, device: torch.device
) -> Model | None:
    """The teacher to learn from on images of these `contents`; None if the method needs none.

    That is the `given` one, or the stored one of this configuration, trained now if no run has needed it
    before. One that is not to be trained is not stored either.
    """
    if given is not None or not config.method.needs_teacher:
        return given
    own = teacher_run(config)
    if not config.teacher.trained:
        agree(lambda: prepare("teacher", own.student))
        with naming("teacher."):
            log.info("teacher: not trained, %s (teacher.trained=false)", own.student.untrained())
        return first_weights(own.seed, own.student)
    check_trainer(own.trainer, "teacher.trainer")
    store = store_of(config, contents)
    assert store is not None, "it is neither given nor random"
    if not store.exists():
        agree(lambda: prepare("teacher", own.student))

    def train(folder: RunFolder) -> None:
        with closing(load_data(own)) as data:
            train_student(own, None, data, device, folder, inputs_of(own, data, contents, None), "teacher")

    return stored_teacher(store, own.resolved, train)


def train_student(
    config: Config,
    teacher: Model | None,
    data: ImageDataModule,
    device: torch.device,
    folder: RunFolder,
    inputs: Mapping[str, Any],
    whose: str = "student",
) -> dict[str, Any]:
    """Train the configuration's student in `folder`, measure it, and return what `metrics.json` holds.

    If an earlier attempt in `folder` was interrupted, training resumes where that was saved. Of several
    processes only the first measures and writes; the others return {}. Its lines say `whose` training it is.
    """
    with folder.running(config.resolved, inputs):
        if is_first():
            restart_alone(folder, stacks_folder(config.paths.outputs))
        student = first_weights(config.seed, config.student)
        module = build_module(config, student, teacher, facts_of(data))
        # Before training, which may change the precision of its weights.
        measured_teacher = measure_teacher(teacher if is_first() else None, data, device)
        have_maps = teacher is not None and has_maps(module.model) and has_maps(teacher)
        pictures = attention_pictures(config, data, folder) if have_maps else None
        if module.objective is not None and module.objective.pairs and is_first():
            folder.write_pairs(module.objective.pairs)
        # Training draws the same random numbers whatever was drawn before it.
        seed_generators(config.seed, DROPOUT, config.student, process=rank())
        if config.compile:
            compile_training(module)
        callbacks = [*([pictures] if pictures else []), *faster_steps(config, data), *progress(whose)]
        callbacks += debug_callbacks(config, folder) if whose == "student" else []
        fitted = fit(module, data, folder, config, callbacks)
        metrics = {}
        if is_first():
            if pictures and not folder.pictures.exists():
                # An earlier attempt was interrupted between its last step and here.
                pictures.on_train_end(fitted.trainer, module)
            metrics = measure_student(config, fitted, measured_teacher, data, device, folder)
            if config.debug:
                shutil.rmtree(folder.checkpoints)
        wait_for_all()
    return metrics


class MeasuredTeacher(NamedTuple):
    """What is known of a teacher before its student trains, which may change the precision of its weights."""

    metrics: dict[str, Any]
    """what the student's `metrics.json` says of it"""
    predictions: Tensor | None
    """[N] its classes of the test images; None where there is no teacher"""


def measure_teacher(teacher: Model | None, data: ImageDataModule, device: torch.device) -> MeasuredTeacher:
    """Measure the teacher, if there is one, on the test split."""
    if teacher is None:
        names = ("teacher/test_acc", "teacher/parameters", "teacher/weights")
        return MeasuredTeacher(dict.fromkeys(names), None)
    test = evaluate(teacher, data.loader("test", device, rank=0, world_size=1), device)
    log.info("teacher: %s on the test split", percent(test.accuracy))
    metrics = {
        "teacher/test_acc": test.accuracy,
        "teacher/parameters": count_parameters(teacher),
        "teacher/weights": digest(teacher),
    }
    return MeasuredTeacher(metrics, test.predictions)


def measure_student(
    config: Config,
    fitted: Fitted,
    teacher: MeasuredTeacher,
    data: ImageDataModule,
    device: torch.device,
    folder: RunFolder,
) -> dict[str, Any]:
    """Measure a trained student on the test split, once, and leave everything in its folder.

    Returns what `metrics.json` holds.
    """
    batches = data.loader("test", device, rank=0, world_size=1)
    test = measure_both(fitted.last, fitted.best, batches, device, teacher.predictions)
    about = {"class_names": data.class_names, "contents": folder.read_inputs().get("contents")}
    save_model(fitted.best, folder.student, {"epoch": str(fitted.metrics["best_epoch"]), **about})
    folder.write_predictions({**test.predictions, "labels": test.last.labels})
    folder.write_details(test.details(data.class_names))
    metrics = {
        **test.metrics,
        **fitted.metrics,
        **teacher.metrics,
        "student/parameters": count_parameters(fitted.last),
        "seed": config.seed,
        "precision/trainer": fitted.trainer.precision,
        **provenance(device),
    }
    folder.write_metrics(metrics)
    if config.pictures_every_n_epochs:
        log_confusion(fitted, test.last.confusion, data.class_names)
    for logger in fitted.loggers:
        if isinstance(logger, CurveLogger):
            logger.conclude(config.resolved, config.method.ignores, test.metrics)
    return metrics


def log_confusion(fitted: Fitted, confusion: Tensor, class_names: Sequence[str]) -> None:
    """Show the confusion matrix [C, C] of the last epoch."""
    picture = rendered(confusion_figure(confusion.numpy(), class_names))
    log_picture(fitted.loggers, "test/confusion", picture, fitted.metrics["steps"])
