"""The optimiser's step and the learning rate's course."""

import math

import pytest
import torch
from torch import nn

from vitkd.errors import ConfigError
from vitkd.optim import SGD, AdamW, Constant, Lion, WarmupCosine


def test_adamw_takes_the_values_given():
    optimizer = AdamW(lr=0.02, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-5).build(
        [nn.Parameter(torch.ones(2))]
    )

    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert {k: group[k] for k in ("lr", "weight_decay", "betas", "eps")} == {
        "lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-5,
    }  # fmt: skip


def test_adamw_steps_as_the_paper_has_it():
    """Algorithm 2 of Loshchilov and Hutter 2019, written out for three steps."""
    lr, decay, b1, b2, eps = 0.02, 0.3, 0.8, 0.95, 1e-5
    parameter = nn.Parameter(torch.randn(7, dtype=torch.float64))
    optimizer = AdamW(lr=lr, weight_decay=decay, betas=[b1, b2], eps=eps).build([parameter])
    x, m, v = parameter.detach().clone(), torch.zeros(7).double(), torch.zeros(7).double()

    for t in (1, 2, 3):
        parameter.grad = g = torch.randn(7, dtype=torch.float64)
        optimizer.step()

        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        x = x - lr * decay * x - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(parameter.detach(), x, atol=1e-14, rtol=0)


def test_lion_takes_no_step_that_the_device_has_flagged():
    """As PyTorch's fused optimisers: whether to step is a tensor's value, which the host never reads."""
    start = torch.randn(5)
    parameter = nn.Parameter(start.clone())
    optimizer = Lion(lr=0.1, weight_decay=0.3).build([parameter])
    parameter.grad = torch.randn(5)
    optimizer.step()
    after, moment = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
    assert not torch.equal(after, start)

    parameter.grad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1, 2])
    optimizer.found_inf = torch.ones(())
    optimizer.step()

    assert torch.equal(parameter.detach(), after)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    parameter.grad, optimizer.found_inf = torch.randn(5), torch.zeros(())
    optimizer.step()
    assert not torch.equal(parameter.detach(), after)


def test_lions_rate_may_be_a_tensor_that_keeps_its_place():
    """So a CUDA graph reads it."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    one, other = (Lion(lr=0.1, weight_decay=0.3).build([p]) for p in parameters)
    one.param_groups[0]["lr"] = torch.tensor(0.1)
    for parameter, optimizer in zip(parameters, (one, other), strict=True):
        parameter.grad = torch.tensor([1.0, -1.0, 2.0])
        optimizer.step()

    torch.testing.assert_close(*parameters)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        (SGD, {"momentum": 1.0}, "momentum=1.0: must lie in [0, 1)"),
        (SGD, {"momentum": 0.0}, "nesterov=true: looks ahead by momentum, which is 0; set nesterov=false"),
        (Lion, {"betas": [0.9]}, "betas=[0.9]: give two numbers in [0, 1)"),
        (Lion, {"lr": 0.0}, "lr=0.0: must be a finite number above 0"),
        (AdamW, {"layer_decay": 0.0}, "layer_decay=0.0: must be above 0 and at most 1"),
        (SGD, {"layer_decay": 1.5}, "layer_decay=1.5: must be above 0 and at most 1"),
    ],
)
def test_what_an_optimizer_cannot_do_is_said_in_one_line(optimizer, settings, message):
    with pytest.raises(ConfigError) as caught:
        optimizer(**settings)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 0.0), ("lr", -1.0), ("lr", math.inf), ("lr", math.nan),
        ("weight_decay", -0.1), ("weight_decay", math.nan), ("betas", [0.9]), ("betas", [0.9, 1.0]),
        ("betas", [-0.1, 0.9]), ("eps", 0.0), ("eps", -1e-8),
    ],
)  # fmt: skip
def test_impossible_optimisers_are_refused_in_one_line(setting, value):
    with pytest.raises(ConfigError) as caught:
        AdamW(**{setting: value})

    assert str(caught.value).startswith(f"{setting}={value}: ")
    assert "\n" not in str(caught.value)


def test_constant():
    assert {Constant().factor(step, 50) for step in (0, 1, 49, 50, 1000)} == {1.0}


def test_warmup_rises_in_equal_steps_and_the_cosine_falls():
    """100 steps, 10 of them warm-up."""
    factor = [WarmupCosine(warmup=0.1, final=0.2).factor(step, 100) for step in range(101)]

    assert factor[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factor[10] == 1.0
    assert factor[10 + 30] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)  # a third of the way
    assert factor[10 + 45] == pytest.approx((1 + 0.2) / 2)  # half of the way
    assert factor[100] == pytest.approx(0.2)
    assert factor[10:] == sorted(factor[10:], reverse=True)


def test_without_warmup_the_first_step_is_full():
    assert WarmupCosine(warmup=0.0).factor(0, 10) == 1.0


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_every_step_of_a_short_run_moves(total_steps, warmup):
    schedule = WarmupCosine(warmup=warmup)

    assert all(0 < schedule.factor(step, total_steps) <= 1 for step in range(total_steps))


def test_past_the_end_the_rate_stays():
    assert WarmupCosine(final=0.2).factor(150, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("setting", "value"), [("warmup", -0.1), ("warmup", 1.1), ("final", 2.0), ("final", math.nan)]
)
def test_impossible_schedules_are_refused_in_one_line(setting, value):
    with pytest.raises(ConfigError, match=rf"^{setting}={value}: [^\n]+$"):
        WarmupCosine(**{setting: value})
