"""Decoupled distillation of class probabilities, against mdistiller's formulas and what the paper proves."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.dkd import DKD, DecoupledObjective
from vitkd.methods.logit import softened_divergence
from vitkd.models import Output


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


def compare(
    objective: DecoupledObjective, student: Tensor, teacher: Tensor, label: Tensor
) -> dict[str, Tensor]:
    batch = Batch(torch.empty(0), label, torch.empty(0))
    return dict(objective(batch, Output(student), Output(teacher)))


def losses_of(objective: DecoupledObjective, student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    return objective.transfer(compare(objective, student, teacher, label))


def mdistillers(
    student: Tensor, teacher: Tensor, label: Tensor, t: float, alpha: float, beta: float
) -> Tensor:
    """Its formulas: two probabilities an image, then a softmax from which −1000 leaves out the true class."""
    is_target = F.one_hot(label, student.shape[-1])

    def two(x: Tensor) -> Tensor:
        p = (x / t).softmax(1)
        return torch.stack([(p * is_target).sum(1), (p * (1 - is_target)).sum(1)], dim=1)

    def others(x: Tensor) -> Tensor:
        return (x / t - 1000 * is_target).log_softmax(1)

    target = F.kl_div(two(student).log(), two(teacher), reduction="sum")
    non_target = F.kl_div(others(student), others(teacher).exp(), reduction="sum")
    return t**2 * (alpha * target + beta * non_target) / len(label)


@pytest.mark.parametrize(
    ("temperature", "alpha", "beta"), [(4.0, 1.0, 8.0), (1.0, 0.5, 2.0), (2.0, 0.0, 1.0)]
)
def test_loss_and_gradient_are_mdistillers(temperature, alpha, beta):
    student, teacher, label = logits(6, 5).requires_grad_(), logits(6, 5), torch.arange(6) % 5
    expected = mdistillers(student, teacher, label, temperature, alpha, beta)

    loss = losses_of(DecoupledObjective(temperature, alpha, beta), student, teacher, label).mean()

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(each, student)[0] for each in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_both_parts_together_are_the_divergence(temperature):
    """The paper's equation 6: the second part counts by how unsure the teacher is of the true class."""
    student, teacher, label = logits(6, 5), logits(6, 5), torch.arange(6) % 5
    p_target = (teacher / temperature).softmax(-1).gather(-1, label.unsqueeze(-1))

    terms = compare(DecoupledObjective(temperature, 1.0, 8.0), student, teacher, label)

    divergence = softened_divergence(student, teacher, temperature)
    together = terms["target_loss"] + (1 - p_target) * terms["non_target_loss"]
    torch.testing.assert_close(together.squeeze(-1), divergence, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("orders", [1, 3])
def test_stacked_students_have_a_loss_each(orders):
    student, label = logits(3, 6, 5), torch.randint(5, (orders, 6)).expand(3, 6)
    teacher, objective = logits(orders, 6, 5).expand(3, 6, 5), DecoupledObjective(4.0, 1.0, 8.0)
    both = (teacher[0], label[0]) if orders == 1 else (teacher, label)

    together = losses_of(objective, student, *both)

    for own, *alone in zip(together, student, teacher, label, strict=True):
        torch.testing.assert_close(own, losses_of(objective, *alone))


def test_a_sure_teacher_still_teaches_the_other_classes():
    """Whose probabilities float32 rounds to 1, and 1 minus that to 0."""
    student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[200.0, 1.0, 0.0]])

    terms = compare(DecoupledObjective(1.0, 1.0, 8.0), student, teacher, torch.tensor([0]))
    (terms["target_loss"] + terms["non_target_loss"]).sum().backward()

    p = 1 / (1 + math.exp(-1))
    expected = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    assert terms["target_loss"].item() == pytest.approx(math.log(3), rel=1e-6)
    assert terms["non_target_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"target_weight": -1.0}, {"non_target_weight": math.inf}]
)
def test_wrong_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"^{name}=[^\n]*0[^\n]*$"):
        DKD(**wrong)
