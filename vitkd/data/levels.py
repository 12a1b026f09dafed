"""What the levels of pixels, 0..255, become for a model."""

import torch
from torch import Tensor


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """[B, C, H, W] in 0..255 → (pixels / 255 − mean) / std as float32; mean and std are [C]."""
    scale = 1 / (255 * std)
    return pixels.to(torch.float32).mul(scale[:, None, None]).sub_((mean / std)[:, None, None])
