"""The data set that is always there."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from vitkd.data.spec import Dataset
from vitkd.data.split import Split, hold_out

_TEST_FRACTION = 0.2
_TEST_SEED = 0


@dataclass(kw_only=True)
class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels; a fixed, stratified fifth is the test split."""

    def load(self, root: Path) -> dict[str, Split]:
        digits = load_digits()
        # Its pixels count the dark dots of a 4×4 cell, 0 to 16.
        images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target).long()
        names = [str(name) for name in digits.target_names]
        whole = Split(labels, names, images)
        train, test = hold_out(labels, whole.lots(_TEST_SEED), _TEST_FRACTION)
        parts = {"train": train, "test": test}
        return {name: self._checked(Split(labels[at], names, images[at])) for name, at in parts.items()}
