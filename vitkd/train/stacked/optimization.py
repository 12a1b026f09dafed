"""AdamW and schedules for stacked students, each with its own learning rate and weight decay.

Shapes: S stacked students.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitkd.optim import AdamW, Schedule


class OptimSettings(NamedTuple):
    """One student's optimiser and schedule."""

    optimizer: AdamW
    schedule: Schedule

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate at `step`, counted from 0."""
        return self.optimizer.lr * self.schedule.factor(step, total_steps)


class StackedAdamW(torch.optim.AdamW):
    """AdamW whose students each have a learning rate and weight decay of their own.

    Adam's direction depends neither on the learning rate nor on the weight decay, so one fused step finds it
    for all students, and each then goes its own share of it. Where all are equal that is PyTorch's own
    step, bit for bit.

    Args:
        parameters: [S, …] each.
        all_settings: one a student, with equal betas and eps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], all_settings: Sequence[OptimSettings]) -> None:
        parameters = list(parameters)
        settings, like = [each.optimizer for each in all_settings], parameters[0]
        first = settings[0]
        assert all((s.betas, s.eps) == (first.betas, first.eps) for s in settings)
        self.alike = len({repr(each) for each in all_settings}) == 1
        lr, decay = (first.lr, first.weight_decay) if self.alike else (1.0, 0.0)
        super().__init__(
            parameters,
            lr,
            (first.betas[0], first.betas[1]),
            first.eps,
            decay,
            fused=like.device.type in ("cpu", "cuda") or None,
        )
        # Under bf16-true weights are rounded, rates are not.
        exact = torch.promote_types(like.dtype, torch.float32)
        self.rates = torch.zeros(len(all_settings), dtype=exact, device=like.device)
        decays = torch.tensor([s.weight_decay for s in settings], dtype=torch.float64)
        self.decays = decays.to(exact).to(like.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` at this stack's own rates: in a larger one they may have differed."""
        super().load_state_dict({**state_dict, "param_groups": self.state_dict()["param_groups"]})
        for parameter, state in self.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                # A fused step takes it for granted that both are laid out as the weights.
                state[name] = torch.empty_like(parameter).copy_(state[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every student."""
        if self.alike:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter in parameters]
        super().step()
        for parameter, old in zip(parameters, before, strict=True):
            kept = along(1 - self.rates * self.decays, old)
            parameter.sub_(old).mul_(along(self.rates, old)).addcmul_(old, kept)
        return loss


class StackedSchedule:
    """Sets every student's learning rate at every step; Lightning takes it for a scheduler.

    Args:
        optimizer: whose rates.
        all_settings: one a student.
        total_steps: of the whole run.
    """

    def __init__(
        self, optimizer: StackedAdamW, all_settings: Sequence[OptimSettings], total_steps: int
    ) -> None:
        self.optimizer, self.all_settings, self.total_steps = optimizer, all_settings, total_steps
        self._taken = 0
        if not optimizer.alike:
            # [steps, distinct settings], and which of these each student has [S].
            # On the device: a copy a step from the host would have to wait for it.
            like, distinct = optimizer.rates, list({repr(each): each for each in all_settings}.values())
            rates = [[each.rate(step, total_steps) for each in distinct] for step in range(total_steps + 1)]
            self._table = torch.tensor(rates, dtype=torch.float64).to(like.dtype).to(like.device)
            self._column = torch.tensor([distinct.index(each) for each in all_settings], device=like.device)
        self._set_rates()

    def step(self) -> None:
        """Advance to the next step's rates."""
        self._taken += 1
        self._set_rates()

    def get_last_lr(self) -> list[float]:
        """The rates [S] as they are now."""
        return [each.rate(self._taken, self.total_steps) for each in self.all_settings]

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after as many steps."""
        self._taken = state["taken"]
        self._set_rates()

    def _set_rates(self) -> None:
        if self.optimizer.alike:
            (group,) = self.optimizer.param_groups
            rate = self.all_settings[0].rate(self._taken, self.total_steps)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        else:
            now = self._table[min(self._taken, self.total_steps)]
            self.optimizer.rates.copy_(now[self._column])


def per_student_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm [S] over all of each student's entries of `tensors`, each [S, …]."""
    norms = [torch.linalg.vector_norm(tensor, dim=[*range(1, tensor.ndim)]) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def along(values: Tensor, like: Tensor) -> Tensor:
    """[S] reshaped to [S, 1, …, 1], so that it broadcasts against `like` [S, …]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
