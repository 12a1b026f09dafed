"""Distillation of logits, against torchdistill's."""

import pytest
import torch
import torch.nn.functional as F

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.logit import LogitDistillation, LogitObjective
from vitkd.models import Model, Output, ResNetConfig, Taps
from vitkd.optim import AdamW, Constant
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule


def losses_of(objective: LogitObjective, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The loss of each image [*S, B], from both models' logits."""
    count = teacher.shape[-2]
    batch = Batch(torch.empty(count, 3, 8, 8), torch.zeros(count).long(), torch.arange(count))
    return objective.transfer(objective(batch, Output(student), Output(teacher)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
# At alpha = 0 theirs leaves T² out.
@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_the_loss_is_torchdistills(temperature, alpha):
    from torchdistill.losses.mid_level import KDLoss

    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    labels = torch.randint(5, (6,))
    theirs = KDLoss(
        student_module_path=".",
        student_module_io="output",
        teacher_module_path=".",
        teacher_module_io="output",
        temperature=temperature,
        alpha=alpha,
        reduction="batchmean",
    )
    expected = theirs({".": {"output": student}}, {".": {"output": teacher}}, labels)

    losses = losses_of(LogitObjective(temperature), student, teacher)
    total = alpha * F.cross_entropy(student, labels) + (1 - alpha) * losses.mean()

    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_of_z_scores_is_torchdistills(temperature):
    """With the paper's weights, which are alpha = 0.1/9.1 but for a factor of 9.1."""
    from torchdistill.losses.mid_level import LogitStdKDLoss

    student, teacher = 3 + 5 * torch.randn(6, 5).double(), torch.randn(6, 5).double()
    labels, alpha = torch.randint(5, (6,)), 0.1 / 9.1
    paths = {f"{model}_module_path": "." for model in ("student", "teacher")}
    outputs = {f"{model}_module_io": "output" for model in ("student", "teacher")}
    theirs = LogitStdKDLoss(**paths, **outputs, temperature=temperature, alpha=0.1, beta=9.0)
    expected = theirs({".": {"output": student}}, {".": {"output": teacher}}, labels)

    losses = losses_of(LogitObjective(temperature, standardize=True), student, teacher)
    total = alpha * F.cross_entropy(student, labels) + (1 - alpha) * losses.mean()

    torch.testing.assert_close(9.1 * total, expected, rtol=1e-12, atol=1e-12)


def test_z_scores_do_without_the_teachers_range():
    """Logits that are the teacher's but for a shift and a factor of each image have nothing to learn."""
    teacher = torch.randn(6, 5, dtype=torch.float64)
    student = torch.randn(6, 1).double() + (0.2 + 0.5 * torch.rand(6, 1).double()) * teacher

    assert losses_of(LogitObjective(2.0, standardize=True), student, teacher).max() < 1e-9
    assert losses_of(LogitObjective(2.0), student, teacher).max() > 1e-3


def test_equal_logits_are_no_reason_for_nan():
    student = torch.zeros(2, 5, requires_grad=True)

    losses_of(LogitObjective(2.0, standardize=True), student, torch.randn(2, 5)).sum().backward()

    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_each_image_has_a_value_of_its_own(temperature):
    """T²·Σ p (log p − log q), by hand."""
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    p, q = ((logits / temperature).exp() for logits in (teacher, student))
    p, q = (weights / weights.sum(-1, keepdim=True) for weights in (p, q))

    losses = losses_of(LogitObjective(temperature), student, teacher)

    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("standardize", [False, True])
def test_stacked_logits_have_a_loss_each(standardize):
    student, teacher = torch.randn(3, 6, 5), torch.randn(6, 5)
    objective = LogitObjective(2.0, standardize)

    together = losses_of(objective, student, teacher)

    assert together.shape == (3, 6)
    for own, logits in zip(together, student, strict=True):
        torch.testing.assert_close(own, losses_of(objective, logits, teacher))


def test_a_step_pulls_towards_the_teachers_classes_and_records_no_map(tiny, monkeypatch):
    torch.manual_seed(0)
    student, teacher = tiny().build(), tiny(depth=4).build()
    settings = plan(method=LogitDistillation(temperature=2.0), alpha=0.0)
    module = build_module(settings, student, teacher, facts()).train()
    asked: set[Taps] = set()
    forward = type(student).forward

    def watched(self, images, taps=Taps()):  # noqa: B008
        asked.add(taps)
        return forward(self, images, taps)

    monkeypatch.setattr(type(student), "forward", watched)
    batch = Batch(torch.randn(16, 3, 8, 8), torch.zeros(16).long(), torch.arange(16))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        total = module.losses(batch).total
        total.backward()
        optimizer.step()
        losses.append(total.item())

    assert losses[-1] < losses[0] / 2
    assert asked == {Taps()}


def distilled(student: Model, teacher: Model) -> DistillModule:
    return DistillModule(
        student, AdamW(), Constant(), teacher=teacher, objective=LogitObjective(2.0), alpha=0.5
    ).train()


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_either_model_may_be_convolutional(of, tiny):
    models = {"student": tiny(), "teacher": tiny(depth=1)} | {of: ResNetConfig(8, 3, 5)}
    student, teacher = (models[name].build().double() for name in ("student", "teacher"))
    module = distilled(student, teacher)
    batch = Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), torch.arange(4))

    losses = module.losses(batch)
    losses.total.backward()

    p = (teacher(batch.image).logits / 2).softmax(1)
    expected = 4 * F.kl_div((losses.output.logits.detach() / 2).log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(losses.transfer.loss.detach(), expected, rtol=1e-12, atol=1e-12)
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_with_two_heads_is_taught_as_it_answers(tiny):
    """By the mean of both; both learn."""
    student, teacher = tiny(distillation_token=True).build().double(), tiny().build().double()
    module = distilled(student, teacher)
    batch = Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), torch.arange(4))

    losses = module.losses(batch)
    losses.total.backward()

    mean = sum(losses.output.heads.values()) / 2
    assert losses.class_loss.item() == pytest.approx(F.cross_entropy(mean, batch.label).item(), rel=1e-12)
    assert torch.equal(student.head.bias.grad, student.distillation_head.bias.grad)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ConfigError, match=r"temperature=.*above 0"):
        LogitDistillation(temperature=temperature)
