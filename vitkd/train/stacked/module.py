"""Students that differ in what they learn from, trained in one pass.

Shapes: S stacked students, U data orders among them (students of one seed share one), B batch, K classes,
H heads, P distilled maps, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import RunError
from vitkd.methods.maps.losses import DistributionLoss
from vitkd.methods.maps.objective import AttentionTransfer, Transfer
from vitkd.models import ModelOutput, TokenLogits
from vitkd.models.base import Answer
from vitkd.models.dropout import draw_from
from vitkd.models.layers import Factors, Scores, at_least_float32, changed
from vitkd.train.guard import FiniteGuard
from vitkd.train.module import ClassifyModule, DistillModule, TaughtModule, Terms, measures, share_equal
from vitkd.train.stacked.dropout import streams_on
from vitkd.train.stacked.optimization import Pace, StackedAdamW, StackedSchedule
from vitkd.train.stacked.students import along, per_student_norm, stack


class Cell(NamedTuple):
    """Neighbours in the stack that learn the same from their teacher, in the same way."""

    start: int
    stop: int
    transfer: Transfer
    trains: bool
    """whether that counts in training: not at alpha = 1"""


class StackedModule(TaughtModule):
    """Trains S students at once; student s becomes what `modules[s]` would have made of it alone.

    What a student learns from is data: its share of the output goes to its cell's transfer, and alpha, label
    smoothing, learning rate, weight decay and a loss's temperature are tensors. Neighbours of equal method,
    granularity and loss share a cell, so order `modules` by these.

    Args:
        modules: how each student would train alone, all beside one teacher or all without.
        orders: [S], which of a batch's U data orders each student sees.
        seeds: [S], of each student's dropout.
        device: where training will be.
    """

    def __init__(
        self,
        modules: Sequence[ClassifyModule],
        orders: Sequence[int],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        first = modules[0]
        stacked = stack([module.model for module in modules])
        teacher = first.teacher if isinstance(first, DistillModule) else None
        super().__init__(stacked, teacher, first.optimizer, first.schedule)
        self.guard = FiniteGuard("this student is given up, the others of its stack go on")
        self.students = len(modules)
        self.paces = [Pace(module.optimizer, module.schedule) for module in modules]
        self.cells = cells_of(modules)
        self._most_values = max((len(cell.transfer.curves) or 1 for cell in self.cells), default=0)
        self.streams = streams_on(torch.device(device), seeds)
        draw_from(self.streams, self.model.modules())
        # Not buffers: those would be rounded by trainer.precision=bf16-true.
        alphas = [module.alpha if isinstance(module, DistillModule) else 1.0 for module in modules]
        self.alphas = torch.tensor(alphas, dtype=torch.float64)
        smoothings = [module.label_smoothing for module in modules]
        self.smoothings = torch.tensor(smoothings, dtype=torch.float64) if any(smoothings) else None
        self.orders = torch.tensor(orders)
        self.failed: dict[int, str] = {}
        """student → the line that says since when its figures are of no use"""

    @property
    def active_cells(self) -> list[Cell]:
        """Those whose teacher is asked: in validation all."""
        return self._asked("train" if self.training else "val")

    def _asked(self, split: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.trains or split == "val"]

    def teacher_blocks(self, split: str) -> list[int] | None:
        cells = self._asked(split)
        return sorted({block for cell in cells for block in cell.transfer.teacher_blocks}) if cells else None

    @property
    def needs_logits(self) -> bool:
        return any(cell.transfer.needs_logits for cell in self._asked("train"))

    @property
    def records_factors(self) -> bool:
        return any(cell.transfer.streams for cell in self.cells)

    def as_seen(self, batch: Batch) -> Batch:
        if batch.label.ndim == 1:
            return batch
        self.orders = self.orders.to(batch.label.device)
        return batch._replace(label=batch.label[self.orders], index=batch.index[self.orders])

    def loss(self, batch: Batch) -> Tensor:
        self.streams.next_step()
        return super().loss(batch)

    def terms(self, batch: Batch) -> Terms:
        """The losses [S] of a batch, [B, …] or [U, B, …]."""
        return self._compare(batch, self.answer(batch, "train") if self.active_cells else Answer({}))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not self._teachers:
            super().validation_step(batch, batch_idx)
            return
        answer = self.answer(batch, "val")
        terms = self._compare(batch, answer)
        agreement = share_equal(terms.logits.argmax(-1), answer.predicted)
        self.val_meter.add({**measures(terms, batch), "teacher_agreement": agreement}, len(batch.label))

    def task_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Each student's cross-entropy [S] with the labels [B] or [S, B], smoothed in training."""
        # In full precision, and so what is weighed with it: solo runs weigh by numbers that nothing rounds.
        log_p = at_least_float32(logits.log_softmax(-1))
        hard = -log_p.gather(-1, label.expand(logits.shape[:-1])[..., None]).mean((-2, -1))
        if self.smoothings is None or not self.training:
            return hard
        self.smoothings = self.smoothings.to(hard)
        return torch.lerp(hard, -log_p.mean((-2, -1)), self.smoothings)

    def gradient_norms(self, terms: Terms) -> dict[str, Tensor]:
        """The unweighted norms [S]; a student without a teacher gets none of them in its curves."""
        if terms.transfer is None:
            return {}
        parameters = list(self.model.parameters())
        return {
            "gradient_norm_task": gradient_norms(terms.task, parameters),
            "gradient_norm_transfer": gradient_norms(terms.transfer, parameters),
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.guard.watch_gradients(per_student_norm(self._gradients()))
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
        optimizer = StackedAdamW(self.model.parameters(), self.paces)
        schedule = StackedSchedule(optimizer, self.paces, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = self._gradients()
        # As clip_grad_norm_ does for one model.
        share = (gradient_clip_val / (per_student_norm(gradients) + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(along(share, gradient))

    def curves(self, means: dict[str, list[float]]) -> list[dict[str, float]]:
        plain = {name: values for name, values in means.items() if name not in ("map_loss", "transfer_loss")}
        curves = [{name: values[s] for name, values in plain.items()} for s in range(self.students)]
        for cell in self.active_cells if "map_loss" in means else ():
            for student in range(cell.start, cell.stop):
                curves[student]["transfer_loss"] = means["transfer_loss"][student]
                own = means["map_loss"][student * self._most_values :]
                curves[student] |= dict(zip(cell.transfer.curves, own, strict=False))
        return curves

    def window_curves(self) -> list[dict[str, float]]:
        norms = {name: values.tolist() for name, values in self._norms.items()}
        self._norms = {}
        curves = super().window_curves()
        for cell in self.active_cells if norms else ():
            for student in range(cell.start, cell.stop):
                own = {name: values[student] for name, values in norms.items()}
                if alpha := self.alphas[student].item():
                    weighted = (1 - alpha) * own["gradient_norm_transfer"]
                    own["gradient_ratio"] = weighted / (alpha * own["gradient_norm_task"])
                curves[student] |= own
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
        sums = checkpoint["curves"]["window"]["sums"]
        if "map_loss" in sums:
            # It may come from a larger stack, in which another student had more maps.
            sums["map_loss"] = sums["map_loss"][:, : self._most_values].clone()
        super().on_load_checkpoint(checkpoint)
        self.failed = dict(checkpoint["failed"])
        self.streams.load_state_dict(checkpoint["streams"])

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _compare(self, batch: Batch, answer: Answer) -> Terms:
        """The losses of all students; the teacher's answer is to images [B] or [U, B]."""
        seen = self.as_seen(batch)
        images = batch.image if batch.image.ndim == 4 else batch.image[self.orders]
        cells = self.active_cells
        blocks = {block for cell in cells for block in cell.transfer.student_blocks}
        output = self.model(images, blocks, self.records_factors)
        if not cells:
            task = self.task_loss(output.logits, seen.label)
            return Terms(output.logits, task, total=task, of_tokens=output.of_tokens)
        shares = self._shares(output)
        task = self.task_loss(self._task_logits(output, shares), seen.label)
        answers = [self._answer_to(cell, answer, batch.label.ndim == 2) for cell in cells]
        per_map = [
            cell.transfer.compare(shares[cell.start], told) for cell, told in zip(cells, answers, strict=True)
        ]
        transfer = self._spread([cell.transfer.total(v) for cell, v in zip(cells, per_map, strict=True)])
        self.alphas = self.alphas.to(task)
        total = self.alphas * task + (1 - self.alphas) * transfer
        padded = [F.pad(values, (0, self._most_values - values.shape[-1])) for values in per_map]
        return Terms(output.logits, task, total, transfer, self._spread(padded), output.of_tokens)

    def _task_logits(self, output: ModelOutput, shares: Mapping[int, ModelOutput]) -> Tensor:
        """The logits [S, B, K] that learn the labels: at alpha = 1 nothing but the answer does."""
        transfers = {cell.start: cell.transfer for cell in self.active_cells if cell.trains}
        learnt = [
            transfers[start].task_logits(share) if start in transfers else share.logits
            for start, share in shares.items()
        ]
        are_answers = all(mine is share.logits for mine, share in zip(learnt, shares.values(), strict=True))
        return output.logits if are_answers else torch.cat(learnt)

    def _answer_to(self, cell: Cell, answer: Answer, of_orders: bool) -> Answer:
        """What the cell's students are told: each about the images that it sees."""
        scores = {block: answer.scores[block] for block in cell.transfer.teacher_blocks}
        if not of_orders:
            return Answer(scores, answer.logits)
        orders = self.orders[cell.start : cell.stop]
        own = {block: changed(found, lambda t: t[orders]) for block, found in scores.items()}
        return Answer(own, None if answer.logits is None else answer.logits[orders])

    def _shares(self, output: ModelOutput) -> dict[int, ModelOutput]:
        """The output cut at the cells' ends, by each part's first student."""
        ends = sorted({0, self.students} | {end for cell in self.cells for end in (cell.start, cell.stop)})
        sizes = [stop - start for start, stop in pairwise(ends)]
        # One cut, not a slice a cell: each slice's gradient would be as large as the whole.
        logits = output.logits.split(sizes)
        scores = {block: _cut(found, sizes) for block, found in output.scores.items()}
        tokens: Sequence[TokenLogits | None] = [None] * len(sizes)
        if output.of_tokens is not None:
            halves = zip(*(each.split(sizes) for each in output.of_tokens), strict=True)
            tokens = [TokenLogits(*parts) for parts in halves]
        return {
            start: ModelOutput(logits[i], {block: parts[i] for block, parts in scores.items()}, tokens[i])
            for i, start in enumerate(ends[:-1])
        }

    def _spread(self, of_cells: list[Tensor]) -> Tensor:
        """The cells' values [students, …] as [S, …], 0 for students outside."""
        parts, position, rest = [], 0, of_cells[0].shape[1:]
        for cell, values in zip(self.active_cells, of_cells, strict=True):
            parts += [values.new_zeros(cell.start - position, *rest), values]
            position = cell.stop
        return torch.cat([*parts, of_cells[0].new_zeros(self.students - position, *rest)])


def cells_of(modules: Sequence[ClassifyModule]) -> list[Cell]:
    """The cells of students that stand in the order of `modules`."""
    cells, start = [], 0
    for _, group in groupby(modules, key=_cell_key):
        members = list(group)
        if distilled := [module for module in members if isinstance(module, DistillModule)]:
            transfer = shared_transfer([module.transfer for module in distilled])
            cells.append(Cell(start, start + len(members), transfer, distilled[0].alpha < 1))
        start += len(members)
    return cells


def _cut(scores: Scores, sizes: list[int]) -> Sequence[Scores]:
    """`scores` [S, …] as parts of so many students."""
    if isinstance(scores, Tensor):
        return scores.split(sizes)
    return [Factors(*parts) for parts in zip(*(each.split(sizes) for each in scores), strict=True)]


def _cell_key(module: ClassifyModule) -> Any:
    return (module.transfer.kind, module.alpha < 1) if isinstance(module, DistillModule) else None


def shared_transfer(transfers: Sequence[Transfer]) -> Transfer:
    """One for all `transfers`, which are of one kind; with a temperature for each where these differ."""
    first = transfers[0]
    losses = [transfer.loss for transfer in transfers if isinstance(transfer, AttentionTransfer)]
    temperatures = [loss.temperature for loss in losses if isinstance(loss, DistributionLoss)]
    if not isinstance(first, AttentionTransfer) or len(set(temperatures)) < 2:
        return first
    shared = copy(first)
    shared.loss = copy(first.loss)
    exact = torch.tensor(temperatures, dtype=torch.float64)
    shared.loss.temperature = exact.reshape(-1, 1, 1, 1, 1)  # type: ignore[attr-defined]
    return shared


def gradient_norms(losses: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The 2-norms [S] of d losses[s] / d (student s's parameters); the graph is kept."""
    # Students share nothing, so the sum's gradient is each one's own.
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    return per_student_norm([gradient for gradient in gradients if gradient is not None])
