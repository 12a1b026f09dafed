"""The final metrics on a split: every image once, in a fixed order, in float32."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd.data import Batch
from vitkd.models import Model


class Evaluation(NamedTuple):
    """How a model does on N images."""

    accuracy: float
    """share of images classified correctly"""
    loss: float
    """mean cross-entropy in nats"""
    predictions: Tensor
    """[N] int64 on the CPU, in the split's order"""
    by_head: Mapping[str, float]
    """the accuracy of each head by itself, where the model has one for each of two tokens"""

    def agreement(self, other: Tensor) -> float:
        """The share of images on which the predictions equal `other` [N]."""
        return (self.predictions == other).double().mean().item()


@torch.inference_mode()
def evaluate(model: Model, batches: Iterable[Batch], device: torch.device) -> Evaluation:
    """Evaluate `model` on all `batches`, which lie on `device`; the model is moved there and back."""
    home = next(model.parameters()).device
    model = model.to(device).eval()
    losses, predictions, labels = [], [], []
    hits: dict[str, list[Tensor]] = defaultdict(list)
    for batch in batches:
        output = model(batch.image)
        logits = output.logits
        for head, of_head in output.heads.items():
            hits[head].append(of_head.argmax(-1) == batch.label)
        losses.append(F.cross_entropy(logits, batch.label, reduction="none"))
        predictions.append(logits.argmax(-1))
        labels.append(batch.label)
    model.to(home)
    predicted, true = torch.cat(predictions).cpu(), torch.cat(labels).cpu()
    # float64 on the CPU: the same sum whatever the device, and MPS has no float64.
    loss = torch.cat(losses).cpu().double().mean().item()
    by_head = {head: torch.cat(found).cpu().double().mean().item() for head, found in hits.items()}
    return Evaluation((predicted == true).double().mean().item(), loss, predicted, by_head)


def measure_both(
    last: Model, best: Model, batches: Iterable[Batch], device: torch.device, teacher: Tensor | None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The test metrics of the last and the best epoch, and every model's predictions [N].

    `teacher` holds the teacher's predictions [N]. A metric without a suffix is the last epoch's. A student
    with two heads predicts by their mean; each head is measured by itself, too.
    """
    at_last = evaluate(last, batches, device)
    at_best = at_last if best is last else evaluate(best, batches, device)
    metrics = {
        "test/acc_last": at_last.accuracy,
        "test/acc_best": at_best.accuracy,
        "test/loss": at_last.loss,
        "test/loss_best": at_best.loss,
    }
    for epoch, measured in (("last", at_last), ("best", at_best)):
        metrics |= {f"test/acc_{epoch}_{head}": value for head, value in measured.by_head.items()}
    predictions = {"last": at_last.predictions, "best": at_best.predictions}
    if teacher is not None:
        metrics["test/teacher_agreement"] = at_last.agreement(teacher)
        metrics["test/teacher_agreement_best"] = at_best.agreement(teacher)
        predictions["teacher"] = teacher
    return metrics, predictions
