"""Distillation of logits, against torchdistill's."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.logit import LogitDistillation, LogitTransfer
from vitkd.methods.maps.granularity import Block
from vitkd.methods.maps.losses import KL
from vitkd.models import ModelOutput, ResNetConfig
from vitkd.models.base import Answer
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule


def said(logits: torch.Tensor) -> tuple[ModelOutput, Answer]:
    return ModelOutput(logits, {}), Answer({}, logits)


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

    transfer = LogitTransfer(temperature)
    values = transfer.compare(said(student)[0], said(teacher)[1])
    total = alpha * F.cross_entropy(student, labels) + (1 - alpha) * transfer.total(values)

    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_stacked_logits_have_a_loss_each():
    student, teacher = torch.randn(3, 6, 5), torch.randn(6, 5)
    transfer = LogitTransfer(2.0)

    together = transfer.total(transfer.compare(said(student)[0], said(teacher)[1]))

    assert together.shape == (3,)
    for own, logits in zip(together, student, strict=True):
        torch.testing.assert_close(own, transfer.total(transfer.compare(said(logits)[0], said(teacher)[1])))


def test_a_step_pulls_towards_the_teachers_classes_and_records_no_map(tiny, monkeypatch):
    torch.manual_seed(0)
    student, teacher = tiny().build(), tiny(depth=4).build()
    plan = SimpleNamespace(
        granularity=Block(), loss=KL(), alpha=0.0, optimizer=AdamW(), schedule=Constant(), label_smoothing=0.0
    )
    module = LogitDistillation(temperature=2.0).module(student, teacher, plan, lambda: torch.empty(0)).train()
    recorded: list[int] = []
    forward = type(student).forward

    def watched(self, images, record=(), factors=False):
        recorded.extend(record)
        return forward(self, images, record, factors)

    monkeypatch.setattr(type(student), "forward", watched)
    batch = Batch(torch.randn(16, 3, 8, 8), torch.zeros(16).long(), torch.arange(16))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)

    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        terms = module.terms(batch)
        terms.total.backward()
        optimizer.step()
        losses.append(terms.total.item())

    assert losses[-1] < losses[0] / 2
    assert recorded == []


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_either_model_may_be_convolutional(of, tiny):
    models = {"student": tiny(), "teacher": tiny(depth=1)} | {of: ResNetConfig(8, 3, 5)}
    student, teacher = (models[name].build().double() for name in ("student", "teacher"))
    module = DistillModule(student, teacher, LogitTransfer(2.0), 0.5, AdamW(), Constant()).train()
    batch = Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), torch.arange(4))

    terms = module.terms(batch)
    terms.total.backward()

    p = (teacher(batch.image).logits / 2).softmax(1)
    expected = 4 * F.kl_div((terms.logits.detach() / 2).log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(terms.transfer.detach(), expected, rtol=1e-12, atol=1e-12)
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_with_two_heads_is_taught_as_it_answers(tiny):
    """By the mean of both; both learn."""
    student, teacher = tiny(distillation_token=True).build().double(), tiny().build().double()
    module = DistillModule(student, teacher, LogitTransfer(2.0), 0.5, AdamW(), Constant()).train()
    batch = Batch(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4), torch.arange(4))

    terms = module.terms(batch)
    terms.total.backward()

    mean = sum(terms.of_tokens) / 2
    assert terms.task.item() == pytest.approx(F.cross_entropy(mean, batch.label).item(), rel=1e-12)
    assert torch.equal(student.head.bias.grad, student.distillation_head.bias.grad)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf")])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ConfigError, match=r"temperature=.*above 0"):
        LogitDistillation(temperature=temperature)
