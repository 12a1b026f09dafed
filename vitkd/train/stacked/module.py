"""Students that differ in what they learn from, trained in one pass.

Shapes: S stacked students, U data orders among them (students of one seed share one), B batch, K classes,
H heads, P distilled maps, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.errors import RunError
from vitkd.methods.weighting import Constant, cross_entropy
from vitkd.models import Model, Output, Taps
from vitkd.models.dropout import drop_by
from vitkd.models.output import LOGITS, at_least_float32
from vitkd.train.guard import FiniteGuard
from vitkd.train.losses import Losses, TermWeights, Transfer, transfer_of, with_zero_gradients
from vitkd.train.module import DistillModule, trained_by
from vitkd.train.stacked.dropout import streams_on
from vitkd.train.stacked.groups import StudentGroup, group_students, shares
from vitkd.train.stacked.optimization import (
    OptimSettings,
    StackedAdamW,
    StackedSchedule,
    along,
    per_student_norm,
)


class StackedModule(DistillModule):
    """Trains S students at once; student s becomes what `modules[s]` would have made of it alone.

    What a student learns from is data: its share of the output goes to its group's objective, and term
    weights, label smoothing, learning rate, weight decay and a loss's temperature are tensors. Neighbours of
    equal method, granularity, loss and weighting share a group, so order `modules` by these.

    Args:
        modules: how each student would train alone, all beside one teacher or all without.
        orders: [S], which of a batch's U data orders each student sees.
        seeds: [S], of each student's dropout.
        device: where training will be.
    """

    def __init__(
        self,
        modules: Sequence[DistillModule],
        orders: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        teachers = [module.teacher for module in modules if module.objective is not None]
        stacked, first = stack([module.model for module in modules]), modules[0]
        super().__init__(stacked, first.optimizer, first.schedule, teacher=teachers[0] if teachers else None)
        self.guard = FiniteGuard("this student is given up, the others of its stack continue")
        self.students = len(modules)
        self.weightings = [(module.weighting, module.alpha) for module in modules]
        self.optim_settings = [OptimSettings(module.optimizer, module.schedule) for module in modules]
        self.groups = group_students(modules)
        self._distilled = {student for group in self.groups if group.distils for student in group.students}
        self.compared = self._distilled
        asked = {split: [module.teacher_taps(split) for module in modules] for split in ("train", "val")}
        self._teacher_taps = {
            split: Taps.union(filter(None, taps)) for split, taps in asked.items() if any(taps)
        }
        self.weights_change = any(module.weights_change for module in modules)
        self._most_values = max((len(group.objective.curves) or 1 for group in self.groups), default=0)
        self.streams = streams_on(torch.device(device), seeds)
        drop_by(self.streams.drop, self.model.modules())
        self.term_weights = TermWeights([module.alpha for module in modules])
        # Not a buffer: that would be rounded by trainer.precision=bf16-true.
        smoothings = [module.label_smoothing for module in modules]
        self.smoothings = torch.tensor(smoothings, dtype=torch.float64) if any(smoothings) else None
        self.orders = torch.tensor(orders)
        self.failed: dict[int, str] = {}
        """student → the line that says since when its values are not finite"""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        weights = [weighting.class_weight(alpha, epoch, epochs) for weighting, alpha in self.weightings]
        self.compared = {student for student in self._distilled if weights[student] < 1}
        pairs = zip(self.weightings, weights, strict=True)
        self.term_weights.fill([math.nan if each.needs_gradients else w for (each, _), w in pairs])
        for group in self.groups:
            group.objective.start_epoch(epoch, epochs)

    @property
    def active_groups(self) -> list[StudentGroup]:
        """Those with a student whose transfer loss counts in this epoch."""
        return [group for group in self.groups if not self.compared.isdisjoint(group.students)]

    @property
    def step_kind(self) -> str:
        measured = "gradients measured" if self.is_logging_step else "plain"
        return f"{measured}, {[(group.start, group.objective.stage) for group in self.active_groups]}"

    def teacher_taps(self, split: str) -> Taps | None:
        return self._teacher_taps.get(split)

    def as_seen(self, batch: Batch) -> Batch:
        if batch.label.ndim == 1:
            return batch
        self.orders = self.orders.to(batch.label.device)
        return batch._replace(label=batch.label[self.orders], index=batch.index[self.orders])

    def loss(self, batch: Batch) -> Tensor:
        self.streams.next_step()
        return super().loss(batch)

    def compare(self, batch: Batch, answer: Output | None) -> Losses:
        """The losses [S] of a batch, [B, …] or [U, B, …], given the teacher's answer to it, if any."""
        groups = [] if answer is None else self._groups_compared(batch)
        seen = self.as_seen(batch)
        images = batch.image if batch.image.ndim == 4 else batch.image[self.orders]
        output = self.model(images, Taps.union([LOGITS, *(group.objective.student_taps for group in groups)]))
        parts = shares(output, self.groups, self.students)
        class_loss = self.class_loss(self._class_logits(output, parts), seen.label)
        if answer is None or not groups:
            if self.training and self._distilled:
                class_loss = with_zero_gradients(class_loss, output.heads.values())
            return Losses(output, class_loss, class_loss)
        transfers = [self._transfer(group, seen, parts[group.start], answer) for group in groups]
        transfer = self._spread(groups, transfers)
        return Losses(output, class_loss, self.term_weights.total(class_loss, transfer.weighted), transfer)

    def _groups_compared(self, batch: Batch) -> list[StudentGroup]:
        """In training those whose loss counts, in validation all that can be compared on so few images."""
        if self.training:
            return self.active_groups
        # All or none: a curve's mean is over the same images for every student.
        return self.groups if all(group.objective.can_validate(batch) for group in self.groups) else []

    def class_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Each student's cross-entropy [S] with the labels [B] or [S, B], smoothed in training."""
        # In full precision, and so what is weighed with it: solo runs weigh by numbers that nothing rounds.
        hard = cross_entropy(logits, label).mean(-1)
        if self.smoothings is None or not self.training:
            return hard
        self.smoothings = self.smoothings.to(hard)
        uniform = -at_least_float32(logits).log_softmax(-1).mean((-2, -1))
        return torch.lerp(hard, uniform, self.smoothings)

    def balance_terms(self) -> None:
        if not (self.is_logging_step and self._measured_norms):
            return
        balanced = torch.full_like(self.term_weights.class_loss, math.nan)
        for group in (group for group in self.active_groups if group.weighting.needs_gradients):
            norms = [norm[group.start : group.stop] for norm in self._measured_norms.values()]
            balanced[group.start : group.stop] = group.weighting.balanced(*norms)
        self.term_weights.fill(balanced)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.balance_terms()
        gradients = [p.grad for p in trained_by(optimizer) if p.grad is not None]
        self.guard.watch_gradients(per_student_norm(gradients))
        # One student's bad step is no reason to hold the others back.
        self.guard.end_step()

    def check_finite(self) -> None:
        """Note which students are not finite any more; RunError if none is left."""
        messages = self.guard.found(self.trainer.global_step, self.trainer.current_epoch + 1)
        for student, message in enumerate(messages):
            if message is not None:
                self.failed.setdefault(student, message)
        if len(self.failed) == self.students:
            raise RunError(next(iter(self.failed.values())))

    def configure_optimizers(self) -> Any:
        optimizer = StackedAdamW(self.model.parameters(), self.optim_settings)
        schedule = StackedSchedule(
            optimizer, self.optim_settings, int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return per_student_norm(gradients)

    def clip_norm(self, parameters: list[Tensor], most: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        # As clip_grad_norm_ does for one model.
        share = (most / (per_student_norm(gradients) + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(along(share, gradient))

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        compared = {"transfer_loss", "class_weight", "transfer_weight"} & means.keys()
        plain = means.keys() - compared - {"transfer_values"}
        curves = [{name: means[name][s] for name in means if name in plain} for s in range(self.students)]
        for group in self.groups if "transfer_values" in means else ():
            names = {"transfer_loss"} if isinstance(group.weighting, Constant) else compared
            # In validation all are compared.
            for student in self.compared.intersection(group.students) if self.training else group.students:
                curves[student] |= {name: means[name][student] for name in names}
                own = means["transfer_values"][student * self._most_values :]
                curves[student] |= dict(zip(group.objective.curves, own, strict=False))
        return curves

    def summary(self, curves: list[dict[str, float]]) -> Mapping[str, list[float]]:
        names = dict.fromkeys(name for values in curves for name in values)
        # A student at alpha = 1, say, has no transfer loss: that is not a number.
        return {name: [values.get(name, math.nan) for values in curves] for name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["failed"] = dict(self.failed)
        checkpoint["streams"] = self.streams.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sums = checkpoint["curves"]["window"]["meter"]["sums"]
        if "transfer_values" in sums:
            # It may come from a larger stack, in which another student had more maps.
            sums["transfer_values"] = sums["transfer_values"][:, : self._most_values].clone()
        super().on_load_checkpoint(checkpoint)
        self.failed = dict(checkpoint["failed"])
        self.streams.load_state_dict(checkpoint["streams"])

    def _transfer(self, group: StudentGroup, seen: Batch, students: Output, answer: Output) -> Transfer:
        """How far a group's students are from the teacher's answer to the images that each of them sees."""
        if seen.label.ndim == 2:
            students_of = slice(group.start, group.stop)
            orders = self.orders[students_of]
            seen = seen._replace(label=seen.label[students_of], index=seen.index[students_of])
            answer = answer.map(lambda tensor: tensor[orders])
        return transfer_of(seen, students, answer, group.objective, group.weighting)

    def _class_logits(self, output: Output, parts: Mapping[int, Output]) -> Tensor:
        """The logits [S, B, C] that learn the labels: where nothing is learned from a teacher, the answer."""
        objectives = {group.start: group.objective for group in self.groups if group.distils}
        logits = [
            objectives[start].class_logits(part) if start in objectives else part.answer
            for start, part in parts.items()
        ]
        are_answers = all(own is part.logits for own, part in zip(logits, parts.values(), strict=True))
        return output.answer if are_answers else torch.cat(logits)

    def _spread(self, groups: Sequence[StudentGroup], transfers: Sequence[Transfer]) -> Transfer:
        """The groups' values [students, …] as [S, …], 0 for students outside."""
        padded = [F.pad(each.values, (0, self._most_values - each.values.shape[-1])) for each in transfers]
        loss = self._on_all(groups, [each.loss for each in transfers])
        values = self._on_all(groups, padded)
        if all(each.image_weight is None for each in transfers):
            return Transfer(loss, loss, values)
        weighted = self._on_all(groups, [each.weighted for each in transfers])
        weights = [
            torch.ones_like(each.loss) if (w := each.image_weight) is None else w for each in transfers
        ]
        return Transfer(loss, weighted, values, self._on_all(groups, weights))

    def _on_all(self, groups: Sequence[StudentGroup], of_groups: Sequence[Tensor]) -> Tensor:
        parts, position, rest = [], 0, of_groups[0].shape[1:]
        for group, values in zip(groups, of_groups, strict=True):
            parts += [values.new_zeros(group.start - position, *rest), values]
            position = group.stop
        return torch.cat([*parts, of_groups[0].new_zeros(self.students - position, *rest)])


def stack(models: Sequence[Model]) -> Model:
    """A model of which student s computes what `models[s]` does; its weights are copies.

    Every layer of `vitkd.models` takes the leading axis. What keeps statistics of a whole batch, as batch
    normalisation does, would mix students and cannot be stacked.
    """
    first = models[0]
    assert all(model.config == first.config for model in models), "students of one shape"
    stacked = deepcopy(first)
    for name, _ in first.named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = torch.stack([model.get_parameter(name).detach() for model in models])
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))
    return stacked


def unstack(stacked: Model, weights: Mapping[str, Tensor], student: int) -> Model:
    """Student `student` of `weights`, the state of `stacked`, as a model of its own on the CPU."""
    model = stacked.config.architecture()
    model.load_state_dict({name: values[student].to("cpu", copy=True) for name, values in weights.items()})
    return model
