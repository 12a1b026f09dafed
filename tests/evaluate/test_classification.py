"""What torchmetrics measures equals scikit-learn's, and a formula in NumPy; odd answers are no error."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle

from vitkd.data import Batch
from vitkd.evaluate.classification import BINS, calibration_error, reliability
from vitkd.evaluate.measure import Evaluation, evaluate, measure_both
from vitkd.models.base import Model
from vitkd.models.output import Output

CPU = torch.device("cpu")


class Says(Model):
    """Answers with the logits that its images are."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.zeros(()))

    def forward(self, images, taps=None) -> Output:
        return Output(images.flatten(1), {}, {}, {}, {})


@pytest.fixture
def measured(tiny):
    """measured(logits [N, C], labels [N]) is the `Evaluation` of a model that answers so."""

    def measure(logits, labels, *sizes) -> Evaluation:
        says, places = Says(tiny(num_classes=logits.shape[1])), torch.arange(len(labels))
        parts = [each.split(sizes or (len(labels),)) for each in (logits, labels, places)]
        return evaluate(says, [Batch(*part) for part in zip(*parts, strict=True)], CPU)

    return measure


def answers(classes: int, images: int = 200, present: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than chance, and labels among the first `present` classes."""
    labels = torch.randint(0, present or classes, (images,))
    return 2 * torch.randn(images, classes) + 2 * torch.eye(classes)[labels], labels


@pytest.mark.parametrize(("classes", "present"), [(2, 2), (5, 5), (7, 7), (7, 4), (40, 20)], ids=str)
def test_equals_scikit_learns(classes, present, measured):
    logits, labels = answers(classes, present=present)

    found = measured(logits, labels)

    predictions = logits.argmax(-1)
    assert found.accuracy == oracle.accuracy_score(labels, predictions)
    f1 = oracle.f1_score(labels, predictions, average="macro")
    assert found.metrics()["f1_macro"] == pytest.approx(f1, abs=1e-6)
    every = [*range(classes)]
    assert found.confusion.tolist() == oracle.confusion_matrix(labels, predictions, labels=every).tolist()
    recalls = oracle.recall_score(labels, predictions, labels=every[:present], average=None)
    assert found.details()["class_accuracy"] == pytest.approx([*recalls, *[None] * (classes - present)])


@pytest.mark.parametrize("classes", [6, 7, 40])
def test_the_label_is_among_the_five_likeliest_as_often_as_scikit_learn_says(classes, measured):
    logits, labels = answers(classes)

    found = measured(logits, labels, 64, 64, 72).metrics()

    expected = oracle.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=[*range(classes)])
    assert found["acc_top5"] == pytest.approx(expected, abs=1e-6)


def ece(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Guo et al. 2017, equation 3, in float64."""
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    confidences, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    error = 0.0
    for members in (bins == b for b in range(BINS)):
        if members.any():
            error += members.mean() * abs(right[members].mean() - confidences[members].mean())
    return error


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_the_calibration_error_is_that_of_the_formula(classes, measured):
    logits, labels = answers(classes)

    found = measured(logits, labels)

    assert found.metrics()["ece"] == pytest.approx(ece(logits, labels), abs=1e-6)
    bins = found.details()["confidence_bins"]
    filled = [b for b in range(BINS) if bins["images"][b]]
    gaps = [bins["images"][b] / 200 * abs(bins["accuracy"][b] - bins["confidence"][b]) for b in filled]
    assert sum(gaps) == pytest.approx(found.metrics()["ece"], abs=1e-9)
    assert sum(bins["images"]) == 200
    assert all(b / BINS <= bins["confidence"][b] <= (b + 1) / BINS for b in filled)


def test_a_confidence_of_1_is_in_the_last_bin():
    """In a bin of its own its error would not make up for that of 0.99."""
    confidences, correct = torch.tensor([1.0, 0.96]), torch.tensor([False, True])

    assert calibration_error(confidences, correct) == pytest.approx(abs(0.5 - 0.98), abs=1e-7)
    assert reliability(confidences, correct)["images"] == [0] * (BINS - 1) + [2]


def test_small_logits_are_no_probabilities(measured):
    """Values in 0..1 would pass for probabilities if they were handed on as they are."""
    logits, labels = answers(5)
    logits = logits.sigmoid()

    assert measured(logits, labels).metrics()["ece"] == pytest.approx(ece(logits, labels), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 7])
def test_logits_that_are_all_equal(classes, measured):
    labels = torch.arange(classes).repeat(3)

    found = measured(torch.zeros(3 * classes, classes), labels)

    metrics = found.metrics()
    assert found.accuracy == 1 / classes
    assert metrics["ece"] == pytest.approx(0, abs=1e-6)
    assert metrics["f1_macro"] == pytest.approx(
        oracle.f1_score(labels, found.predictions, average="macro"), abs=1e-6
    )
    # Whichever five a tie leaves, they are five of the classes.
    assert metrics.get("acc_top5", 5 / 7) == pytest.approx(5 / 7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_error(value, measured):
    logits, labels = answers(7, images=20)
    logits[3, 2] = value

    found = measured(logits, labels)

    assert math.isnan(found.metrics()["ece"])
    assert sum(found.details()["confidence_bins"]["images"]) == 19
    assert found.confusion.sum() == 20
    assert 0 <= found.metrics()["f1_macro"] <= 1


def test_logits_of_which_none_is_finite(measured):
    found = measured(torch.full((6, 6), math.nan), torch.arange(6))

    assert found.details()["confidence_bins"]["accuracy"] == [None] * BINS
    json.dumps(found.details(), allow_nan=False)


def test_batches_make_no_difference(measured):
    logits, labels = answers(9)

    whole, parts = measured(logits, labels), measured(logits, labels, 150, 49, 1)

    assert parts.metrics() == whole.metrics()
    assert parts.details() == whole.details()


def test_what_a_run_keeps_of_it(measured, tiny):
    images, labels = answers(6, present=5)
    last = Says(tiny(num_classes=6))

    found = measure_both(last, last, [Batch(images, labels, torch.arange(200))], CPU, None)

    details = found.details([*"abcdef"])
    assert details["class_names"] == [*"abcdef"]
    assert details["class_images"] == np.bincount(labels, minlength=6).tolist()
    assert details["last"] == details["best"] == found.last.details()
    assert found.metrics["test/acc_top5"] == found.metrics["test/acc_top5_best"]


def test_nothing_is_warned_of(measured):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(*answers(7, present=2)).details()
