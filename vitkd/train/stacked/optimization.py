"""Optimisers and schedules for stacked students, each with its own learning rate and weight decay.

Shapes: S stacked students, G groups of parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vitkd.optim import Optimizer, Schedule


class OptimSettings(NamedTuple):
    """One student's optimiser and schedule."""

    optimizer: Optimizer
    schedule: Schedule

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate at `step`, counted from 0."""
        return self.optimizer.lr * self.schedule.factor(step, total_steps)


class StackedOptimizer(torch.optim.Optimizer):
    """An optimiser whose students each have a learning rate and weight decay of their own.

    Its direction depends neither on the learning rate nor on a decoupled weight decay, so one fused step
    finds it for all students, and each then goes its own share of it. Where all are equal that is the
    optimiser's own step, bit for bit.

    Args:
        groups: parameters [S, …], as `grouped` makes them.
        all_settings: one a student, equal but for learning rate, weight decay and schedule.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], all_settings: Sequence[OptimSettings]) -> None:
        settings = [each.optimizer for each in all_settings]
        first, like = settings[0], groups[0]["params"][0]
        assert all(type(each) is type(first) for each in settings)
        assert all(each.arguments() == first.arguments() for each in settings)
        self.alike = len({repr(each) for each in all_settings}) == 1
        self.is_decoupled = first.is_decoupled
        neutral = {} if self.alike else {"lr": 1.0, "weight_decay": 0.0}
        fused = like.device.type in ("cpu", "cuda") or None
        super().__init__(
            [{**group, **neutral} for group in groups],
            **{"lr": 1.0, "weight_decay": 0.0, "fused": fused, **first.arguments()},
        )
        # Under bf16-true weights are rounded, rates are not.
        exact = torch.promote_types(like.dtype, torch.float32)
        self.rates = torch.zeros(len(all_settings), dtype=exact, device=like.device)
        scales = [[group["lr_scale"]] for group in groups]
        self.scales = torch.tensor(scales, dtype=exact, device=like.device)
        """[G, 1]"""
        decays = [[each.weight_decay * group["decays"] for each in settings] for group in groups]
        self.decays = torch.tensor(decays, dtype=exact, device=like.device)
        """[G, S]"""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` at this stack's own rates: in a larger one they may have differed."""
        super().load_state_dict({**state_dict, "param_groups": self.state_dict()["param_groups"]})
        for parameter, state in self.state.items():
            for name, values in state.items():
                if isinstance(values, Tensor) and values.shape == parameter.shape:
                    # A fused step takes it for granted that its moments are laid out as the weights.
                    state[name] = torch.empty_like(parameter).copy_(values)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every student."""
        if self.alike:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        rates = self.scales * self.rates
        kept = 1 - rates * self.decays if self.is_decoupled else torch.ones_like(rates)
        if not self.is_decoupled:
            for parameters, decay in zip(members, self.decays, strict=True):
                for parameter in parameters:
                    parameter.grad.addcmul_(parameter, along(decay, parameter))
        before = [[parameter.clone() for parameter in parameters] for parameters in members]
        super().step()
        for parameters, old, rate, share in zip(members, before, rates, kept, strict=True):
            for new, values in zip(parameters, old, strict=True):
                new.sub_(values).mul_(along(rate, values)).addcmul_(values, along(share, values))
        return loss


def stacked_optimizer(
    groups: Sequence[dict[str, Any]], all_settings: Sequence[OptimSettings]
) -> StackedOptimizer:
    """What steps as the optimiser of these settings does; see `StackedOptimizer`."""
    algorithm = all_settings[0].optimizer.algorithm
    stacked = type(f"Stacked{algorithm.__name__}", (StackedOptimizer, algorithm), {})
    return cast(StackedOptimizer, stacked(groups, all_settings))


class StackedSchedule:
    """Sets every student's learning rate at every step; Lightning takes it for a scheduler.

    Args:
        optimizer: whose rates.
        all_settings: one a student.
        total_steps: of the whole run.
    """

    def __init__(
        self, optimizer: StackedOptimizer, all_settings: Sequence[OptimSettings], total_steps: int
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
            rate = self.all_settings[0].rate(self._taken, self.total_steps)
            for group in self.optimizer.param_groups:
                own = rate * group["lr_scale"]
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(own)
                else:
                    group["lr"] = own
        else:
            now = self._table[min(self._taken, self.total_steps)]
            self.optimizer.rates.copy_(now[self._column])


def per_student_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm [S] over all of each student's entries of `tensors`, each [S, …]."""
    norms = [torch.linalg.vector_norm(tensor, dim=[*range(1, tensor.ndim)]) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)


def clip_each(gradients: Sequence[Tensor], most: float) -> None:
    """Scale each student's gradients [S, …] to a norm of at most `most`, as clip_grad_norm_ does."""
    share = (most / (per_student_norm(gradients) + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(along(share, gradient))


def along(values: Tensor, like: Tensor) -> Tensor:
    """[S] reshaped to [S, 1, …, 1], so that it broadcasts against `like` [S, …]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
