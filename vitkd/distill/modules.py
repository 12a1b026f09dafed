"""The LightningModules: a model alone, and a student beside its frozen teacher.

Shapes: B batch, K classes, P distilled student maps.
"""

import time
from typing import Any, NamedTuple, Self

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.distill.meter import Meter
from vitkd.distill.optimization import AdamW, Schedule
from vitkd.distill.transfer import AttentionTransfer
from vitkd.models import ViT, describe


class Terms(NamedTuple):
    """A batch's logits and losses."""

    logits: Tensor
    """[B, K]"""
    task: Tensor
    """cross-entropy with the labels (equation 2.13)"""
    total: Tensor
    """what is minimised (equation 2.14)"""
    transfer: Tensor | None = None
    """how far the student's attention is from the teacher's, where that was computed"""
    per_map: Tensor | None = None
    """[P]: `transfer` before weighing"""


class ClassifyModule(L.LightningModule):
    """Trains one model on labels: a teacher, or a student by itself."""

    def __init__(self, model: ViT, optimizer: AdamW, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.schedule = optimizer, schedule
        self.train_meter, self.val_meter = Meter(), Meter()
        self.images_trained, self.seconds_trained = 0, 0.0
        self._window_start, self._last_step, self._lr = 0.0, 0, 0.0

    def terms(self, batch: Batch) -> Terms:
        """The losses of one training batch."""
        logits = self.model(batch.image).logits
        task = F.cross_entropy(logits, batch.label)
        return Terms(logits, task, total=task)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.terms(batch)
        self.observe(terms)
        self.train_meter.add(measures(terms, batch), len(batch.label))
        return terms.total

    def observe(self, terms: Terms) -> None:
        """Measure what only now and then is worth measuring, before the graph is used up."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_meter.add(measures(self.terms(batch), batch), len(batch.label))

    def on_train_epoch_start(self) -> None:
        # Validation lies between two epochs and is not training time.
        self._window_start, self._last_step = time.perf_counter(), self.trainer.global_step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # When the batch has ended, the schedule has moved on to the next step's.
        self._lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        stepped = self.trainer.global_step != self._last_step
        self._last_step = self.trainer.global_step
        if stepped and (self.is_logging_step or self.trainer.is_last_batch):
            self._log_window()

    def on_validation_epoch_end(self) -> None:
        values = self.named(self.val_meter.means(self._sum_over_processes))
        self.val_meter.reset()
        self._write({f"val/{name}": value for name, value in values.items()})

    def configure_optimizers(self) -> Any:
        # A fused optimiser unscales mixed-precision gradients itself, too late for clipping them.
        clips = self.trainer.gradient_clip_val is not None and "mixed" in str(self.trainer.precision)
        optimizer = self.optimizer.build((p for p in self.parameters() if p.requires_grad), fused=not clips)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model"] = describe(self.model)

    @property
    def is_logging_step(self) -> bool:
        """Whether a window of `log_every_n_steps` optimiser steps ends (and the next begins) here."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.trainer.global_step % every == 0

    def named(self, means: dict[str, list[float]]) -> dict[str, float]:
        """Each curve's name and value; a measure of several entries becomes several curves."""
        return {name: value for name, (value,) in means.items()}

    def window_values(self) -> dict[str, float]:
        """The training curves' values since the last window."""
        return self.named(self.train_meter.means(self._sum_over_processes))

    def _log_window(self) -> None:
        values = self.window_values()
        images = self.train_meter.images * self.trainer.world_size
        now = time.perf_counter()
        values["images_per_second"] = images / (now - self._window_start)
        values["lr"] = self._lr
        self.images_trained += images
        self.seconds_trained += now - self._window_start
        self.train_meter.reset()
        self._window_start = now
        self._write({f"train/{name}": value for name, value in values.items()})

    def _write(self, curves: dict[str, float]) -> None:
        # Not self.log: four of its calls a step cost 2 ms, and these values are means already.
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in curves.items()})
        for logger in self.loggers:
            logger.log_metrics(curves, step=self.trainer.global_step)

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums, reduce_op="sum") if self.trainer.world_size > 1 else sums


class DistillModule(ClassifyModule):
    """Trains a student on labels and on a frozen teacher's attention.

    `alpha` weighs the *class* loss: alpha·task + (1 − alpha)·transfer (DeiT's and vit-pytorch's alpha weigh
    the other term). At alpha = 1 training is the student's alone, step for step.
    """

    def __init__(
        self,
        model: ViT,
        teacher: ViT,
        transfer: AttentionTransfer,
        alpha: float,
        optimizer: AdamW,
        schedule: Schedule,
    ) -> None:
        super().__init__(model, optimizer, schedule)
        self.teacher = teacher.requires_grad_(False).eval()
        self.transfer = transfer
        self.alpha = alpha
        self._gradient_norms: dict[str, Tensor] = {}

    def terms(self, batch: Batch) -> Terms:
        if self.alpha == 1:
            # Recording attention would draw its dropout in another order than the student alone does.
            return super().terms(batch)
        with torch.no_grad():
            teacher_scores = self.teacher.scores(batch.image, self.transfer.teacher_blocks)
        return self._distill(batch, teacher_scores)

    def observe(self, terms: Terms) -> None:
        if terms.transfer is not None and self.is_logging_step:
            self._gradient_norms = self._measure_gradients(terms.task, terms.transfer)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        teacher = self.teacher(batch.image, record=self.transfer.teacher_blocks)
        terms = self._distill(batch, teacher.scores)
        agreement = (terms.logits.argmax(-1) == teacher.logits.argmax(-1)).float().mean()
        self.val_meter.add({**measures(terms, batch), "teacher_agreement": agreement}, len(batch.label))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith("teacher.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The teacher is not saved with its students; everything else must be there.
        teacher = {f"teacher.{name}": tensor for name, tensor in self.teacher.state_dict().items()}
        checkpoint["state_dict"] = teacher | checkpoint["state_dict"]

    def named(self, means: dict[str, list[float]]) -> dict[str, float]:
        per_map = means.get("map_loss")
        curves = super().named({name: values for name, values in means.items() if name != "map_loss"})
        if per_map is not None:
            curves |= {f"map_loss/{n}": value for n, value in zip(self.transfer.names, per_map, strict=True)}
        return curves

    def window_values(self) -> dict[str, float]:
        norms, self._gradient_norms = self._gradient_norms, {}
        return super().window_values() | {name: norm.item() for name, norm in norms.items()}

    def _distill(self, batch: Batch, teacher_scores: dict[int, Tensor]) -> Terms:
        output = self.model(batch.image, record=self.transfer.student_blocks)
        task = F.cross_entropy(output.logits, batch.label)
        per_map = self.transfer(output.scores, teacher_scores)
        transfer = self.transfer.total(per_map)
        total = self.alpha * task + (1 - self.alpha) * transfer
        return Terms(output.logits, task, total, transfer, per_map)

    def _measure_gradients(self, task: Tensor, transfer: Tensor) -> dict[str, Tensor]:
        """What each term alone would do to the weights: the figures to choose alpha by.

        The two norms are unweighted; their ratio is what alpha makes of it, transfer over task.
        """
        parameters = list(self.model.parameters())
        task_norm = gradient_norm(task, parameters)
        transfer_norm = gradient_norm(transfer, parameters)
        norms = {"gradient_norm_task": task_norm, "gradient_norm_transfer": transfer_norm}
        if self.alpha > 0:
            norms["gradient_ratio"] = (1 - self.alpha) * transfer_norm / (self.alpha * task_norm)
        return norms


def measures(terms: Terms, batch: Batch) -> dict[str, Tensor]:
    """What becomes a curve, as means over the batch."""
    values = {
        "task_loss": terms.task,
        "total_loss": terms.total,
        "acc": (terms.logits.argmax(-1) == batch.label).float().mean(),
    }
    if terms.transfer is not None and terms.per_map is not None:
        values |= {"transfer_loss": terms.transfer, "map_loss": terms.per_map}
    return values


def gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The 2-norm of d loss / d parameters; the graph is kept."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None])
    )
