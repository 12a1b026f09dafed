"""A model together with how its images are normalised.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitkd.models import Model

Classify = Callable[[Tensor], Tensor]
"""images [B, C, H, W] in 0..1 → logits [B, K]"""


class Classifier(nn.Module):
    """What is exported: images [B, C, H, W] float32 in 0..1 to logits [B, K]."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std).answer

    @property
    def size(self) -> tuple[int, int, int]:
        """An image's C, H and W."""
        config = self.model.config
        return config.channels, config.image_size, config.image_size

    @property
    def num_bytes(self) -> int:
        """What its weights take."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())
