"""The training step of a student, beside its frozen teacher or alone.

Written for one student or, by the leading axis that `stacked` adds, for several at once.

Shapes: S stacked students (absent for one), B batch, C classes, P values of an objective.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from vitkd.data import Batch
from vitkd.methods.base import Objective
from vitkd.methods.weighting import Constant, Weighting
from vitkd.models import Model, Output, Taps, describe
from vitkd.models.output import LOGITS
from vitkd.optim import Optimizer, Schedule, grouped, places, trained_by
from vitkd.train.cuda_graph import GraphedStep, take_step
from vitkd.train.logged import LoggedModule
from vitkd.train.losses import (
    Losses,
    TermWeights,
    gradient_ratio,
    gradients_of,
    share_equal,
    smoothed_cross_entropy,
    transfer_of,
    with_zero_gradients,
)
from vitkd.train.teacher_cache import TeacherCache


class DistillModule(LoggedModule):
    """Trains a student on labels and, by an objective, on what a frozen teacher answers.

    L = w·class loss + (1 − w)·mean over images of u·transfer loss, where the weighting gives w, as a rule
    `alpha`, and u, as a rule 1. Where the transfer loss never counts (alpha = 1) training is the student's
    alone, step for step.

    Args:
        model: the student.
        optimizer, schedule: of its weights, and of the objective's.
        label_smoothing: in training (Szegedy et al. 2016).
        teacher: is frozen; None for a student alone.
        objective: what is learned from the teacher; None for nothing.
        weighting: how much both losses and each image count.
        alpha: the weight of the class loss. DeiT's and vit-pytorch's alpha weigh the other term.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        schedule: Schedule,
        label_smoothing: float = 0.0,
        *,
        teacher: Model | None = None,
        objective: Objective | None = None,
        weighting: Weighting | None = None,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        assert objective is None or teacher is not None, "an objective compares with a teacher"
        self.model, self.objective = model, objective
        self.optimizer, self.schedule, self.label_smoothing = optimizer, schedule, label_smoothing
        self.places = places(optimizer, model, objective)  # by now: fsdp changes shapes and names
        self.alpha, self.weighting = 1.0 if objective is None else alpha, weighting or Constant()
        # In a tuple PyTorch does not see it: it moves with the module, but is not trained, averaged, saved or
        # shared among processes.
        self._teachers: tuple[Model, ...] = () if teacher is None else (teacher.requires_grad_(False).eval(),)
        self.cached: dict[str, TeacherCache] = {}
        """by split, the teacher's answers that are kept"""
        self.term_weights = TermWeights(self.alpha)
        self.distils = objective is not None and self.weighting.distils(self.alpha)
        """whether the transfer loss counts in any epoch"""
        self.compared = {0} if self.distils else set()
        """the students, numbered in a stack, whose transfer loss counts in this epoch"""
        self.shares_drop_path = objective is not None and objective.shares_drop_path
        self.weights_change = objective is not None and not isinstance(self.weighting, Constant)
        """whether the weights differ between epochs, steps or images, so that they are drawn"""
        self.graph: GraphedStep | None = None
        self._batch: Batch | None = None
        self._measured_norms: dict[str, Tensor] = {}

    @property
    def teacher(self) -> Model:
        """Frozen and in eval mode."""
        assert self._teachers, "the module has no teacher"
        return self._teachers[0]

    def teacher_taps(self, split: str) -> Taps | None:
        """What the teacher is asked for the images of "train" or "val"; None if it is never asked."""
        if self.objective is None or not (split == "val" or self.distils):
            return None
        of_weighting = Taps(logits=split == "val" or self.weighting.needs_teacher_logits)
        return Taps.union([self.objective.teacher_taps, of_weighting])

    @torch.no_grad()
    def ask_teacher(self, images: Tensor, split: str, **paths: Any) -> Output:
        """The teacher's answer to `images` [*U, B, channels, H, W]; validation always asks for its logits."""
        taps, axes = self.teacher_taps(split), images.shape[:-3]
        assert taps is not None
        answer: Output = self.teacher(images.flatten(0, -4), taps, **paths)
        return answer.map(lambda tensor: tensor.unflatten(0, axes))

    def answer(self, batch: Batch, split: str, **paths: Any) -> Output:
        """The teacher's answer to the batch's images, asked for now or kept from before."""
        cache = self.cached.get(split)
        return self.ask_teacher(batch.image, split, **paths) if cache is None else cache.answer(batch.index)

    def losses(self, batch: Batch) -> Losses:
        """The losses of one training batch."""
        # Drawn before the teacher is asked: it leaves out the same branches.
        paths = {"kept": self.model.draw_kept(batch.image[:, 0, 0, 0])} if self.shares_drop_path else {}  # type: ignore[operator]
        answer = self.answer(batch, "train", **paths) if self.compared else None
        return self.compare(batch, answer, **paths)

    def compare(self, batch: Batch, answer: Output | None, **paths: Any) -> Losses:
        """The losses of one batch, given the teacher's answer to it, where they are compared."""
        if self.objective is not None and not self.training and not self.objective.can_validate(batch):
            answer = None
        taps = LOGITS if answer is None or self.objective is None else self.objective.student_taps
        student = self.model(batch.image, taps._replace(logits=True), **paths)
        # Where nothing is ever learned from the teacher, just the answer learns the labels.
        learns_alone = self.objective is None or not self.distils
        logits = student.answer if learns_alone else self.objective.class_logits(student)  # type: ignore[union-attr]
        class_loss = self.class_loss(logits, batch.truth)
        if answer is None or self.objective is None:
            if self.distils and self.training and self.objective is not None:
                # Nothing is compared in this epoch; DDP still wants all gradients, and stacks give them.
                rest = [*student.heads.values(), *self.objective.parameters()]
                class_loss = with_zero_gradients(class_loss, rest)
            return Losses(student, class_loss, class_loss)
        transfer = transfer_of(batch, student, answer, self.objective, self.weighting)
        return Losses(student, class_loss, self.term_weights.total(class_loss, transfer.weighted), transfer)

    def class_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy with labels [B] or the classes' shares [B, C], smoothed in training."""
        return smoothed_cross_entropy(logits, truth, self.label_smoothing if self.training else 0.0)

    def on_train_start(self) -> None:
        super().on_train_start()
        # A run that continues within an epoch does not start that.
        self.start_epoch(self.current_epoch, self.trainer.max_epochs or 1)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.start_epoch(self.current_epoch, self.trainer.max_epochs or 1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Set the terms' weights of epoch `epoch`, counted from 0, of `epochs`."""
        class_weight = self.weighting.class_weight(self.alpha, epoch, epochs)
        self.compared = {0} if self.distils and class_weight < 1 else set()
        self.term_weights.fill(math.nan if self.weighting.needs_gradients else class_weight)
        if self.objective is not None:
            self.objective.start_epoch(epoch, epochs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.graph is not None:
            # Taken in `optimizer_step`: a backward pass has no business in this method's autocast.
            self._batch = batch
            return None
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """What is minimised on a training batch; its curves are noted."""
        losses, seen = self.losses(batch), self.as_seen(batch)
        self.guard.watch(losses.terms(), seen.index)
        if self.is_logging_step:
            self._measured_norms = self.gradient_norms(losses)
        self.window.meter.add(self.measures(losses, seen.label), seen.label.shape[-1])
        return losses.total.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        answer = None if self.teacher_taps("val") is None else self.answer(batch, "val")
        losses = self.compare(batch, answer)
        measured = self.measures(losses, batch.label)
        if answer is not None:
            measured["teacher_agreement"] = share_equal(losses.output.predicted, answer.predicted)
            if losses.transfer is None:
                # Images that cannot be compared have no part of the mean total.
                del measured["total_loss"]
        self.val_meter.add(measured, len(batch.label))

    def measures(self, losses: Losses, label: Tensor) -> dict[str, Tensor]:
        """What becomes a curve, as means over the batch with labels [*S, B]."""
        values = losses.measures(label)
        if losses.transfer is None or not self.weights_change:
            return values
        return values | self.term_weights.measures(losses.transfer)

    def as_seen(self, batch: Batch) -> Batch:
        """A training batch with the labels and indices [*S, B] as each student sees them."""
        return batch

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
        self.average_weights()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        is_logging_step = self.is_logging_step
        if self.graph is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.average_weights()
        else:
            assert optimizer_closure is not None
            optimizer_closure()
            batch, self._batch = self._batch, None
            assert batch is not None
            take_step(self, self.graph, batch)
        if is_logging_step:
            self.window.keep_norms(self._measured_norms)

    @property
    def step_kind(self) -> str:
        """What this step computes besides; a step of another kind needs a CUDA graph of its own."""
        measured = "gradients measured" if self.is_logging_step else "plain"
        stage = self.objective.stage if self.objective is not None and self.compared else "alone"
        return f"{measured}, {stage}"

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.balance_terms()
        # Gradients that overflow are everyday under 16-mixed; its scaler leaves those steps out by itself.
        looked_at = [] if self.trainer.precision == "16-mixed" else trained_by(optimizer)
        if not self.guard.hold_back(optimizer, looked_at):
            self.guard.check(self.trainer.global_step + 1, self.trainer.current_epoch + 1)

    def balance_terms(self) -> None:
        """Set the terms' weights by the gradients that this step has measured, if the weighting does so."""
        # After the backward pass, which reads the weights.
        if self.weighting.needs_gradients and self.is_logging_step and self._measured_norms:
            self.term_weights.fill(self.weighting.balanced(*self._measured_norms.values()))

    def gradient_norms(self, losses: Losses) -> dict[str, Tensor]:
        """The norms [*S] of each term's gradient by the student's weights; each costs a backward pass."""
        if losses.transfer is None:
            return {}
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        terms = {"class": losses.class_loss, "transfer": losses.transfer.weighted}
        norms = {f"gradient_norm_{n}": self.norm(gradients_of(term, parameters)) for n, term in terms.items()}
        if self.trainer.world_size > 1:
            # Each process has its own images, but all have to agree on weights that the norms set.
            norms = {n: self.trainer.strategy.reduce(norm, reduce_op="mean") for n, norm in norms.items()}
        return norms

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The 2-norm [*S] over all entries of `gradients`."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(each) for each in gradients]))

    def configure_optimizers(self) -> Any:
        # A fused optimiser unscales gradients itself, too late for clipping them.
        clips = self.trainer.gradient_clip_val is not None and self.trainer.precision == "16-mixed"
        optimizer = self.optimizer.build(grouped(self.optimizer, self.parameters(), self.places), not clips)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # Lightning refuses to clip for a fused optimiser under mixed precision; bf16 has no scaler to heed.
        if gradient_clip_val is None:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(trained_by(optimizer), gradient_clip_val)
        else:
            self.clip_norm(trained_by(optimizer), gradient_clip_val)

    def clip_norm(self, parameters: list[Tensor], most: float) -> None:
        """Scale the gradients of `parameters` to a norm of at most `most`, in a stack each student's."""
        torch.nn.utils.clip_grad_norm_(parameters, most)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["model"] = describe(self.model)
        checkpoint["term_weights"] = self.term_weights.both.clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.term_weights.both.copy_(checkpoint["term_weights"])

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        values = means.get("transfer_values")
        (curves,) = super().curves({name: mean for name, mean in means.items() if name != "transfer_values"})
        if values is not None and self.objective is not None and self.objective.curves:
            curves |= dict(zip(self.objective.curves, values, strict=True))
        return [curves]

    def window_curves(self) -> list[dict[str, float]]:
        curves = super().window_curves()
        norms = {name: norm.reshape(-1).tolist() for name, norm in self.window.take_norms().items()}
        weights = self.term_weights.class_loss.reshape(-1).tolist() if norms else []
        for student in self.compared if norms else ():
            own = {name: values[student] for name, values in norms.items()}
            curves[student] |= own | gradient_ratio(own, weights[student])
        return curves

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # They lie on the old device, in the old precision.
        self.cached.clear()
        for teacher in self._teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)
