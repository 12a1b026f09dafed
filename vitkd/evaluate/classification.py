"""What torchmetrics says of a classifier's answers, and where it is right: by class, and by confidence.

torchmetrics is imported when something is measured.

Shapes: N images, C classes, B bins of confidence.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

TOP = 5
"""The guesses of top-5 accuracy."""
BINS = 15
"""Of equal width, from 0 to 1, as in Guo et al. 2017."""
DIGITS = 7
"""Of what torchmetrics computes in float32."""


def top_accuracy(classes: int) -> "Metric | None":
    """Measures, by batches of logits [N, C] and labels [N], how often the label is among the `TOP` likeliest.

    None where that says nothing: there are no more than `TOP` classes.
    """
    from torchmetrics.classification import MulticlassAccuracy

    if classes <= TOP:
        return None
    # One process measures; to sync with the others would wait for them forever.
    settings: dict[str, Any] = {"validate_args": False, "sync_on_compute": False}
    return MulticlassAccuracy(classes, top_k=TOP, average="micro", **settings)


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images [C, C] of each class (rows) were predicted as each class (columns)."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(predictions, labels, classes, validate_args=False)


def macro_f1(predictions: Tensor, labels: Tensor, classes: int) -> float:
    """The mean F1 of the classes that occur among `predictions` [N] or `labels` [N]."""
    from torchmetrics.functional.classification import multiclass_f1_score

    score = multiclass_f1_score(predictions, labels, classes, average="macro", validate_args=False)
    return round(score.item(), DIGITS)


def calibration_error(confidences: Tensor, correct: Tensor) -> float:
    """The expected calibration error, Σ_bins (share of images) · |accuracy − mean confidence|.

    Guo et al. 2017, equation 3.

    Args:
        confidences: [N] the probability of the predicted class, in 0..1.
        correct: [N] bool.

    NaN if any confidence is.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    if not confidences.isfinite().all():
        return math.nan  # torchmetrics would take all of them for logits
    # Whether a prediction is right is a binary event of that probability. torchmetrics has a bin of its own
    # for 1; here, as in the paper, the last bin ends with it.
    below_one = confidences.double().clamp(max=math.nextafter(1, 0))
    error = binary_calibration_error(below_one, correct.long(), BINS, norm="l1", validate_args=False)
    return error.item()


def reliability(confidences: Tensor, correct: Tensor) -> dict[str, list[Any]]:
    """The bins of `calibration_error`, [B] each: images, and their mean confidence and accuracy or None.

    An image whose confidence is NaN is in no bin.
    """
    finite = confidences.isfinite()
    confidences, correct = confidences[finite].double(), correct[finite].double()
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(confidences, edges[1:-1], right=True)
    images = torch.bincount(bins, minlength=BINS)
    sums = [torch.bincount(bins, values, minlength=BINS) for values in (confidences, correct)]
    confidence, accuracy = ((total / images).tolist() for total in sums)
    return {"images": images.tolist(), "confidence": known(confidence), "accuracy": known(accuracy)}


def class_accuracy(confusion: Tensor) -> list[float | None]:
    """The share of each class's images that were predicted as it, [C]; None for a class without images."""
    # torchmetrics gives an absent class 0, as if all of its images were missed.
    return known((confusion.diagonal() / confusion.sum(1).double()).tolist())


def known(values: Sequence[float]) -> list[float | None]:
    """The values, None for what is not a number."""
    return [None if math.isnan(value) else value for value in values]
