"""What a finished training leaves in its run folder: test metrics, weights, predictions, curves.

Shapes: N test images.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkd.cli.console import percent
from vitkd.config import Config
from vitkd.data import ImageDataModule
from vitkd.evaluate.measure import evaluate, measure_both
from vitkd.models import Model, count_parameters, digest, save_model
from vitkd.runs import results
from vitkd.runs.curves import TensorBoardCurves
from vitkd.runs.folder import RunFolder
from vitkd.runs.provenance import provenance
from vitkd.train.fit import Fitted

log = logging.getLogger("vitkd")


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
    test, predictions = measure_both(fitted.last, fitted.best, batches, device, teacher.predictions)
    save_model(fitted.best, folder.student, {"epoch": str(fitted.metrics["best_epoch"])})
    results.write_predictions(folder, predictions)
    metrics = {
        **test,
        **fitted.metrics,
        **teacher.metrics,
        "student/parameters": count_parameters(fitted.last),
        "seed": config.seed,
        "precision/trainer": fitted.trainer.precision,
        **provenance(device),
    }
    folder.write_metrics(metrics)
    for logger in fitted.loggers:
        if isinstance(logger, TensorBoardCurves):
            logger.conclude(config.resolved, config.method.ignores, test)
    return metrics
