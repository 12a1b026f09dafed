"""Shifted patch tokenisation (Lee, Lee and Song 2021, arXiv 2112.13492, section 3.1).

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens, D embed_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models.layers import LayerNorm, Linear


class ShiftedPatchTokenization(nn.Module):
    """Images [*S, B, C, H, W] to patch tokens [*S, B, T, D], each of which sees its neighbourhood.

    A token is a linear map of the normalised pixels of one patch, in the image and in its four diagonal
    shifts by half a patch.
    """

    def __init__(self, channels: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        pixels = 5 * channels * patch_size**2
        self.norm = LayerNorm(pixels)
        self.projection = Linear(pixels, dim)

    def forward(self, images: Tensor) -> Tensor:
        shifted = shifted_diagonally(images, self.patch_size // 2)
        patches = F.pixel_unshuffle(shifted, self.patch_size).flatten(-2).mT
        return self.projection(self.norm(patches))


def shifted_diagonally(images: Tensor, by: int) -> Tensor:
    """Images [..., C, H, W] beside their four diagonal shifts by so many pixels, [..., 5·C, H, W].

    First the image itself; then, at pixel (y, x), what is at (y ∓ by, x ∓ by), 0 outside the image: to the
    upper left, the upper right, the lower left and the lower right.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (by, by, by, by))
    views = [padded[..., y : y + height, x : x + width] for y in (0, 2 * by) for x in (0, 2 * by)]
    return torch.cat([images, *views], dim=-3)
