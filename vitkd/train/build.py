"""From a run's configuration, student and teacher to the module that trains."""

from torch import Tensor

from vitkd.config.run import Config
from vitkd.data import ImageDataModule
from vitkd.methods.base import DataFacts
from vitkd.models import Model
from vitkd.train.module import DistillModule

CALIBRATION_IMAGES = 64


def build_module(settings: Config, student: Model, teacher: Model | None, data: DataFacts) -> DistillModule:
    """The module that trains `student` as `settings` say, beside `teacher` if the method needs one."""
    objective = None
    if settings.method.needs_teacher:
        assert teacher is not None
        objective = settings.method.objective(student, teacher, settings, data)
    return DistillModule(
        student,
        settings.optimizer,
        settings.schedule,
        settings.label_smoothing,
        teacher=teacher if objective is not None else None,
        objective=objective,
        weighting=settings.weighting,
        alpha=settings.alpha,
    )


def facts_of(data: ImageDataModule, seed: int | None = None) -> DataFacts:
    """What an objective may learn about the training data; `seed` is that of their order."""

    def calibration() -> Tensor:
        return data.first("train", CALIBRATION_IMAGES, seed).image

    assert data.dataset.num_classes is not None
    return DataFacts(data.num_images, data.dataset.num_classes, calibration)
