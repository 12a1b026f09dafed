"""Fitting a stack of students: one training, and for each student what a run of its own would leave.

Shapes: S stacked students.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger
from torch import Tensor

from vitkd.models import ViT, describe
from vitkd.runs.checkpointing import Checkpointing, callbacks_of
from vitkd.runs.checkpoints import newest_good, write_checkpoint
from vitkd.runs.console import StackLines
from vitkd.runs.folder import RunFolder
from vitkd.runs.signals import PostponedSignals
from vitkd.runs.training import (
    Fitted,
    Settings,
    averaging,
    build_trainer,
    curves_of,
    progress_bar,
    run_trainer,
    where_to_go_on,
)
from vitkd.stacked import StackedImages, StackedModule, unstack
from vitkd.stacked.checkpoint import take_students

log = logging.getLogger("vitkd")


class Place(NamedTuple):
    """Where a student's training is saved while it goes on."""

    stack: Path
    """the folder of its stack"""
    student: int
    """its number there"""
    students: int
    """of the stack"""


class StackFolder:
    """The folder of a stack under way: its checkpoint. What is to stay goes to the students' run folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.ckpt"
        self.best = path / "checkpoints" / "best.ckpt"

    def remove(self) -> None:
        """Its students are done."""
        shutil.rmtree(self.path, ignore_errors=True)


class StackCheckpointing(Checkpointing):
    """Saves a stack every few minutes, before a signal has its effect, and when training ends.

    Not at every epoch's end, as a single student is: an epoch of many small students takes less time than
    writing all of them down.
    """

    def __init__(self, folder: StackFolder, minutes: float, signals: PostponedSignals) -> None:
        super().__init__(folder, minutes, signals)
        self.last_accuracies: list[float] | None = None
        self.best_accuracies: list[float] = []
        self.best_epochs: list[int] = []
        """counted from 1"""
        self.best_weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracies = trainer.callback_metrics.get("val/acc")
        self.last_accuracies = None if accuracies is None else accuracies.tolist()
        if self.last_accuracies is not None:
            self._keep_best(self.last_accuracies, validated_weights(trainer), trainer.current_epoch + 1)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or self._is_due(trainer):
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["training"] |= {
            "last_accuracies": self.last_accuracies,
            "best_accuracies": self.best_accuracies,
            "best_epochs": self.best_epochs,
            "best": self.best_weights,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        saved = checkpoint["training"]
        self.best = None
        self.last_accuracies, self.best_accuracies = saved["last_accuracies"], saved["best_accuracies"]
        self.best_epochs = saved["best_epochs"]
        device = trainer.strategy.root_device
        self.best_weights = {name: values.to(device) for name, values in saved["best"].items()}

    def _keep_best(self, accuracies: list[float], weights: dict[str, Tensor], epoch: int) -> None:
        """Keep the weights of those students that were never better; the earliest of equals stays."""
        if not self.best_epochs:
            self.best_accuracies, self.best_epochs = list(accuracies), [epoch] * len(accuracies)
            self.best_weights = {name: values.clone() for name, values in weights.items()}
            return
        pairs = zip(accuracies, self.best_accuracies, strict=True)
        improved = [student for student, (now, best) in enumerate(pairs) if now > best]
        for student in improved:
            self.best_accuracies[student], self.best_epochs[student] = accuracies[student], epoch
            for name, values in weights.items():
                self.best_weights[name][student] = values[student]


def validated_weights(trainer: L.Trainer) -> dict[str, Tensor]:
    """The weights that validation saw: the model's, or their average."""
    module: torch.nn.Module = trainer.lightning_module
    for callback in callbacks_of(trainer):
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            module = callback._average_model.module
    model = module.get_submodule("model")
    return {name: values.detach() for name, values in model.state_dict().items()}


def fit_stack(
    module: StackedModule,
    data: StackedImages,
    place: StackFolder,
    folders: Sequence[RunFolder],
    settings: Settings,
    callbacks: Sequence[Callback],
) -> list[Fitted | str]:
    """Train the stack, from where it was saved in `place` if it was, and leave each student's checkpoints.

    Returns what each student's own fit would, or the line that says why it failed.

    Raises:
        RunError: no student is finite any more, or the disk is full.
        ConfigError: a setting of the Trainer does not suit it after all.
    """
    checkpoint, start = where_to_go_on(place.last)
    loggers: list[list[Logger]] = [curves_of(folder, start) for folder in folders]
    with PostponedSignals() as signals:
        checkpointing = StackCheckpointing(place, settings.checkpoint_minutes, signals)
        trainer = build_trainer(
            place.path,
            settings,
            [*averaging(settings), *callbacks, StackLines(), *progress_bar(), checkpointing],
            [logger for own in loggers for logger in own],
        )
        run_trainer(trainer, module, data, checkpoint)
    last = validated_weights(trainer)
    outcomes: list[Fitted | str] = []
    for student, (folder, own) in enumerate(zip(folders, loggers, strict=True)):
        if student in module.failed:
            outcomes.append(module.failed[student])
        else:
            outcomes.append(conclude_student(student, folder, own, module, trainer, checkpointing, last))
    return outcomes


def conclude_student(
    student: int,
    folder: RunFolder,
    loggers: list[Logger],
    module: StackedModule,
    trainer: L.Trainer,
    checkpointing: StackCheckpointing,
    weights: dict[str, Tensor],
) -> Fitted:
    """Write one student's checkpoints and gather its figures."""
    validated = bool(checkpointing.best_epochs)
    last = unstack(module.model, weights, student).eval()
    best = unstack(module.model, checkpointing.best_weights, student).eval() if validated else last
    epochs = trainer.current_epoch
    best_epoch = checkpointing.best_epochs[student] if validated else epochs
    about = {"model": describe(last), "global_step": trainer.global_step}
    folder.checkpoints.mkdir(exist_ok=True)
    write_checkpoint(folder.last, {**about, "epoch": epochs - 1, "state_dict": prefixed(last)})
    if validated:
        write_checkpoint(folder.best, {**about, "epoch": best_epoch - 1, "state_dict": prefixed(best)})
    accuracies = checkpointing.last_accuracies
    metrics = {
        "val/acc_last": accuracies[student] if accuracies else None,
        "val/acc_best": checkpointing.best_accuracies[student] if validated else None,
        "best_epoch": best_epoch,
        "epochs": epochs,
        "steps": trainer.global_step,
        "wall_seconds": checkpointing.wall_seconds,
        "images_per_second": module.images_trained / module.seconds_trained,
        "stack/students": module.students,
    }
    return Fitted(trainer, loggers, last, best, metrics)


def prefixed(model: ViT) -> dict[str, Tensor]:
    """The weights as a LightningModule that holds `model` names them."""
    return {f"model.{name}": values for name, values in model.state_dict().items()}


def carry_over(stack: Path, students: Sequence[int], count: int, to: StackFolder) -> None:
    """Let some students of a stack that was cut off go on in another."""
    found = newest_good(StackFolder(stack).last)
    if found is None:
        return
    content = take_students(found[1], students, count)
    failed = found[1]["failed"]
    content["failed"] = {new: failed[old] for new, old in enumerate(students) if old in failed}
    to.last.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(to.last, content)
