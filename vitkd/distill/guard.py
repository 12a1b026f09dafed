"""A step that is not finite never reaches the weights."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitkd.errors import RunError

IMAGES_NAMED = 16


class _Seen(NamedTuple):
    """Figures of one batch, still on its device."""

    names: tuple[str, ...]
    values: Tensor
    images: Tensor
    steps: int
    """optimiser steps since the last check"""


class FiniteGuard:
    """Looks at every loss and gradient, and waits for the device only where somebody waits anyway.

    On CUDA a fused optimiser is handed a flag that makes it leave the weights alone, from the first step on
    that is not finite until `check` raises; under 16-mixed the gradient scaler puts its own flag in that
    place, which leaves out just the bad step. Elsewhere each step is checked before it is taken: on the CPU
    that costs nothing, on MPS and with an optimiser that is not fused it waits for the device.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._steps = 0
        self._bad: Tensor | None = None

    def watch(self, losses: Mapping[str, Tensor], index: Tensor) -> None:
        """Note a batch's losses; `index` [B] says which images it holds."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        self._seen.append(_Seen(tuple(losses), values, index, self._steps))

    def hold_back(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter] = ()) -> bool:
        """Note the gradients of `parameters`, and keep `optimizer` from taking a step that is not finite.

        Returns whether it can; if not, `check` has to be called before the step.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            self._seen.append(_Seen(("gradient norm",), norm[None], self._seen[-1].images, self._steps))
        self._steps += 1
        can_hold = bool(optimizer.defaults.get("fused")) and self._seen[-1].values.is_cuda
        if can_hold:
            values = torch.cat([seen.values for seen in self._seen if seen.steps == self._steps - 1])
            bad = ~values.isfinite().all()
            self._bad = bad if self._bad is None else self._bad | bad
            optimizer.found_inf = self._bad.float()  # type: ignore[attr-defined]
        return can_hold

    def check(self, step: int, epoch: int) -> None:
        """Forget what was noted if all of it is finite.

        Args:
            step: number (from 1) of the last step noted.
            epoch: from 1.

        Raises:
            RunError: it is not; names the first such step, its terms and its images.
        """
        seen, steps = self._seen, self._steps
        self._seen, self._steps, self._bad = [], 0, None
        if not seen:
            return
        values = iter(torch.cat([batch.values for batch in seen]).tolist())
        for batch in seen:
            terms = {name: next(values) for name in batch.names}
            if not all(map(math.isfinite, terms.values())):
                raise RunError(_message(terms, batch.images.tolist(), step - steps + batch.steps + 1, epoch))


def _message(terms: Mapping[str, float], images: list[int], step: int, epoch: int) -> str:
    figures = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
    named = ", ".join(map(str, images[:IMAGES_NAMED])) + (", …" if len(images) > IMAGES_NAMED else "")
    return (
        f"step {step} (epoch {epoch}) is not finite: {figures}, on training images {named}; it was not taken,"
        " and what was saved before is good: try a lower optimizer.lr, a longer schedule.warmup or"
        " trainer.gradient_clip_val=1"
    )
