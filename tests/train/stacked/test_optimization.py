"""Stacked students keep each their own pace, also when a stack is cut or changes its device's precision."""

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from vitkd.optim import AdamW, Constant, WarmupCosine
from vitkd.train.stacked.fit import take_entries
from vitkd.train.stacked.optimization import OptimSettings, StackedAdamW, StackedSchedule

STEPS = 12
PACES = [
    OptimSettings(AdamW(lr=0.1, weight_decay=0.3), WarmupCosine(warmup=0.3)),
    OptimSettings(AdamW(lr=0.01, weight_decay=0.0), Constant()),
    OptimSettings(AdamW(lr=0.1, weight_decay=0.3), WarmupCosine(warmup=0.3)),
]


class Steps:
    """Optimiser and schedule of one parameter, [S, 4], with gradients that are functions of the step."""

    def __init__(self, paces: Sequence[OptimSettings], start: Tensor) -> None:
        self.parameter = nn.Parameter(start.clone())
        self.optimizer = StackedAdamW([self.parameter], paces)
        self.schedule = StackedSchedule(self.optimizer, paces, STEPS)

    def take(self, steps: range, students: Sequence[int]) -> None:
        for step in steps:
            gradients = [torch.cos(torch.arange(4.0) * (1 + student) + step) for student in students]
            self.parameter.grad = torch.stack(gradients).to(self.parameter)
            self.optimizer.step()
            self.schedule.step()


def alone(student: int, start: Tensor) -> Tensor:
    """PyTorch's own optimiser and schedule for one of the students."""
    settings, schedule = PACES[student]
    parameter = nn.Parameter(start[student].clone())
    optimizer = settings.build([parameter])
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, STEPS))
    for step in range(STEPS):
        parameter.grad = torch.cos(torch.arange(4.0) * (1 + student) + step).to(parameter)
        optimizer.step()
        rates.step()
    return parameter.detach()


@pytest.fixture
def start() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def test_each_goes_as_it_goes_alone(start):
    together = Steps(PACES, start)

    together.take(range(STEPS), range(3))

    for student in range(3):
        torch.testing.assert_close(together.parameter[student], alone(student, start), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("students", [[0], [1], [0, 2], [2, 1]])
def test_some_of_a_stack_go_on_at_their_own_pace(students, start):
    whole = Steps(PACES, start)
    whole.take(range(5), range(3))
    saved = take_entries(
        {"weights": whole.parameter.detach(), "optimizer": whole.optimizer.state_dict()}, {3: students}
    )

    part = Steps([PACES[student] for student in students], saved["weights"])
    part.optimizer.load_state_dict(saved["optimizer"])
    part.schedule.load_state_dict(whole.schedule.state_dict())
    part.take(range(5, STEPS), students)

    for place, student in enumerate(students):
        torch.testing.assert_close(part.parameter[place], alone(student, start), rtol=1e-12, atol=1e-14)


def test_rates_and_decays_are_not_rounded_as_bf16_weights_are(start):
    stacked = Steps(PACES, start.bfloat16())

    stacked.take(range(3), range(3))

    assert stacked.optimizer.rates.tolist() == pytest.approx(stacked.schedule.get_last_lr(), rel=1e-6)
    assert stacked.optimizer.decays.tolist() == pytest.approx([0.3, 0.0, 0.3], rel=1e-6)
    assert stacked.parameter.dtype == torch.bfloat16


@pytest.mark.parametrize("paces", [PACES, PACES[:1] * 3], ids=["each its own", "one"])
def test_what_was_laid_out_otherwise_is_continued_all_the_same(paces):
    start, gradients = torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5)

    def step(parameter: nn.Parameter, optimizer: StackedAdamW, gradient: Tensor) -> None:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    plain, turned = (nn.Parameter(values) for values in (start.clone(), start.mT.contiguous().mT))
    first, second = (StackedAdamW([parameter], paces) for parameter in (plain, turned))
    for optimizer in (first, second):
        StackedSchedule(optimizer, paces, STEPS)  # sets the rates
    step(plain, first, gradients[0])
    step(turned, second, torch.zeros(()))
    second.load_state_dict(deepcopy(first.state_dict()))
    turned.data.copy_(plain.data)
    for parameter, optimizer in ((plain, first), (turned, second)):
        step(parameter, optimizer, gradients[1])

    assert turned.stride() != plain.stride()
    torch.testing.assert_close(turned, plain)
