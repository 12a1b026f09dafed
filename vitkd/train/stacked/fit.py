"""Fit a stack of students: one training, and for each student what a run of its own would leave.

Shapes: S stacked students.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from vitkd.config.run import Config
from vitkd.errors import RunError
from vitkd.models import describe
from vitkd.process.signals import PostponedSignals
from vitkd.runs.checkpoints import newest_good, write_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackFolder
from vitkd.train.callbacks import format_metrics, progress
from vitkd.train.checkpointing import Checkpointing, averages_of
from vitkd.train.fit import (
    Fitted,
    build_trainer,
    curve_loggers,
    find_checkpoint,
    run_trainer,
)
from vitkd.train.stacked import StackedImages, StackedModule, unstack

log = logging.getLogger("vitkd")

# What of a checkpoint belongs to no single student.
SHARED = {"loops", "lr_schedulers", "random_state", "step", "param_groups", "StackedImages"}
# A student's lock, log and TensorBoard events; and what everything else has open.
FILES_A_STUDENT, OTHER_FILES = 4, 256


def room_for(students: int) -> int:
    """How many students may be stacked at once by the limit on open files, which is raised if need be."""
    if sys.platform == "win32":
        return students
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OTHER_FILES + FILES_A_STUDENT * students
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(students, (soft - OTHER_FILES) // FILES_A_STUDENT))


class StackCheckpointing(Checkpointing):
    """Saves a stack every few minutes, before a signal takes effect, and when training ends.

    Not at every epoch's end, as a single student is: an epoch of many small students takes less time than
    saving all of them.
    """

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracies = trainer.callback_metrics.get("val/acc")
        students: int = trainer.lightning_module.students  # type: ignore[assignment]
        self.acc_last = None if accuracies is None else accuracies[:students].tolist()
        if self.acc_last is not None:
            self._keep_best(self.acc_last, validated_weights(trainer), trainer.current_epoch + 1)
        is_last = trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or self._is_due(trainer):
            self._save(trainer)

    def _keep_best(self, accuracies: list[float], weights: dict[str, Tensor], epoch: int) -> None:
        """Keep the weights of those students that were never better; the earliest of equals stays."""
        if self.best is None:
            copies = {name: values.clone() for name, values in weights.items()}
            self.acc_best = list(accuracies)
            self.best = {"epochs": [epoch] * len(accuracies), "weights": copies}
            return
        pairs = zip(accuracies, self.acc_best, strict=True)
        improved = [student for student, (now, best) in enumerate(pairs) if now > best]
        for student in improved:
            self.acc_best[student], self.best["epochs"][student] = accuracies[student], epoch
        places = torch.tensor(improved, device=next(iter(weights.values())).device)
        for name, values in weights.items() if improved else ():
            # Those of a checkpoint lie on the CPU.
            best = self.best["weights"][name] = self.best["weights"][name].to(values.device)
            best.index_copy_(0, places, values.index_select(0, places))


def validated_weights(trainer: L.Trainer) -> dict[str, Tensor]:
    """The weights that validation saw: the model's, or their average."""
    module: torch.nn.Module = trainer.lightning_module
    for average in averages_of(trainer):
        if average._average_model is not None:
            module = average._average_model.module
    model = module.get_submodule("model")
    return {name: values.detach() for name, values in model.state_dict().items()}


class StudentLines(Callback):
    """One plain line an epoch in each job's own run.log, and a warning when one fails."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self.folders = folders
        self._warned: set[int] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        failed: dict[int, str] = pl_module.failed  # type: ignore[assignment]
        for job in sorted(failed.keys() - self._warned):
            log.warning("warning: %s: %s", self.folders[job].path, failed[job])
            self._warned.add(job)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = {name: values.tolist() for name, values in trainer.callback_metrics.items()}
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        epoch = f"{now} student: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        for job, folder in enumerate(self.folders):
            columns = format_metrics({name: values[job] for name, values in metrics.items()})
            with folder.log.open("a", encoding="utf-8") as file:
                file.write(f"{epoch}  {columns}\n")


def fit_stack(
    module: StackedModule,
    data: StackedImages,
    place: StackFolder,
    folders: Sequence[RunFolder],
    settings: Config,
    callbacks: Sequence[Callback],
) -> list[Fitted | str]:
    """Train the stack, from its checkpoint in `place` if there is one.

    Returns for each job what its own fit would, or the line that says why it failed.

    Raises:
        RunError: the disk is full.
        ConfigError: a setting of the Trainer does not suit it after all.
    """
    checkpoint, start = find_checkpoint(place.last)
    loggers: list[list[Logger]] = [curve_loggers(folder, settings, start) for folder in folders]
    with PostponedSignals() as signals:
        checkpointing = StackCheckpointing(place, settings.checkpoint_minutes, signals)
        callbacks = [*callbacks, StudentLines(folders), *progress("students")]
        trainer = build_trainer(settings, callbacks, checkpointing, [*chain.from_iterable(loggers)])
        try:
            run_trainer(trainer, module, data, checkpoint)
        except RunError:
            if len(module.failed) < module.jobs:
                raise
    for job in module.failed:
        for logger in loggers[job]:
            logger.finalize("failed")
    last = validated_weights(trainer)
    return [
        module.failed[job]
        if job in module.failed
        else fitted(module.student_of[job], own, trainer, checkpointing, last)
        for job, own in enumerate(loggers)
    ]


def fitted(
    student: int,
    loggers: list[Logger],
    trainer: L.Trainer,
    checkpointing: StackCheckpointing,
    weights: dict[str, Tensor],
) -> Fitted:
    """One student's models and metrics; `weights` are the stack's after the last step."""
    module = trainer.lightning_module
    assert isinstance(module, StackedModule)
    best_epoch, best = trainer.current_epoch, None
    last = unstack(module.model, weights, student).eval()
    if checkpointing.best is not None:
        best_epoch = checkpointing.best["epochs"][student]
        best = unstack(module.model, checkpointing.best["weights"], student).eval()
    metrics = {
        "val/acc_last": checkpointing.acc_last[student] if checkpointing.acc_last else None,
        "val/acc_best": checkpointing.acc_best[student] if checkpointing.acc_best else None,
        "best_epoch": best_epoch,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "wall_seconds": checkpointing.wall_seconds,
        "images_per_second": module.window.images_trained / module.window.seconds_trained,
        "stack/students": module.students,
    }
    return Fitted(trainer, loggers, last, best or last, metrics)


def write_checkpoints(folder: RunFolder, student: Fitted) -> None:
    """Write a student's checkpoints: weights only, for a run that is done is not resumed."""
    saved = [(folder.last, student.last, student.metrics["epochs"])]
    if student.best is not student.last:
        saved.append((folder.best, student.best, student.metrics["best_epoch"]))
    for path, model, epoch in saved:
        weights = {f"model.{name}": values for name, values in model.state_dict().items()}
        about = {"model": describe(model), "global_step": student.metrics["steps"], "epoch": epoch - 1}
        write_checkpoint(path, {**about, "state_dict": weights})


def take_entries(content: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """The part of a checkpoint's `content` that belongs to some of its jobs or students.

    Args:
        kept: how many jobs, or students, there are → which of them are wanted, in order. Whatever is
            a tensor or list of so many entries has one each.
    """
    if isinstance(content, Tensor):
        wanted = kept.get(len(content)) if content.ndim else None
        return content if wanted is None else content[torch.tensor(wanted, device=content.device)].clone()
    if isinstance(content, list) and len(content) in kept:
        return [content[entry] for entry in kept[len(content)]]
    if isinstance(content, list | tuple):
        return type(content)(take_entries(part, kept) for part in content)
    if isinstance(content, Mapping):
        return {key: part if key in SHARED else take_entries(part, kept) for key, part in content.items()}
    return content


def carry_over(before: StackFolder, jobs: Sequence[int], to: StackFolder) -> None:
    """Copy some of the jobs that are saved in `before`, in this order, to the checkpoint of another stack."""
    checkpoint = newest_good(before.last)
    if checkpoint is None:
        return
    _, saved = checkpoint
    student_of, failed = saved["student_of"], saved["failed"]
    students = [*dict.fromkeys(student_of[job] for job in jobs)]
    content = take_entries(saved, {1 + max(student_of): students, len(student_of): jobs})
    content["student_of"] = [students.index(student_of[job]) for job in jobs]
    content["failed"] = {new: failed[old] for new, old in enumerate(jobs) if old in failed}
    write_checkpoint(to.last, content)
