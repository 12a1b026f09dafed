"""Control arms: what a student is taught in place of its teacher's maps, to see whether these are what helps.

Shapes: U data orders (absent for one), B images, H heads, T tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def shuffled(scores: Tensor) -> Tensor:
    """To each image the maps of its neighbour in the batch.

    The teacher's patterns without what they have to do with the image. Training draws the batches anew in
    every epoch, so an image gets other maps each time.
    """
    return scores.roll(1, dims=-4)


def uniform(scores: Tensor) -> Tensor:
    """Attention to all tokens alike: smoothing, and nothing of the teacher."""
    return torch.zeros_like(scores)


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {"shuffled": shuffled, "uniform": uniform}
"""name → what it makes of scores [*U, B, H, T, T], or of either of their factors [*U, B, H, T, head_dim]"""
