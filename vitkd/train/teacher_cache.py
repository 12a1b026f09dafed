"""The teacher's answers, asked for once: what it says of an image that always looks the same never changes.

Shapes: N images held, I any shape of image numbers ([B], or [U, B] for batches of several data orders),
H heads, T tokens, K classes.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.models import Output


class TeacherCache:
    """A teacher's answers to N images, looked up by the images' numbers without waiting for the device.

    A cache belongs to one run: to one teacher, one data set, one fixed view of each image and one precision.
    So an image's position in its official split says all, and nothing is ever replaced. It is derived from
    what the run has anyway and never saved; copies of a module share it, since nobody writes to it.

    Args:
        ask: from [B, channels, H, W] to the teacher's answer; it runs in the caller's precision.
        batches: hold each of `images` once.
        images: [N] int64, the images' positions in their official split.
        size: of that split.
    """

    @torch.no_grad()
    def __init__(
        self, ask: Callable[[Tensor], Output], batches: Iterable[Batch], images: Tensor, size: int
    ) -> None:
        # What is not held points behind the end: a lookup fails, where −1 would give another image's answers.
        self._rows = torch.full((size,), len(images), device=images.device)
        self._rows[images] = torch.arange(len(images), device=images.device)
        filled = 0
        for batch in batches:
            answer = ask(batch.image)
            if not filled:
                self._answers = answer.map(lambda part: part.new_empty(len(images), *part.shape[1:]))
            for all_, part in zip(self._answers.tensors(), answer.tensors(), strict=True):
                all_[self._rows[batch.index]] = part
            filled += len(batch.index)
        assert filled == len(images), f"{filled} images for {len(images)} rows"

    def answer(self, index: Tensor) -> Output:
        """The answers to the images `index` [*I]; an IndexError, on CUDA an assertion, if there are none."""
        rows = self._rows[index]
        # Several times faster than indexing where an answer is large.
        return self._answers.map(lambda all_: all_.index_select(0, rows.flatten()).unflatten(0, rows.shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
