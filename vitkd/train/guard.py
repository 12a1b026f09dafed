"""A step that is not finite never reaches the weights.

Shapes: S stacked students (absent for one model), B batch, n losses.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.errors import RunError

IMAGES_NAMED = 16
ADVICE = "try a lower optimizer.lr, a longer schedule.warmup or trainer.gradient_clip_val=1"


class _Seen(NamedTuple):
    """Losses, or a gradient norm, of one batch, still on its device."""

    names: tuple[str, ...]
    values: Tensor
    """[*S, n]"""
    images: Tensor
    """[B], or [S, B] where students see images of their own"""


class FiniteGuard:
    """Looks at every loss and gradient, and waits for the device only where somebody waits anyway.

    On CUDA a fused optimiser is handed a flag that makes it leave the weights alone, from the first step on
    that is not finite until `check` raises; under 16-mixed the gradient scaler puts its own flag in that
    place, which leaves out just the bad step. Elsewhere each step is checked before it is taken: on the CPU
    that costs nothing, on MPS and with an optimiser that is not fused it waits for the device.

    Args:
        outcome: what a bad step means, for whoever reads of it.
    """

    def __init__(self, outcome: str = "it was not taken, and what was saved before is good") -> None:
        self.outcome = outcome
        self._seen: list[_Seen] = []
        # On the device, and always at the same place in memory, so that a CUDA graph can update it.
        self._steps: Tensor | None = None
        self._first_bad: dict[tuple[str, ...], Tensor] = {}
        self._flag: Tensor | None = None

    def watch(self, losses: Mapping[str, Tensor], index: Tensor) -> None:
        """Note a batch's losses [*S]; `index` [B] or [S, B] says which images it holds."""
        values = torch.stack([loss.detach().float() for loss in losses.values()], dim=-1)
        self._seen.append(_Seen(tuple(losses), values, index))

    def watch_gradients(self, norm: Tensor) -> None:
        """Note the norm [*S] of the gradients that the batches since the last step have led to."""
        self._seen.append(_Seen(("gradient norm",), norm[..., None], self._seen[-1].images))

    def hold_back(self, optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor] = ()) -> bool:
        """Note the gradients of `parameters`, and keep `optimizer` from taking a step that is not finite.

        Returns whether it can; if not, `check` has to be called before the step.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            self.watch_gradients(torch.nn.utils.get_total_norm(gradients))
        can_hold = bool(optimizer.defaults.get("fused")) and self._seen[-1].values.is_cuda
        if can_hold:
            bad = self.end_step()
            self._flag = torch.zeros_like(bad, dtype=torch.float32) if self._flag is None else self._flag
            optimizer.found_inf = self._flag.copy_(bad)  # type: ignore[attr-defined]
        return can_hold

    def end_step(self) -> Tensor:
        """Fold what was noted since the last step into the first bad batches; whether there is any, [*S]."""
        values = self._seen[0].values
        if self._steps is None:
            self._steps = torch.zeros((), dtype=torch.int64, device=values.device)
        for seen in self._seen:
            self._keep_first_bad(seen, self._steps)
        self._steps += 1
        self._seen = []
        return torch.stack([table[..., 0] > 0 for table in self._first_bad.values()]).any(0)

    def forget_step(self) -> None:
        """Drop what was noted since the last step: it is to be taken again."""
        self._seen = []

    def found(self, step: int, epoch: int) -> list[str | None]:
        """What is not finite of each student, in one line that names the step, its terms and its images.

        Args:
            step: number (from 1) of the last step noted.
            epoch: from 1.

        All of it is forgotten then.
        """
        if self._seen:
            self.end_step()
        if self._steps is None:
            return [None]
        tables = {n: table.reshape(-1, table.shape[-1]).tolist() for n, table in self._first_bad.items()}
        before = step - int(self._steps)
        students = len(next(iter(tables.values())))
        bad = [_first_message(tables, student, before, epoch) for student in range(students)]
        messages = [message and f"{message}; {self.outcome}: {ADVICE}" for message in bad]
        self._steps.zero_()
        for table in self._first_bad.values():
            table.zero_()
        return messages

    def check(self, step: int, epoch: int) -> None:
        """RunError if anything that was noted is not finite; arguments as for `found`."""
        noted = [seen.values.flatten() for seen in self._seen]
        if self._steps is None and (not noted or all(map(math.isfinite, torch.cat(noted).tolist()))):
            # No table was begun, so nothing else can have been bad.
            self._seen = []
            return
        for message in self.found(step, epoch):
            if message is not None:
                raise RunError(message)

    def _keep_first_bad(self, seen: _Seen, step: Tensor) -> None:
        """A row a student: whether there was a bad batch, at which step, its losses and images."""
        students = seen.values.shape[:-1]
        bad = ~seen.values.isfinite().all(-1, keepdim=True)
        row = torch.cat(
            [bad, step.expand(*students, 1), seen.values, seen.images.expand(*students, -1)], dim=-1
        ).float()
        table = self._first_bad.setdefault(seen.names, torch.zeros_like(row))
        table.copy_(torch.where(bad & (table[..., :1] == 0), row, table))


def _first_message(
    tables: Mapping[tuple[str, ...], list[list[float]]], student: int, before: int, epoch: int
) -> str | None:
    """The message about one student's first bad batch, if it has one."""
    rows = [(names, table[student]) for names, table in tables.items() if table[student][0]]
    if not rows:
        return None
    names, (_, step, *rest) = min(rows, key=lambda row: row[1][1])
    values, images = rest[: len(names)], rest[len(names) :]
    terms = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, values, strict=True))
    named = ", ".join(f"{image:.0f}" for image in images[:IMAGES_NAMED])
    return (
        f"step {before + step + 1:.0f} (epoch {epoch}) is not finite: {terms}, on training images {named}"
        f"{', …' if len(images) > IMAGES_NAMED else ''}"
    )
