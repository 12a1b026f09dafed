"""Accuracy and loss count every image once, whatever the batches."""

import pytest
import torch
from torch.nn import functional as F

from vitkd.data import Batch
from vitkd.evaluate.measure import evaluate, measure_both

CPU = torch.device("cpu")
FIGURES = {
    *("test/acc_last", "test/acc_best", "test/loss", "test/loss_best"),
    *("test/f1_macro", "test/f1_macro_best", "test/ece", "test/ece_best"),
}
"""Of a student with one head, without a teacher, on five classes: top-5 says nothing there."""


@pytest.fixture
def model(tiny):
    return tiny(dropout=0.5).build()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(11, 3, 8, 8)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(11) % 5


def batches(images, labels, *sizes) -> list[Batch]:
    parts = zip(images.split(sizes), labels.split(sizes), torch.arange(11).split(sizes), strict=True)
    return [Batch(*part) for part in parts]


@pytest.mark.parametrize("sizes", [(11,), (5, 5, 1), (1, 10), (4, 7)], ids=str)
def test_figures_equal_those_by_hand(sizes, model, images, labels):
    found = evaluate(model, batches(images, labels, *sizes), CPU)

    with torch.no_grad():
        logits = model.eval()(images).logits.double()
    by_hand = [logits[i].logsumexp(0) - logits[i, label] for i, label in enumerate(labels)]
    assert found.loss == pytest.approx(float(sum(by_hand)) / 11, rel=1e-6)
    assert (
        found.accuracy
        == sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True)) / 11
    )
    assert torch.equal(found.predictions, logits.argmax(-1))


def test_one_image_of_a_small_last_batch_weighs_as_much_as_any(model, images, labels):
    """The mean of batch means would be another number."""
    found = evaluate(model, batches(images, labels, 10, 1), CPU)

    with torch.no_grad():
        each = F.cross_entropy(model.eval()(images).logits, labels, reduction="none").double()
    assert found.loss == pytest.approx(each.mean().item(), rel=1e-6)
    assert found.loss != pytest.approx((each[:10].mean() + each[10]).item() / 2, rel=1e-3)


def test_dropout_is_off_and_nothing_is_trained(model, images, labels):
    before = [parameter.clone() for parameter in model.parameters()]

    first, second = (evaluate(model.train(), batches(images, labels, 6, 5), CPU) for _ in range(2))

    assert first.loss == second.loss
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_agreement_is_the_share_of_equal_answers(model, images, labels):
    found = evaluate(model, batches(images, labels, 11), CPU)
    other = found.predictions.clone()
    other[:3] = (other[:3] + 1) % 5

    assert found.agreement(found.predictions) == 1
    assert found.agreement(other) == pytest.approx(8 / 11)


def test_last_and_best_are_measured_each(model, images, labels, tiny):
    other = tiny().build()
    data = batches(images, labels, 6, 5)

    figures, predictions, *_ = measure_both(model, other, data, CPU, torch.zeros(11, dtype=torch.long))

    last, best = evaluate(model, data, CPU), evaluate(other, data, CPU)
    assert figures == {
        "test/acc_last": last.accuracy,
        "test/acc_best": best.accuracy,
        "test/loss": last.loss,
        "test/loss_best": best.loss,
        "test/f1_macro": last.metrics()["f1_macro"],
        "test/f1_macro_best": best.metrics()["f1_macro"],
        "test/ece": last.metrics()["ece"],
        "test/ece_best": best.metrics()["ece"],
        "test/teacher_agreement": (last.predictions == 0).double().mean().item(),
        "test/teacher_agreement_best": (best.predictions == 0).double().mean().item(),
    }
    assert predictions.keys() == {"last", "best", "teacher"}


def test_without_a_teacher_there_is_no_agreement(model, images, labels):
    figures, predictions, *_ = measure_both(model, model, batches(images, labels, 11), CPU, None)

    assert figures.keys() == FIGURES
    assert predictions.keys() == {"last", "best"}


@pytest.fixture
def two_headed(tiny):
    return tiny(distillation_token=True).build()


@pytest.mark.parametrize("sizes", [(11,), (4, 7)], ids=str)
def test_each_head_is_measured_by_itself(sizes, two_headed, images):
    """One says 0, the other 1, and both together 2."""
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 3])
    with torch.no_grad():
        two_headed.head.bias.copy_(torch.tensor([1000.0, 0, 900, 0, 0]))
        two_headed.distillation_head.bias.copy_(torch.tensor([0, 1000.0, 900, 0, 0]))

    found = evaluate(two_headed, batches(images, labels, *sizes), CPU)

    assert dict(found.by_head) == {"class_token": 5 / 11, "distillation_token": 3 / 11}
    assert found.accuracy == 1 / 11
    assert found.predictions.tolist() == [2] * 11


def test_a_model_with_one_head_has_no_such_figures(model, images, labels):
    assert evaluate(model, batches(images, labels, 11), CPU).by_head == {}


def test_the_heads_of_last_and_best_are_kept_apart(two_headed, tiny, images, labels):
    best, data = tiny(distillation_token=True).build(), batches(images, labels, 6, 5)

    figures, predictions, *_ = measure_both(two_headed, best, data, CPU, None)

    heads = {
        f"test/acc_{epoch}_{token}": value
        for epoch, each in (("last", two_headed), ("best", best))
        for token, value in evaluate(each, data, CPU).by_head.items()
    }
    assert len(heads) == 4
    assert heads.items() <= figures.items()
    assert figures.keys() - heads.keys() == FIGURES
    assert predictions.keys() == {"last", "best"}
