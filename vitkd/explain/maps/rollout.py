"""Attention rollout: how attention flows through all blocks, residual connections included.

Shapes: B images, H heads, T tokens with the class token first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import Fusion, fuse
from vitkd.models.output import at_least_float32


def rollout(
    weights: Sequence[Tensor],
    *,
    fusion: Fusion = "mean",
    discard: float = 0.0,
    start_block: int = 0,
    keep: Sequence[int] = (0,),
) -> Tensor:
    """Attention rollout [B, T, T] (Abnar & Zuidema 2020): Â_L ⋯ Â_start with Â = (Ā + I)/row sum.

    Args:
        weights: per block [B, H, T, T].
        fusion: how heads become Ā.
        discard: the share of each Ā's entries, the lowest, that is set to zero first.
        start_block: the lowest block that counts.
        keep: tokens whose row and column are not discarded, whatever is in them: the class token, and the
            distillation token where there is one.

    Raises:
        ConfigError: a share outside [0, 1), or no such block or fusion.
    """
    _check(discard, start_block, len(weights))
    return _product([_discard_lowest(fuse(each, fusion), discard, keep) for each in weights[start_block:]])


def gradient_rollout(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    discard: float = 0.0,
    start_block: int = 0,
    keep: Sequence[int] = (0,),
) -> Tensor:
    """Rollout [B, T, T] of Ā = mean_h((A ⊙ ∇A)⁺), so of what speaks for the class that ∇ is of.

    Args:
        weights: per block [B, H, T, T].
        gradients: the class's logit by `weights`, as `relevance.attention_gradients` gives it.
        discard, start_block, keep: as for `rollout`.
    """
    _check(discard, start_block, len(weights))
    fused = [weighted_by_gradient(a, g) for a, g in zip(weights, gradients, strict=True)]
    return _product([_discard_lowest(each, discard, keep) for each in fused[start_block:]])


def weighted_by_gradient(weights: Tensor, gradient: Tensor) -> Tensor:
    """Ā = mean_h((A ⊙ ∇A)⁺) [B, T, T] of one block's [B, H, T, T] (Chefer et al. 2021, equation 5)."""
    return (at_least_float32(weights) * at_least_float32(gradient)).clamp_min(0).mean(1)


def _check(discard: float, start_block: int, blocks: int) -> None:
    if not 0 <= discard < 1:
        raise ConfigError(f"discard={discard}: must lie in [0, 1)")
    if not 0 <= start_block < blocks:
        raise ConfigError(f"start_block={start_block}: must be 0 to {blocks - 1}")


def _discard_lowest(fused: Tensor, share: float, keep: Sequence[int]) -> Tensor:
    """[B, T, T] with the lowest ⌊share·T²⌋ entries of each image zero, but for those of tokens to keep."""
    entries = fused.flatten(1)
    lowest = entries.topk(int(share * entries.shape[1]), largest=False).indices
    drop = torch.zeros_like(entries, dtype=torch.bool).scatter(1, lowest, True).view_as(fused)
    drop[:, [*keep], :] = drop[:, :, [*keep]] = False
    return fused.masked_fill(drop, 0)


def _product(fused: Sequence[Tensor]) -> Tensor:
    """Â_L ⋯ Â_1, each half Ā and half the residual connection."""
    identity = torch.eye(fused[0].shape[-1], dtype=fused[0].dtype, device=fused[0].device)
    flow = identity.expand_as(fused[0])
    for each in fused:
        with_residual = each + identity
        flow = with_residual / with_residual.sum(-1, keepdim=True) @ flow
    return flow
