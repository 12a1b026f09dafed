"""A finished run's figures and files: written once by `train`, computed again by `evaluate`."""

import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkd.data import Batch
from vitkd.distill.pairing import BlockPair
from vitkd.errors import ConfigError
from vitkd.models import Model
from vitkd.runs.evaluation import evaluate
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder


def measure(
    last: Model, best: Model, batches: Iterable[Batch], device: torch.device, teacher: Tensor | None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The test figures of the last and the best epoch, and every model's predictions [N].

    `teacher` holds the teacher's predictions [N]. Without a suffix a figure is the last epoch's. A student
    with two heads answers by their mean; each is measured by itself, too.
    """
    at_last = evaluate(last, batches, device)
    at_best = at_last if best is last else evaluate(best, batches, device)
    figures = {
        "test/acc_last": at_last.accuracy,
        "test/acc_best": at_best.accuracy,
        "test/loss": at_last.loss,
        "test/loss_best": at_best.loss,
    }
    for epoch, measured in (("last", at_last), ("best", at_best)):
        figures |= {f"test/acc_{epoch}_{token}": value for token, value in measured.of_tokens.items()}
    predictions = {"last": at_last.predictions, "best": at_best.predictions}
    if teacher is not None:
        figures["test/teacher_agreement"] = at_last.agreement(teacher)
        figures["test/teacher_agreement_best"] = at_best.agreement(teacher)
        predictions["teacher"] = teacher
    return figures, predictions


def write_predictions(folder: RunFolder, predictions: Mapping[str, Tensor]) -> None:
    """Keep each model's class for every test image, in the split's order."""
    arrays: dict[str, Any] = {name: classes.to(torch.int32).numpy() for name, classes in predictions.items()}
    np.savez_compressed(folder.predictions, **arrays)


def read_teacher_predictions(folder: RunFolder) -> Tensor | None:
    """The teacher's class for every test image, or None for a run without a teacher."""
    try:
        with folder.predictions.open("rb") as file, np.load(file, allow_pickle=False) as predictions:
            return torch.from_numpy(predictions["teacher"]).long() if "teacher" in predictions else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{folder.predictions}: cannot be read; has the run finished?") from error


def write_pairs(folder: RunFolder, pairs: Sequence[BlockPair]) -> None:
    """Keep which student map learned from which teacher maps, as settled for this run."""
    write_atomically(folder.pairs, json.dumps([asdict(pair) for pair in pairs], indent=2) + "\n")
