"""A batch's losses, and what becomes a curve of them.

Shapes: S stacked students (absent for one), B batch, C classes, P values of an objective.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.methods.base import Objective
from vitkd.methods.weighting import Weighting
from vitkd.models import Output
from vitkd.models.output import at_least_float32


class Transfer(NamedTuple):
    """How far a batch's students are from their teacher."""

    loss: Tensor
    """[*S]: the mean over images"""
    weighted: Tensor
    """[*S]: the same with each image's weight, the term of the total"""
    values: Tensor
    """[*S, P]: the loss before it was summed, pair of maps by pair of maps for example; without gradient"""
    image_weight: Tensor | None = None
    """[*S]: the mean weight of an image, where they differ"""


class Losses(NamedTuple):
    """A batch's answers and losses."""

    output: Output
    class_loss: Tensor
    """[*S]: cross-entropy with the labels (equation 2.13)"""
    total: Tensor
    """[*S]: what is minimised (equation 2.14)"""
    transfer: Transfer | None = None
    """where that was computed"""

    def terms(self) -> dict[str, Tensor]:
        """The terms of `total`, by their names in messages."""
        terms = {"class loss": self.class_loss}
        return terms if self.transfer is None else terms | {"transfer loss": self.transfer.loss}

    def measures(self, label: Tensor) -> dict[str, Tensor]:
        """What becomes a curve, as means over the batch with labels [B] or [*S, B]."""
        values = {
            "class_loss": self.class_loss,
            "total_loss": self.total,
            "acc": share_equal(self.output.predicted, label),
        }
        if self.transfer is not None:
            values |= {"transfer_loss": self.transfer.loss, "transfer_values": self.transfer.values}
        for head, logits in self.output.heads.items():
            values[f"acc_{head}"] = share_equal(logits.argmax(-1), label)
        return values


def transfer_of(
    batch: Batch, student: Output, teacher: Output, objective: Objective, weighting: Weighting
) -> Transfer:
    """How far the batch's students are from their teacher."""
    terms = objective(batch, student, teacher)
    losses = objective.transfer(terms)
    loss, values = losses.mean(-1), objective.curve_values(terms)
    logits = at_least_float32(objective.class_logits(student).detach())
    weight = weighting.image_weight(batch.label, logits, teacher.logits)
    if weight is None:
        return Transfer(loss, loss, values)
    return Transfer(loss, (weight * losses).mean(-1), values, weight.mean(-1))


class TermWeights:
    """The two terms' weights, always at the same place on the device, where a CUDA graph reads them."""

    def __init__(self, class_weights: float | list[float]) -> None:
        self.both = _both_weights(class_weights)
        """[*S, 2]: the class loss's and the transfer loss's, each rounded once"""

    @property
    def class_loss(self) -> Tensor:
        """[*S]: the class loss's weight."""
        return self.both[..., 0]

    def total(self, class_loss: Tensor, transfer: Tensor) -> Tensor:
        """What is minimised [*S] (equation 2.14)."""
        self.both = self.both.to(transfer.device, torch.promote_types(transfer.dtype, torch.float32))
        return self.both[..., 0] * class_loss + self.both[..., 1] * transfer

    def fill(self, class_weights: float | list[float] | Tensor) -> None:
        """Set them [*S]; NaN leaves a student's weights as they are."""
        new = _both_weights(class_weights).to(self.both)
        self.both.copy_(torch.where(new.isnan(), self.both, new))

    def measures(self, transfer: Transfer) -> dict[str, Tensor]:
        """The curves of the weights [*S]: the class loss's, and the transfer loss's mean over images."""
        mean = 1.0 if transfer.image_weight is None else transfer.image_weight
        return {"class_weight": self.class_loss, "transfer_weight": self.both[..., 1] * mean}


def _both_weights(of_class: float | list[float] | Tensor) -> Tensor:
    class_weights = of_class if isinstance(of_class, Tensor) else torch.tensor(of_class, dtype=torch.float64)
    return torch.stack([class_weights, 1 - class_weights], dim=-1)


def gradient_ratio(norms: Mapping[str, float], class_weight: float) -> dict[str, float]:
    """The weighted transfer loss's gradient norm over the weighted class loss's, where that is not 0."""
    if not norms or class_weight == 0:
        return {}
    of_class, of_transfer = norms["gradient_norm_class"], norms["gradient_norm_transfer"]
    if of_class == 0:
        return {}
    return {"gradient_ratio": (1 - class_weight) * of_transfer / (class_weight * of_class)}


def with_zero_gradients(loss: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """`loss`, from which all that `tensors` come from gets a gradient of 0 rather than none."""
    return loss + sum(0 * tensor.sum() for tensor in tensors)


def smoothed_cross_entropy(logits: Tensor, truth: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits [B, C] with labels [B] or the classes' shares [B, C], smoothed.

    Shares of mixed images are smoothed as the labels that they are shares of (Szegedy et al. 2016).
    """
    logits = at_least_float32(logits)
    truth = truth.to(logits) if truth.is_floating_point() else truth
    return F.cross_entropy(logits, truth, label_smoothing=label_smoothing)


def share_equal(predicted: Tensor, true: Tensor) -> Tensor:
    """The share [*S] of classes [*S, B] that are equal."""
    return (predicted == true).float().mean(-1)


def gradients_of(losses: Tensor, parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """d losses [*S] / d parameters, where there is any, each student's own; the graph is kept."""
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in gradients if gradient is not None]
