"""From a run's configuration, student and teacher to the module that trains, compiled where it asks for that.

`compile=true` trains by compiled code (torch.compile); everything else is as without it.
"""

import os
import shutil
import sys
from importlib.util import find_spec

import torch
from torch._dynamo.exc import TorchDynamoException

from vitkd.config.run import Config
from vitkd.data import Batch, ImageDataModule
from vitkd.errors import ConfigError, RunError, one_line
from vitkd.methods.base import DataFacts
from vitkd.models import Model
from vitkd.models.initialisation import InitialisedConfig
from vitkd.models.selection import select_weights
from vitkd.train.losses import Losses
from vitkd.train.module import DistillModule

CALIBRATION_IMAGES = 64


def build_module(settings: Config, student: Model, teacher: Model | None, data: DataFacts) -> DistillModule:
    """The module that trains `student` as `settings` say, beside `teacher` if the method needs one."""
    objective = None
    if settings.method.needs_teacher:
        assert teacher is not None
        if isinstance(student.config, InitialisedConfig) and student.config.selects_from_teacher:
            select_weights(student, teacher, student.config.init_layers)
        if settings.weighting.distils(settings.alpha):
            settings.method.set_first_weights(student, teacher)
        objective = settings.method.objective(student, teacher, settings, data)
        student = settings.method.trained(student, teacher, settings, data)
    return DistillModule(
        student,
        settings.optimizer,
        settings.schedule,
        settings.label_smoothing,
        teacher=teacher if settings.method.needs_teacher else None,
        objective=objective,
        weighting=settings.weighting,
        alpha=settings.alpha,
    )


def facts_of(data: ImageDataModule, seed: int | None = None) -> DataFacts:
    """What an objective may learn about the training data; `seed` is that of their order."""
    classes = data.dataset.num_classes
    assert classes is not None
    return DataFacts(
        data.num_images,
        classes,
        # Whatever the run's seed: then what is made of the teacher's maps is the same for all students.
        lambda: data.first("train", CALIBRATION_IMAGES, seed=0).image,
        data.training_labels,
        data.seed if seed is None else seed,
    )


def check_compiler(device: torch.device) -> None:
    """ConfigError unless what torch.compile generates for `device` can be compiled."""
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError("compile=true: needs Triton on a GPU; pip install triton, or compile=false")
    # The one that PyTorch calls.
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile=true: there is no C++ compiler {compiler}; install one or set CXX, or compile=false"
        )


def compile_training(module: DistillModule) -> None:
    """Compile `module.losses`, the forward passes of student and teacher and the losses, for training steps.

    Not for validation, whose last batch is of another size, nor for pictures: each would be compiled again.
    Nor for the steps that are logged, whose gradients are measured term by term: a compiled graph gives up
    its buffers in the first backward pass. Names of weights, checkpoints and averages stay as they are.
    """
    # What was compiled for the process's earlier jobs counts against the number of times it may be.
    torch._dynamo.reset()
    eager = module.losses
    compiled = torch.compile(eager, dynamic=False)

    def losses(batch: Batch) -> Losses:
        if not module.training or module.is_logging_step:
            return eager(batch)
        try:
            return compiled(batch)
        except TorchDynamoException as error:
            first = str(error).strip().partition("\n")[0]
            raise RunError(f"compile=true: {one_line(Exception(first))}; train with compile=false") from error

    module.losses = losses  # type: ignore[method-assign]
