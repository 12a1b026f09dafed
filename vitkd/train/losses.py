"""A batch's losses, and what becomes a curve of them.

Shapes: S stacked students (absent for one), B batch, C classes, P values of an objective.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.methods.base import Objective
from vitkd.methods.weighting import Weighting
from vitkd.models import Output


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
    logits = objective.class_logits(student).detach()
    weight = weighting.image_weight(batch.label, logits, teacher.logits)
    if weight is None:
        return Transfer(loss, loss, values)
    return Transfer(loss, (weight * losses).mean(-1), values, weight.mean(-1))


class TermWeights:
    """The two terms' weights [*S], always at the same place on the device, where a CUDA graph reads them."""

    def __init__(self, class_weights: float | list[float]) -> None:
        self.class_loss, self.transfer = _both(class_weights)

    def total(self, class_loss: Tensor, transfer: Tensor) -> Tensor:
        """What is minimised [*S] (equation 2.14)."""
        self.class_loss, self.transfer = self.class_loss.to(transfer), self.transfer.to(transfer)
        return self.class_loss * class_loss + self.transfer * transfer

    def fill(self, class_weights: float | list[float]) -> None:
        """Set them from the host; NaN leaves a student's weights as they are."""
        self._set(*_both(class_weights))

    def balance(self, class_weights: Tensor) -> None:
        """Set them on the device [*S]; NaN leaves a student's weights as they are."""
        self._set(class_weights, 1 - class_weights)

    def _set(self, class_weights: Tensor, transfer_weights: Tensor) -> None:
        for weight, new in ((self.class_loss, class_weights), (self.transfer, transfer_weights)):
            new = new.to(weight)
            weight.copy_(torch.where(new.isnan(), weight, new))

    def measures(self, transfer: Transfer) -> dict[str, Tensor]:
        """The curves of the weights [*S]: the class loss's, and the transfer loss's mean over images."""
        mean = 1.0 if transfer.image_weight is None else transfer.image_weight
        return {"class_weight": self.class_loss, "transfer_weight": self.transfer * mean}

    def state_dict(self) -> dict[str, Tensor]:
        """Both, as they are."""
        return {"class_loss": self.class_loss.clone(), "transfer": self.transfer.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        self.class_loss.copy_(state["class_loss"])
        self.transfer.copy_(state["transfer"])


def _both(class_weights: float | list[float]) -> tuple[Tensor, Tensor]:
    """Both terms' weights, each rounded once."""
    exact = torch.tensor(class_weights, dtype=torch.float64)
    return exact, 1 - exact


def gradient_ratio(norms: Mapping[str, float], class_weight: float) -> dict[str, float]:
    """The weighted transfer loss's gradient norm over the weighted class loss's, where that is not 0."""
    if not norms or class_weight == 0:
        return {}
    of_class, of_transfer = norms["gradient_norm_class"], norms["gradient_norm_transfer"]
    if of_class == 0:
        return {}
    return {"gradient_ratio": (1 - class_weight) * of_transfer / (class_weight * of_class)}


def share_equal(predicted: Tensor, true: Tensor) -> Tensor:
    """The share [*S] of classes [*S, B] that are equal."""
    return (predicted == true).float().mean(-1)


def gradient_norm(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """The 2-norm of d loss / d parameters; the graph is kept."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients if gradient is not None])
    )
