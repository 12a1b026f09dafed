"""The LightningModules: a model alone, and a student beside its frozen teacher.

Both are written for one student or, by the leading axis that `stacked` adds, for several at once.

Shapes: S stacked students (absent for one), B batch, K classes, P distilled student maps.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.methods.maps.objective import Transfer
from vitkd.models import Model, TokenLogits, ViT, describe
from vitkd.models.base import Answer
from vitkd.models.layers import changed
from vitkd.optim import AdamW, Schedule
from vitkd.train.cuda_graph import CaptureError, GraphedStep
from vitkd.train.guard import FiniteGuard
from vitkd.train.meter import Meter
from vitkd.train.teacher_cache import TeacherCache

log = logging.getLogger("vitkd")


class Terms(NamedTuple):
    """A batch's logits and losses."""

    logits: Tensor
    """[*S, B, K]"""
    task: Tensor
    """[*S]: cross-entropy with the labels (equation 2.13)"""
    total: Tensor
    """[*S]: what is minimised (equation 2.14)"""
    transfer: Tensor | None = None
    """[*S]: how far the student is from its teacher, where that was computed"""
    per_map: Tensor | None = None
    """[*S, P]: `transfer` before weighing"""
    of_tokens: TokenLogits | None = None
    """whose mean the logits are, where the student has two heads"""

    def named_losses(self) -> dict[str, Tensor]:
        """The terms of `total`, as a person calls them."""
        losses = {"class loss": self.task}
        return losses if self.transfer is None else losses | {"transfer loss": self.transfer}


class ClassifyModule(L.LightningModule):
    """Trains one model on labels: a teacher, or a student by itself."""

    def __init__(
        self, model: Model, optimizer: AdamW, schedule: Schedule, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer, self.schedule, self.label_smoothing = optimizer, schedule, label_smoothing
        self.train_meter, self.val_meter = Meter(), Meter()
        self.guard = FiniteGuard()
        self.graph: GraphedStep | None = None
        self._batch: Batch | None = None
        self.images_trained, self.seconds_trained = 0, 0.0
        self._window_start, self._window_seconds = 0.0, 0.0
        self._latest: dict[str, float] = {}
        self._measured: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def terms(self, batch: Batch) -> Terms:
        """The losses of one training batch."""
        output = self.model(batch.image)
        task = self.task_loss(output.logits, batch.label)
        return Terms(output.logits, task, total=task, of_tokens=output.of_tokens)

    def task_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy with the labels [B], smoothed in training (Szegedy et al. 2016)."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, label, label_smoothing=smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.graph is not None:
            # Taken in `optimizer_step`: a backward pass has no business in this method's autocast.
            self._batch = batch
            return None
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """What is minimised on a training batch; its figures are noted."""
        terms, seen = self.terms(batch), self.as_seen(batch)
        self.guard.watch(terms.named_losses(), seen.index)
        if self.is_logging_step:
            self._measured = self.gradient_norms(terms)
        self.train_meter.add(measures(terms, seen), seen.label.shape[-1])
        return terms.total.sum()

    def whole_step(self, batch: Batch) -> None:
        """What Lightning makes of `training_step` and an optimiser, as one piece for a CUDA graph."""
        (optimizer,) = self.trainer.optimizers
        optimizer.zero_grad()
        with self.trainer.precision_plugin.train_step_context():
            loss = self.loss(batch)
        loss.backward()
        self.on_before_optimizer_step(optimizer)
        self.configure_gradient_clipping(
            optimizer, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        )
        optimizer.step()

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        is_logging_step = self.is_logging_step
        if self.graph is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            assert optimizer_closure is not None
            optimizer_closure()
            batch, self._batch = self._batch, None
            assert batch is not None
            self._take(batch, self.graph)
        if is_logging_step:
            # A copy: where a graph leaves its figures the next replay leaves others.
            self._norms = {name: norm.clone() for name, norm in self._measured.items()}

    def _take(self, batch: Batch, graph: GraphedStep) -> None:
        """Take a step by `graph`, or, from the first one on that cannot be captured, as ever."""
        images = self.train_meter.images
        try:
            # On a logged step gradients are measured besides.
            if graph.take(batch, "logged" if self.is_logging_step else "plain"):
                self.train_meter.added_again(batch.label.shape[-1])
        except CaptureError as error:
            log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", error)
            self.graph = None
            self.train_meter.images = images
            self.guard.forget_step()
            self.whole_step(batch)

    def as_seen(self, batch: Batch) -> Batch:
        """A training batch with the labels and indices [*S, B] as each student sees them."""
        return batch

    def gradient_norms(self, terms: Terms) -> dict[str, Tensor]:
        """What each term alone would do to the weights; asked only now and then, for it costs as much."""
        return {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_meter.add(measures(self.terms(batch), batch), batch.label.shape[-1])

    def on_train_epoch_start(self) -> None:
        # Validation lies between two epochs and is not training time.
        self._window_start, self._window_seconds = time.perf_counter(), 0.0

    def on_train_start(self) -> None:
        self._window_start = time.perf_counter()
        self.trainer.callback_metrics.update(tensors(self._latest))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Gradients that overflow are everyday under 16-mixed; its scaler leaves those steps out by itself.
        looked_at = [] if self.trainer.precision == "16-mixed" else trained_by(optimizer)
        if not self.guard.hold_back(optimizer, looked_at):
            self.guard.check(self.trainer.global_step + 1, self.trainer.current_epoch + 1)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # The first hook after an optimiser step; a checkpoint at the step's end holds what this leaves.
        if self.is_logging_step or self.trainer.is_last_batch:
            self.check_finite()
            # On CUDA they are tensors, so that a graph can read them.
            self._log_window([float(rate) for rate in scheduler.get_last_lr()])
        scheduler.step()

    def on_validation_epoch_start(self) -> None:
        self.val_meter.reset()

    def on_validation_epoch_end(self) -> None:
        self._write("val", self.curves(self.val_meter.means(self._sum_over_processes)))

    def configure_optimizers(self) -> Any:
        # A fused optimiser unscales gradients itself, too late for clipping them.
        clips = self.trainer.gradient_clip_val is not None and self.trainer.precision == "16-mixed"
        optimizer = self.optimizer.build((p for p in self.parameters() if p.requires_grad), fused=not clips)
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimiser under mixed precision; bf16 has no scaler to heed.
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(trained_by(optimizer), gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(trained_by(optimizer), gradient_clip_val)

    def check_finite(self) -> None:
        """RunError if a loss or gradient so far was not finite; the weights are those before that step."""
        self.guard.check(self.trainer.global_step, self.trainer.current_epoch + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        checkpoint["model"] = describe(self.model)
        checkpoint["curves"] = {
            "window": self.train_meter.state_dict(),
            "window_seconds": self._window_seconds + time.perf_counter() - self._window_start,
            "images_trained": self.images_trained,
            "seconds_trained": self.seconds_trained,
            "latest": {name: value.tolist() for name, value in self.trainer.callback_metrics.items()},
            "gradient_norms": dict(self._norms),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        curves = checkpoint["curves"]
        self.train_meter.load_state_dict(curves["window"], self.device)
        self._window_seconds = curves["window_seconds"]
        self.images_trained, self.seconds_trained = curves["images_trained"], curves["seconds_trained"]
        self._latest = curves["latest"]
        self._norms = {name: norm.to(self.device) for name, norm in curves["gradient_norms"].items()}

    @property
    def is_logging_step(self) -> bool:
        """Whether a window of `log_every_n_steps` optimiser steps ends (and the next begins) here."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return self.trainer.global_step % every == 0

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        """Each curve's name and value, of each student; several entries of a measure are several curves."""
        return [{name: value for name, (value,) in means.items()}]

    def window_curves(self) -> list[dict[str, float]]:
        """The training curves' values since the last window, of each student."""
        return self.curves(self.train_meter.means(self._sum_over_processes))

    def _log_window(self, lr: Sequence[float]) -> None:
        curves = self.window_curves()
        images = self.train_meter.images * self.trainer.world_size
        now = time.perf_counter()
        seconds = self._window_seconds + now - self._window_start
        self.images_trained += images
        self.seconds_trained += seconds
        self.train_meter.reset()
        self._window_start, self._window_seconds = now, 0.0
        for values, rate in zip(curves, lr, strict=True):
            values |= {"images_per_second": images / seconds, "lr": rate}
        self._write("train", curves)

    def _write(self, phase: str, curves: list[dict[str, float]]) -> None:
        """Hand each student's values to the loggers that are its own."""
        # Not self.log: four of its calls a step cost 2 ms, and these values are means already.
        curves = [{f"{phase}/{name}": value for name, value in values.items()} for values in curves]
        self.trainer.callback_metrics.update(tensors(self.summary(curves)))
        share = len(self.loggers) // len(curves)
        for student, values in enumerate(curves):
            for logger in self.loggers[student * share : (student + 1) * share]:
                logger.log_metrics(values, step=self.trainer.global_step)

    def summary(self, curves: list[dict[str, float]]) -> Mapping[str, float | list[float]]:
        """What callbacks see of the students' curves."""
        return curves[0]

    def _sum_over_processes(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums, reduce_op="sum") if self.trainer.world_size > 1 else sums


class TaughtModule(ClassifyModule):
    """Trains beside a frozen teacher, if there is one, whose answers may be kept."""

    def __init__(
        self,
        model: Model,
        teacher: Model | None,
        optimizer: AdamW,
        schedule: Schedule,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, optimizer, schedule, label_smoothing)
        # In a tuple PyTorch does not see it: it goes where the module goes, but is no part of what is
        # trained, averaged, saved or shared among processes.
        frozen = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self._teachers: tuple[Model, ...] = frozen
        self.cached: dict[str, TeacherCache] = {}
        """by split, the answers that the teacher has given already"""

    def teacher_blocks(self, split: str) -> list[int] | None:
        """The blocks whose scores "train" or "val" needs; None where the teacher is not asked."""
        raise NotImplementedError

    @property
    def needs_logits(self) -> bool:
        """Whether training asks the teacher for its logits, too."""
        raise NotImplementedError

    @property
    def records_factors(self) -> bool:
        """Whether the models record just their scores' factors."""
        raise NotImplementedError

    @property
    def teacher(self) -> Model:
        """Frozen and in eval mode."""
        return self._teachers[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # They lie on the old device, in the old precision.
        self.cached.clear()
        for teacher in self._teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, split: str) -> Answer:
        """Run the teacher on `images` [*U, B, C, H, W]; validation always asks for its logits."""
        blocks, many = self.teacher_blocks(split) or [], images.shape[:-3]
        given = images.flatten(0, -4), blocks, self.records_factors
        if split == "train" and not self.needs_logits:
            assert isinstance(self.teacher, ViT)
            scores, logits = self.teacher.scores(*given), None
        else:
            output = self.teacher(*given)
            scores, logits = output.scores, output.logits.unflatten(0, many)
        apart = {b: changed(found, lambda t: t.unflatten(0, many)) for b, found in scores.items()}
        return Answer(apart, logits)

    def answer(self, batch: Batch, split: str) -> Answer:
        """What the teacher says of the batch's images, given now or before."""
        cache = self.cached.get(split)
        return self.ask_teacher(batch.image, split) if cache is None else cache.answer(batch.index)


class DistillModule(TaughtModule):
    """Trains a student on labels and on what a frozen teacher says.

    `alpha` weighs the *class* loss: alpha·task + (1 − alpha)·transfer (DeiT's and vit-pytorch's alpha weigh
    the other term). At alpha = 1 training is the student's alone, step for step.
    """

    def __init__(
        self,
        model: Model,
        teacher: Model,
        transfer: Transfer,
        alpha: float,
        optimizer: AdamW,
        schedule: Schedule,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, teacher, optimizer, schedule, label_smoothing)
        self.transfer = transfer
        self.alpha = alpha

    def teacher_blocks(self, split: str) -> list[int] | None:
        return None if split == "train" and self.alpha == 1 else self.transfer.teacher_blocks

    @property
    def needs_logits(self) -> bool:
        return self.transfer.needs_logits

    @property
    def records_factors(self) -> bool:
        return self.transfer.streams

    def terms(self, batch: Batch) -> Terms:
        if self.alpha == 1:
            # Recording attention would draw its dropout in another order than the student alone does.
            return super().terms(batch)
        return self._distill(batch, self.answer(batch, "train"))

    def gradient_norms(self, terms: Terms) -> dict[str, Tensor]:
        """The figures to choose alpha by: two unweighted norms, and what alpha makes of their ratio."""
        if terms.transfer is None:
            return {}
        parameters = list(self.model.parameters())
        task, transfer = gradient_norm(terms.task, parameters), gradient_norm(terms.transfer, parameters)
        norms = {"gradient_norm_task": task, "gradient_norm_transfer": transfer}
        if self.alpha > 0:
            norms["gradient_ratio"] = (1 - self.alpha) * transfer / (self.alpha * task)
        return norms

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        answer = self.answer(batch, "val")
        terms = self._distill(batch, answer)
        agreement = share_equal(terms.logits.argmax(-1), answer.predicted)
        self.val_meter.add({**measures(terms, batch), "teacher_agreement": agreement}, len(batch.label))

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        values = means.get("map_loss")
        (curves,) = super().curves({name: mean for name, mean in means.items() if name != "map_loss"})
        if values is not None and self.transfer.curves:
            curves |= dict(zip(self.transfer.curves, values, strict=True))
        return [curves]

    def window_curves(self) -> list[dict[str, float]]:
        norms, self._norms = self._norms, {}
        (curves,) = super().window_curves()
        return [curves | {name: norm.item() for name, norm in norms.items()}]

    def _distill(self, batch: Batch, answer: Answer) -> Terms:
        output = self.model(batch.image, self.transfer.student_blocks, self.transfer.streams)
        # At alpha = 1 nothing but the answer was trained.
        learns_labels = output.logits if self.alpha == 1 else self.transfer.task_logits(output)
        task = self.task_loss(learns_labels, batch.label)
        per_map = self.transfer.compare(output, answer)
        transfer = self.transfer.total(per_map)
        total = self.alpha * task + (1 - self.alpha) * transfer
        return Terms(output.logits, task, total, transfer, per_map, output.of_tokens)


def tensors(values: Mapping[str, float | list[float]]) -> dict[str, Tensor]:
    """Each value as a tensor, as Lightning's callbacks expect metrics."""
    return {name: torch.tensor(value) for name, value in values.items()}


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of an optimiser; a tenth of the time that a walk through the modules takes."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def measures(terms: Terms, batch: Batch) -> dict[str, Tensor]:
    """What becomes a curve, as means over the batch."""
    values = {
        "task_loss": terms.task,
        "total_loss": terms.total,
        "acc": share_equal(terms.logits.argmax(-1), batch.label),
    }
    if terms.transfer is not None and terms.per_map is not None:
        values |= {"transfer_loss": terms.transfer, "map_loss": terms.per_map}
    if terms.of_tokens is not None:
        for token, logits in terms.of_tokens._asdict().items():
            values[f"acc_{token}"] = share_equal(logits.argmax(-1), batch.label)
    return values


def share_equal(predicted: Tensor, true: Tensor) -> Tensor:
    """The share [*S] of classes [*S, B] that are equal."""
    return (predicted == true).float().mean(-1)


def gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The 2-norm of d loss / d parameters; the graph is kept."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None])
    )
