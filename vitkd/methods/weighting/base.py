"""How much each term and each image counts: L = w·L_class + (1 − w)·mean over images of u·L_transfer.

The class weight w is `alpha` unless a weighting changes it; the image weight u is 1. All weights are
constants of the backward pass.

Shapes: S stacked students (absent for one), B batch, C classes.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from vitkd.models.output import at_least_float32


@dataclass
class Weighting:
    """Says how much each term and each image counts; its fields are the keys of its file's settings."""

    needs_teacher_logits: ClassVar[bool] = False
    """whether `image_weight` looks at the teacher's logits"""
    needs_gradients: ClassVar[bool] = False
    """whether `balanced` sets the class weight at every logged step, in place of `class_weight`"""

    @property
    def stack_key(self) -> Any:
        """Equal for weightings that can weigh a group of stacked students in one go."""
        return type(self), tuple(asdict(self).items())

    def distils(self, alpha: float) -> bool:
        """Whether the transfer loss counts in any epoch; if not, training is the student's alone."""
        return alpha < 1

    def class_weight(self, alpha: float, epoch: int, epochs: int) -> float:
        """w in `epoch`, counted from 0, of `epochs`; at 1 the transfer loss is not computed then."""
        return alpha

    def image_weight(self, label: Tensor, student: Tensor, teacher: Tensor | None) -> Tensor | None:
        """u [*S, B], or None where all images count alike.

        Args:
            label: [*S, B].
            student: logits that learn the labels [*S, B, C], without gradient.
            teacher: logits [*S, B, C], if `needs_teacher_logits`.
        """
        return None

    def balanced(self, class_norm: Tensor, transfer_norm: Tensor) -> Tensor:
        """w [*S] that suits the norms [*S] of the two terms' gradients, if `needs_gradients`."""
        raise NotImplementedError


@dataclass
class Constant(Weighting):
    """`weighting=constant`: alpha weighs the class loss in every epoch, and all images count alike."""


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Each image's cross-entropy [*S, B] in nats, from logits [*S, B, C] and labels [B] or [*S, B]."""
    label = label.expand(logits.shape[:-1])
    # Not `gather`: in deterministic mode its backward pass waits for the device.
    flat = F.cross_entropy(at_least_float32(logits).flatten(0, -2), label.flatten(), reduction="none")
    return flat.view(label.shape)
