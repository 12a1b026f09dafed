"""First weights of attention that look like trained ones (Trockman and Kolter 2023, arXiv 2305.09828).

The products of a trained ViT's attention have a diagonal: that of queries and keys a positive one, that of
values and output projection a negative one. So a new ViT begins with

    W_Q W_Kᵀ ≈ 0.7 Z + 0.7 I in each head,   W_V W_out ≈ 0.4 Z − 0.4 I over all heads,

where Z [D, D] is another matrix of N(0, 1/D) each time, and with sinusoidal positions, which are trained on.
The factors come from a singular value decomposition U S Vᵀ = (U √S)(√S Vᵀ), of which a head takes its
head_dim largest components. Where the inner width exceeds D, which the paper's never does, a random rotation
spreads all D components over it.

Shapes: D embed_dim, T tokens, H heads.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitkd.errors import ConfigError
from vitkd.models.output import AttentionLayout

QUERY_KEY = (0.7, 0.7)
VALUE_OUT = (0.4, -0.4)
WAVELENGTHS = 10_000.0


@torch.no_grad()
def make_mimetic(
    layers: Iterable[tuple[nn.Linear, nn.Linear]], positions: Tensor, layout: AttentionLayout
) -> None:
    """Give these weights their first values, from PyTorch's global generator; biases stay.

    Args:
        layers: of each block the one to queries, keys and values, [3·H·head_dim, D], and the one out of them,
            [D, H·head_dim].
        positions: [1, T, D], in which other tokens may stand before the patches.
        layout: of every block.

    Raises ConfigError if D is no multiple of 4.
    """
    dim = positions.shape[-1]
    patches = sinusoidal(layout.grid, dim)
    positions.zero_()
    positions[0, -len(patches) :] = patches
    for qkv, out in layers:
        queries, keys, values = qkv.weight.chunk(3)
        for query, key in zip(queries.chunk(layout.heads), keys.chunk(layout.heads), strict=True):
            left, right = factors(near_identity(dim, *QUERY_KEY), layout.head_dim)
            query.copy_(left.mT)
            key.copy_(right)
        left, right = factors(near_identity(dim, *VALUE_OUT), layout.heads * layout.head_dim)
        values.copy_(left.mT)
        out.weight.copy_(right.mT)


def near_identity(dim: int, noise: float, diagonal: float) -> Tensor:
    """noise · Z + diagonal · I [dim, dim], with Z of N(0, 1/dim)."""
    return noise * torch.randn(dim, dim) / dim**0.5 + diagonal * torch.eye(dim)


def factors(product: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[D, width] and [width, D] whose product is the nearest to `product` [D, D]; equal if width ≥ D."""
    u, s, vt = torch.linalg.svd(product)
    rank = min(width, len(s))
    root = s[:rank].sqrt()
    left, right = u[:, :rank] * root, root[:, None] * vt[:rank]
    if width == rank:
        return left, right
    # Zeros instead would stay: each factor's gradient is a multiple of the other.
    rotation, _ = torch.linalg.qr(torch.randn(width, rank))
    return left @ rotation.mT, rotation @ right


def sinusoidal(grid: tuple[int, int], dim: int) -> Tensor:
    """Positions of patches [rows · columns, dim]: a quarter each of sines and cosines of column and row.

    As MoCo v3's (Chen, Xie and He 2021). Raises ConfigError if `dim` is no multiple of 4.
    """
    if dim % 4:
        raise ConfigError(f"init=mimetic: its positions need a width that 4 divides, and embed_dim={dim}")
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    frequencies = WAVELENGTHS ** -(torch.arange(dim // 4) / (dim // 4))
    angles = [axis[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
