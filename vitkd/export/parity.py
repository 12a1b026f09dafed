"""Whether an exported file answers as the model does in PyTorch.

Shapes: B images, C channels, H × W pixels.
"""

import torch
from torch import Tensor

from vitkd.data.levels import normalise
from vitkd.errors import RunError
from vitkd.export.classifier import Classifier, Classify

TOLERANCE = 1e-4
"""by which a logit may differ"""


@torch.inference_mode()
def check_parity(exported: Classify, classifier: Classifier, pixels: Tensor) -> float:
    """The largest difference of a logit of `pixels` [B, C, H, W] uint8, at the batch sizes 1 and B.

    The file normalises images by itself; the model is given them as in training.

    Raises RunError if it is above the tolerance.
    """
    mean, std = classifier.mean.flatten(), classifier.std.flatten()
    differences = []
    for batch in (pixels[:1], pixels):
        expected = classifier.model(normalise(batch, mean, std)).answer
        difference = (exported(batch / 255) - expected).abs().max().item()
        if not difference <= TOLERANCE:  # nor may it be no number
            raise RunError(
                f"logits of the exported student differ from PyTorch's by {difference:.1e} at batch size "
                f"{len(batch)}, more than {TOLERANCE:g}, so no file is left; choose another format or newer "
                "packages"
            )
        differences.append(difference)
    return max(differences)
