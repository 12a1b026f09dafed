"""Students that differ in what they learn from, trained in one pass.

Shapes: S stacked students, J jobs (S and their followers), U data orders among them (those of one seed share
one), B batch, K classes, H heads, P distilled maps, T tokens.
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
from vitkd.optim import grouped, trained_by
from vitkd.train.guard import FiniteGuard
from vitkd.train.losses import Losses, TermWeights, Transfer, transfer_of, with_zero_gradients
from vitkd.train.module import DistillModule
from vitkd.train.stacked.dropout import streams_on
from vitkd.train.stacked.groups import JobGroup, group_jobs, shares
from vitkd.train.stacked.optimization import (
    OptimSettings,
    StackedSchedule,
    clip_each,
    per_student_norm,
    stacked_optimizer,
)


class StackedModule(DistillModule):
    """Trains S students at once; the student of job j becomes what `modules[j]` would have made of it alone.

    What a student learns from is data: its share of the output goes to its group's objective, and term
    weights, label smoothing, learning rate, weight decay and a loss's temperature are tensors. Neighbours of
    equal method, granularity, loss and weighting share a group, so order `modules` by these.

    Jobs whose students would become the same, as those of `ce` and `kl` do, train one student. All but the
    first of them follow it: their losses are computed for their curves, without gradient. Losses, curves and
    whatever else is logged have an entry a job [J].

    Args:
        modules: [J], how each job would train alone, all beside one teacher or all without.
        orders: [J], which of a batch's U data orders each sees.
        seeds: [J], of each student's dropout.
        device: where training will be.
        students: [J], the student of each job: 0 … S − 1, then those that the remaining jobs follow; None
            where each job trains its own.
    """

    def __init__(
        self,
        modules: Sequence[DistillModule],
        orders: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        students: Sequence[int] | None = None,
    ) -> None:
        self.student_of = [*range(len(modules))] if students is None else [*students]
        self.jobs, self.students = len(modules), 1 + max(self.student_of)
        assert self.student_of[: self.students] == [*range(self.students)], "followers come last"
        trained, first = modules[: self.students], modules[0]
        teachers = [module.teacher for module in modules if module.objective is not None]
        stacked = stack([module.model for module in trained])
        super().__init__(stacked, first.optimizer, first.schedule, teacher=teachers[0] if teachers else None)
        self.guard = FiniteGuard("this student is given up, the others of its stack continue")
        self.weightings = [(module.weighting, module.alpha) for module in modules]
        self.places = first.places  # those of one student: a stack's shapes do not tell matrices from vectors
        self.optim_settings = [OptimSettings(module.optimizer, module.schedule) for module in trained]
        self.groups = group_jobs(modules, self.student_of)
        self._distilled = {job for group in self.groups if group.distils for job in group.jobs}
        self.compared = self._distilled
        asked = {split: [module.teacher_taps(split) for module in modules] for split in ("train", "val")}
        self._teacher_taps = {
            split: Taps.union(filter(None, taps)) for split, taps in asked.items() if any(taps)
        }
        self.weights_change = any(module.weights_change for module in modules)
        self._most_values = max((len(group.objective.curves) or 1 for group in self.groups), default=0)
        self.streams = streams_on(torch.device(device), seeds[: self.students])
        drop_by(self.streams.drop, self.model.modules(), self.streams.next_masks)
        self.term_weights = TermWeights([module.alpha for module in modules])
        # Not a buffer: that would be rounded by trainer.precision=bf16-true.
        smoothings = [module.label_smoothing for module in trained]
        self.smoothings = torch.tensor(smoothings, dtype=torch.float64) if any(smoothings) else None
        self.orders = torch.tensor(orders)
        self._followed = torch.tensor(self.student_of[self.students :])
        self.failed: dict[int, str] = {}
        """job → the line that says since when its values are not finite"""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        weights = [weighting.class_weight(alpha, epoch, epochs) for weighting, alpha in self.weightings]
        self.compared = {student for student in self._distilled if weights[student] < 1}
        pairs = zip(self.weightings, weights, strict=True)
        self.term_weights.fill([math.nan if each.needs_gradients else w for (each, _), w in pairs])
        for group in self.groups:
            group.objective.start_epoch(epoch, epochs)

    @property
    def active_groups(self) -> list[JobGroup]:
        """Those with a job whose transfer loss counts in this epoch."""
        return [group for group in self.groups if not self.compared.isdisjoint(group.jobs)]

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
        return batch.in_orders(self.orders)

    def loss(self, batch: Batch) -> Tensor:
        self.streams.next_step()
        return super().loss(batch)

    def compare(self, batch: Batch, answer: Output | None, **paths: Any) -> Losses:
        """The losses [J] of a batch, [B, …] or [U, B, …], given the teacher's answer to it, if any.

        Those of followers have no gradient.
        """
        groups = [] if answer is None else self._groups_compared(batch)
        seen = self.as_seen(batch)
        images = batch.image if batch.image.ndim == 4 else batch.image[self.orders[: self.students]]
        taps = Taps.union([LOGITS, *(group.objective.student_taps for group in groups)])
        outputs = self.model(images, taps)
        parts = shares(outputs, [group for group in self.groups if group.trains], self.students)
        truth = seen.truth if seen.label.ndim == 1 else seen.truth[: self.students]
        class_loss = self.of_jobs(self.class_loss(self._class_logits(outputs, parts), truth))
        output = Output(outputs.answer, outputs.heads).map(self.of_jobs)
        if answer is None or not groups:
            if self.training and self._distilled:
                class_loss = with_zero_gradients(class_loss, output.heads.values())
            return Losses(output, class_loss, class_loss)
        transfers = [
            self._transfer(
                group, seen, parts[group.start] if group.trains else group.followed(outputs), answer
            )
            for group in groups
        ]
        transfer = self._spread(groups, transfers)
        return Losses(output, class_loss, self.term_weights.total(class_loss, transfer.weighted), transfer)

    def of_jobs(self, values: Tensor) -> Tensor:
        """The students' values [S, …] as those of the jobs [J, …]; a follower's are constants."""
        if self.jobs == self.students:
            return values
        # It stays there: a CUDA graph cannot copy from the host.
        self._followed = self._followed.to(values.device)
        return torch.cat([values, values.detach()[self._followed]])

    def _groups_compared(self, batch: Batch) -> list[JobGroup]:
        """In training those whose loss counts, in validation all that can be compared on so few images."""
        if self.training:
            return self.active_groups
        # All or none: a curve's mean is over the same images for every job.
        return self.groups if all(group.objective.can_validate(batch) for group in self.groups) else []

    def class_loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Each student's cross-entropy [S] with [*S, B] labels or [*S, B, C] shares, smoothed in training."""
        # In full precision, and so what is weighed with it: solo runs weigh by numbers that nothing rounds.
        hard = cross_entropy(logits, truth).mean(-1)
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
        self.guard.watch_gradients(self.norm(gradients))
        # One student's bad step is no reason to hold the others back.
        self.guard.end_step()

    def check_finite(self) -> None:
        """Note whose students are not finite any more; RunError if none is left."""
        messages = self.guard.found(self.trainer.global_step, self.trainer.current_epoch + 1)
        for job, message in enumerate(messages):
            if message is not None:
                self.failed.setdefault(job, message)
        if len(self.failed) == self.jobs:
            raise RunError(next(iter(self.failed.values())))

    def configure_optimizers(self) -> Any:
        groups = grouped(self.optimizer, self.model.parameters(), self.places)
        optimizer = stacked_optimizer(groups, self.optim_settings)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = StackedSchedule(optimizer, self.optim_settings, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning_rates(self, scheduler: Any) -> list[float]:
        rates = scheduler.get_last_lr()
        return [rates[student] for student in self.student_of]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return self.of_jobs(per_student_norm(gradients))

    def clip_norm(self, parameters: list[Tensor], most: float) -> None:
        clip_each([p.grad for p in parameters if p.grad is not None], most)

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        compared = {"transfer_loss", "class_weight", "transfer_weight"} & means.keys()
        plain = means.keys() - compared - {"transfer_values"}
        curves = [{name: means[name][job] for name in means if name in plain} for job in range(self.jobs)]
        for group in self.groups if "transfer_values" in means else ():
            names = {"transfer_loss"} if isinstance(group.weighting, Constant) else compared
            # In validation all are compared.
            for job in self.compared.intersection(group.jobs) if self.training else group.jobs:
                curves[job] |= {name: means[name][job] for name in names}
                own = means["transfer_values"][job * self._most_values :]
                curves[job] |= dict(zip(group.objective.curves, own, strict=False))
        return curves

    def summary(self, curves: list[dict[str, float]]) -> Mapping[str, list[float]]:
        names = dict.fromkeys(name for values in curves for name in values)
        # A job at alpha = 1, say, has no transfer loss: that is not a number.
        return {name: [values.get(name, math.nan) for values in curves] for name in names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["student_of"], checkpoint["failed"] = list(self.student_of), dict(self.failed)
        checkpoint["streams"] = self.streams.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sums = checkpoint["curves"]["window"]["meter"]["sums"]
        if "transfer_values" in sums:
            # It may come from a larger stack, in which another job had more maps.
            sums["transfer_values"] = sums["transfer_values"][:, : self._most_values].clone()
        assert checkpoint["student_of"] == self.student_of
        super().on_load_checkpoint(checkpoint)
        self.failed = dict(checkpoint["failed"])
        self.streams.load_state_dict(checkpoint["streams"])

    def _transfer(self, group: JobGroup, seen: Batch, students: Output, answer: Output) -> Transfer:
        """How far a group's students are from the teacher's answer to the images that each of them sees."""
        if seen.label.ndim == 2:
            jobs = slice(group.start, group.stop)
            orders = self.orders[jobs]
            seen = seen.in_orders(jobs)
            answer = group.of_teacher(answer).map(lambda tensor: tensor[orders])
        with torch.set_grad_enabled(group.trains and torch.is_grad_enabled()):
            return transfer_of(seen, students, answer, group.objective, group.weighting)

    def _class_logits(self, output: Output, parts: Mapping[int, Output]) -> Tensor:
        """The logits [S, B, C] that learn the labels: where nothing is learned from a teacher, the answer."""
        objectives = {group.start: group.objective for group in self.groups if group.trains and group.distils}
        logits = [
            objectives[start].class_logits(part) if start in objectives else part.answer
            for start, part in parts.items()
        ]
        are_answers = all(own is part.logits for own, part in zip(logits, parts.values(), strict=True))
        return output.answer if are_answers else torch.cat(logits)

    def _spread(self, groups: Sequence[JobGroup], transfers: Sequence[Transfer]) -> Transfer:
        """The groups' values [jobs, …] as [J, …], 0 for jobs outside."""
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

    def _on_all(self, groups: Sequence[JobGroup], of_groups: Sequence[Tensor]) -> Tensor:
        parts, position, rest = [], 0, of_groups[0].shape[1:]
        for group, values in zip(groups, of_groups, strict=True):
            parts += [values.new_zeros(group.start - position, *rest), values]
            position = group.stop
        return torch.cat([*parts, of_groups[0].new_zeros(self.jobs - position, *rest)])


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
        if values.ndim == 3:
            # As a batched product leaves a matrix's gradient: of another layout, each step would copy that.
            values = values.mT.contiguous().mT
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))
    return stacked


def unstack(stacked: Model, weights: Mapping[str, Tensor], student: int) -> Model:
    """Student `student` of `weights`, the state of `stacked`, as a model of its own on the CPU."""
    model = stacked.config.architecture()
    model.load_state_dict({name: values[student].to("cpu", copy=True) for name, values in weights.items()})
    return model
