"""A finished run's predictions and distilled pairs."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.maps.granularity import BlockPair
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder


def write_predictions(folder: RunFolder, predictions: Mapping[str, Tensor]) -> None:
    """Write each model's predicted class [N] for every test image, in the split's order."""
    arrays: dict[str, Any] = {name: classes.to(torch.int32).numpy() for name, classes in predictions.items()}
    np.savez_compressed(folder.predictions, **arrays)


def read_teacher_predictions(folder: RunFolder) -> Tensor | None:
    """The teacher's predicted class [N] for every test image, or None for a run without a teacher.

    Raises ConfigError if the file cannot be read.
    """
    try:
        with folder.predictions.open("rb") as file, np.load(file, allow_pickle=False) as predictions:
            return torch.from_numpy(predictions["teacher"]).long() if "teacher" in predictions else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{folder.predictions}: cannot be read; has the run finished?") from error


def write_pairs(folder: RunFolder, pairs: Sequence[BlockPair]) -> None:
    """Write which student map learned from which teacher maps."""
    write_atomically(folder.pairs, json.dumps([asdict(pair) for pair in pairs], indent=2) + "\n")
