"""What a step is given.

Shapes: B batch, C channels, H and W pixels, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A model's input, on its device.

    Args:
        image: [B, C, H, W] float32, normalised.
        label: [B] int64; of a mixed image the class that has most of it.
        index: [B] int64, each image's position in its official split.
        target: [B, K] float32, of mixed images the share of each class; None where each image has one class.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a batch does not need
    target: Tensor | None = None

    @property
    def truth(self) -> Tensor:
        """What the class loss compares with: the shares of the classes, or the labels if there are none."""
        return self.label if self.target is None else self.target

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch of what `change` makes of each tensor."""
        return Batch(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def in_orders(self, orders: Tensor | slice) -> "Batch":
        """Of a batch [U, B, …] the labels, indices and targets at some entries of U; the images stay."""
        rest = self._replace(image=self.label).map(lambda part: part[orders])
        return rest._replace(image=self.image)


def join(batches: Sequence[Batch], how: Callable[[Any], Tensor] = torch.stack) -> Batch:
    """Several batches as one, part by part, by `how` several tensors become one."""
    parts = zip(*batches, strict=True)
    return Batch(*(None if part[0] is None else how(part) for part in parts))  # type: ignore[arg-type]
