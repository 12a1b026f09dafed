"""Stacked students keep each their own pace, also when a stack is cut or changes its device's precision."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vitkd.optim import SGD, AdamW, Constant, Lion, Optimizer, Place, WarmupCosine, grouped
from vitkd.train.stacked.fit import take_entries
from vitkd.train.stacked.optimization import (
    OptimSettings,
    StackedOptimizer,
    StackedSchedule,
    stacked_optimizer,
)

STEPS = 12
EVERYWHERE = Place(lr_scale=1.0, decays=True)
PACES = [
    OptimSettings(AdamW(lr=0.1, weight_decay=0.3), WarmupCosine(warmup=0.3)),
    OptimSettings(AdamW(lr=0.01, weight_decay=0.0), Constant()),
    OptimSettings(AdamW(lr=0.1, weight_decay=0.3), WarmupCosine(warmup=0.3)),
]


def optimizer_of(
    parameter: nn.Parameter, paces: Sequence[OptimSettings], place: Place = EVERYWHERE
) -> StackedOptimizer:
    """The students' optimiser of one parameter [S, …]."""
    return stacked_optimizer(grouped(paces[0].optimizer, [parameter], [place]), paces)


class Steps:
    """Optimiser and schedule of one parameter, [S, 4], with gradients that are functions of the step."""

    def __init__(self, paces: Sequence[OptimSettings], start: Tensor) -> None:
        self.parameter = nn.Parameter(start.clone())
        self.optimizer = optimizer_of(self.parameter, paces)
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


OPTIMIZERS: list[Optimizer] = [
    AdamW(lr=0.1, weight_decay=0.3),
    SGD(lr=0.1, weight_decay=0.3),
    SGD(lr=0.1, weight_decay=0.3, momentum=0.0, nesterov=False),
    Lion(lr=0.01, weight_decay=0.3),
]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_every_optimizer_and_group_goes_as_it_goes_alone(optimizer, decays, alike, start):
    """Beside PyTorch's own optimiser of a parameter at a quarter of the rate, with or without decay."""
    first = OptimSettings(optimizer, WarmupCosine(warmup=0.3))
    second = first if alike else OptimSettings(replace(optimizer, lr=0.02, weight_decay=0.1), Constant())
    paces, place = [first, second], Place(lr_scale=0.25, decays=decays)
    together = nn.Parameter(start[:2].clone())
    stacked = optimizer_of(together, paces, place)
    schedule = StackedSchedule(stacked, paces, STEPS)
    apart = [nn.Parameter(values.clone()) for values in start[:2]]
    own = [
        replace(s.optimizer, lr=s.optimizer.lr / 4, weight_decay=decays * s.optimizer.weight_decay).build([p])
        for s, p in zip(paces, apart, strict=True)
    ]
    for step in range(STEPS):
        together.grad = torch.cos(together.detach() * (1 + step))
        stacked.step()
        schedule.step()
        for pace, parameter, optimizer in zip(paces, apart, own, strict=True):
            optimizer.param_groups[0]["lr"] = pace.rate(step, STEPS) / 4
            parameter.grad = torch.cos(parameter.detach() * (1 + step))
            optimizer.step()

    for student, parameter in enumerate(apart):
        torch.testing.assert_close(together[student], parameter, rtol=1e-12, atol=1e-14)


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


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_one_of_any_stack_goes_on_as_in_the_whole(optimizer, start):
    other = OptimSettings(replace(optimizer, lr=0.02, weight_decay=0.1), Constant())
    paces = [OptimSettings(optimizer, WarmupCosine(warmup=0.3)), other]
    whole = Steps(paces, start[:2])
    whole.take(range(5), range(2))
    state = {"weights": whole.parameter.detach(), "optimizer": whole.optimizer.state_dict()}
    saved = take_entries(deepcopy(state), {2: [1]})

    part = Steps([other], saved["weights"])
    part.optimizer.load_state_dict(saved["optimizer"])
    part.schedule.load_state_dict(whole.schedule.state_dict())
    part.take(range(5, STEPS), [1])
    whole.take(range(5, STEPS), range(2))

    torch.testing.assert_close(part.parameter[0], whole.parameter[1], rtol=1e-12, atol=1e-14)


def test_rates_and_decays_are_not_rounded_as_bf16_weights_are(start):
    stacked = Steps(PACES, start.bfloat16())

    stacked.take(range(3), range(3))

    assert stacked.optimizer.rates.tolist() == pytest.approx(stacked.schedule.get_last_lr(), rel=1e-6)
    assert stacked.optimizer.decays[0].tolist() == pytest.approx([0.3, 0.0, 0.3], rel=1e-6)
    assert stacked.parameter.dtype == torch.bfloat16


@pytest.mark.parametrize("paces", [PACES, PACES[:1] * 3], ids=["each its own", "one"])
def test_what_was_laid_out_otherwise_is_continued_all_the_same(paces):
    start, gradients = torch.randn(3, 4, 5), torch.randn(2, 3, 4, 5)

    def step(parameter: nn.Parameter, optimizer: StackedOptimizer, gradient: Tensor) -> None:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()

    plain, turned = (nn.Parameter(values) for values in (start.clone(), start.mT.contiguous().mT))
    first, second = (optimizer_of(parameter, paces) for parameter in (plain, turned))
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
