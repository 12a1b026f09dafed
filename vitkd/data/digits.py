"""The data set that needs no download."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from vitkd.data.spec import Dataset
from vitkd.data.split import Split, hold_out

_TEST_FRACTION = 0.2
_TEST_SEED = 0


@dataclass(kw_only=True)
class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits, 8×8 pixels; a fixed, stratified fifth is the test split."""

    def load(self, root: Path) -> dict[str, Split]:
        table = read_table()
        # A pixel counts the dark dots in a 4×4 cell: 0 to 16.
        images = torch.from_numpy(np.round(table[:, :-1] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
        labels = torch.from_numpy(table[:, -1].astype(np.int64))
        names = [str(digit) for digit in range(10)]
        order = Split(labels, names, images).random_keys(_TEST_SEED)
        train, test = hold_out(labels, order, _TEST_FRACTION)
        splits = {"train": train, "test": test}.items()
        return {name: self._checked(Split(labels[i], names, images[i])) for name, i in splits}


def read_table() -> np.ndarray:
    """scikit-learn's file as uint8 [1797, 65]: 64 pixels, then the label."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None, "scikit-learn is a dependency"
    # scikit-learn's `load_digits` reads the same file, but importing it takes most of a second.
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    return np.loadtxt(file, delimiter=",", dtype=np.uint8)
