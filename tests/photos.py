"""Images to train on where nobody cares what they show."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise_photos(root: Path, of_each_class: int, size: int) -> Path:
    """Colourful noise as square PNG files, in the folders of two classes below `root`."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(of_each_class):
            pixels = random.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
