"""The final metrics on a split: every image once, in a fixed order, in float32.

Shapes: N images, C classes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.evaluate.classification import (
    DIGITS,
    calibration_error,
    class_accuracy,
    confusion_matrix,
    macro_f1,
    reliability,
    top_accuracy,
)
from vitkd.models import Model


class Evaluation(NamedTuple):
    """How a model does on N images of C classes. Tensors are on the CPU, in the split's order."""

    loss: float
    """mean cross-entropy in nats"""
    labels: Tensor
    """[N] int64"""
    predictions: Tensor
    """[N] int64"""
    confidences: Tensor
    """[N] the probability of the predicted class"""
    classes: int
    top5: float | None
    """share of images whose class is among the five likeliest; None for five classes or fewer"""
    by_head: Mapping[str, float]
    """the accuracy of each head by itself, where the model has one for each of two tokens"""

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly; in float64, unlike torchmetrics'."""
        return self.agreement(self.labels)

    @property
    def confusion(self) -> Tensor:
        """How many images [C, C] of each class (rows) were predicted as each class (columns)."""
        return confusion_matrix(self.predictions, self.labels, self.classes)

    def agreement(self, other: Tensor) -> float:
        """The share of images on which the predictions equal `other` [N]."""
        return (self.predictions == other).double().mean().item()

    def metrics(self) -> dict[str, float]:
        """What is measured besides the accuracy."""
        top5 = {} if self.top5 is None else {"acc_top5": self.top5}
        return {
            "loss": self.loss,
            **top5,
            "f1_macro": macro_f1(self.predictions, self.labels, self.classes),
            "ece": calibration_error(self.confidences, self.predictions == self.labels),
        }

    def details(self) -> dict[str, Any]:
        """The accuracy of each class [C], and of the images of each bin of confidence."""
        bins = reliability(self.confidences, self.predictions == self.labels)
        return {"class_accuracy": class_accuracy(self.confusion), "confidence_bins": bins}


@torch.inference_mode()
def evaluate(model: Model, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Evaluate `model` on all `batches`, which lie on `device`; the model is moved there and back."""
    home, classes = next(model.parameters()).device, model.config.num_classes
    model = model.to(device).eval()
    top5 = top_accuracy(classes)
    found: dict[str, list[Tensor]] = defaultdict(list)
    hits: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        output = model(batch.image)
        for head, logits in output.heads.items():
            hits[head].append(logits.argmax(-1) == batch.label)
        for name, values in per_image(output.logits, batch.label).items():
            found[name].append(values)
        if top5 is not None:
            top5.to(device).update(output.logits, batch.label)
    model.to(home)
    # float64 on the CPU: the same mean whatever the device, and MPS has no float64.
    means = {head: torch.cat(parts).cpu().double().mean().item() for head, parts in hits.items()}
    whole = {name: torch.cat(parts).cpu() for name, parts in found.items()}
    loss = whole.pop("losses").double().mean().item()
    share = None if top5 is None else round(top5.compute().item(), DIGITS)
    return Evaluation(loss=loss, **whole, classes=classes, top5=share, by_head=means)


def per_image(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """What is kept of a batch's logits [B, C] and labels [B], [B] each."""
    return {
        "losses": F.cross_entropy(logits, label, reduction="none"),
        "labels": label,
        "predictions": logits.argmax(-1),
        "confidences": logits.softmax(-1).amax(-1),
    }


class Measured(NamedTuple):
    """What is known of a trained student on the test split."""

    metrics: dict[str, float]
    """of `metrics.json`; without a suffix it is the last epoch's"""
    predictions: dict[str, Tensor]
    """every model's [N]"""
    last: Evaluation
    best: Evaluation

    def details(self, class_names: Sequence[str]) -> dict[str, Any]:
        """What `test_details.json` holds, of classes with these names."""
        images = torch.bincount(self.last.labels, minlength=self.last.classes).tolist()
        epochs = {"last": self.last.details(), "best": self.best.details()}
        return {"class_names": [*class_names], "class_images": images, **epochs}


def measure_both(
    last: Model, best: Model, batches: Iterable[Batch], device: torch.device, teacher: Tensor | None
) -> Measured:
    """The student after its last and its best epoch, on the test split.

    `teacher` holds the teacher's predictions [N]. A student with two heads predicts by their mean; each head
    is measured by itself, too.
    """
    at_last = evaluate(last, batches, device)
    at_best = at_last if best is last else evaluate(best, batches, device)
    epochs = {"last": at_last, "best": at_best}
    metrics = {f"test/acc_{epoch}": measured.accuracy for epoch, measured in epochs.items()}
    others = zip(at_last.metrics().items(), at_best.metrics().values(), strict=True)
    for (name, value), value_best in others:
        metrics |= {f"test/{name}": value, f"test/{name}_best": value_best}
    for epoch, measured in epochs.items():
        metrics |= {f"test/acc_{epoch}_{head}": value for head, value in measured.by_head.items()}
    predictions = {epoch: measured.predictions for epoch, measured in epochs.items()}
    if teacher is not None:
        metrics["test/teacher_agreement"] = at_last.agreement(teacher)
        metrics["test/teacher_agreement_best"] = at_best.agreement(teacher)
        predictions["teacher"] = teacher
    return Measured(metrics, predictions, at_last, at_best)
