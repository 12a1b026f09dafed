"""Locality self-attention (Lee, Lee and Song 2021, arXiv 2112.13492, section 3.2).

Shapes: S stacked students (absent for one model), B batch, T tokens, H heads.
"""

import torch
from torch import Tensor, nn

from vitkd.models.layers import Attention


class LocalityAttention(Attention):
    """Attention of a learned temperature, in which no token sees itself: it has to look at others.

    Scores are QKᵀ/τ with a τ for each head (as the authors' code has it) that starts at √head_dim. Those of a
    token with itself are masked before the softmax. Training moves log(τ/√head_dim), so τ stays positive and
    weight decay draws it to the usual temperature.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, dropout: float, qkv_bias: bool) -> None:
        super().__init__(dim, num_heads, head_dim, dropout, qkv_bias)
        self.log_temperature = nn.Parameter(torch.zeros(num_heads))

    def scale(self, q: Tensor) -> Tensor:
        # [*S, H] to [*S, 1, H, 1, 1].
        inverse = (-self.log_temperature).exp()[..., None, :, None, None]
        # Rounded once, not twice: 1/τ in bf16 would be off by up to 0.4 % for every token alike.
        return (q * inverse).to(q.dtype)

    @staticmethod
    def allowed(tokens: int, device: torch.device | None = None) -> Tensor:
        return ~torch.eye(tokens, dtype=torch.bool, device=device)
