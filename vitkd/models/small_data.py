"""What a ViT needs for small data sets (Lee, Lee and Song 2021, arXiv 2112.13492).

Shapes: S stacked students (absent for one model), B batch, C channels, T tokens, H heads, D embed_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models.layers import Attention, LayerNorm, Linear


class ShiftedPatchTokenization(nn.Module):
    """Images [*S, B, C, H, W] to patch tokens [*S, B, T, D], each of which sees its neighbourhood.

    Section 3.1: a token is a linear map of the normalised pixels of one patch, in the image and in its four
    diagonal shifts by half a patch.
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


class LocalityAttention(Attention):
    """Attention of a learned temperature, in which no token sees itself (section 3.2): it looks at others.

    Scores are QKᵀ/τ with a τ for each head (as the authors' code has it) that starts at √head_dim. Those of a
    token with itself are masked before the softmax. Training moves log(τ/√head_dim), so τ stays positive and
    weight decay draws it to the usual temperature.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__(dim, num_heads, head_dim, dropout, qkv_bias)
        self.log_temperature = nn.Parameter(torch.zeros(num_heads))

    def inverse_temperature(self) -> Tensor:
        return (-self.log_temperature).exp()

    @staticmethod
    def allowed(tokens: int, device: torch.device | None = None) -> Tensor:
        return ~torch.eye(tokens, dtype=torch.bool, device=device)
