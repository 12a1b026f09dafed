"""Attention through all blocks: its rollout, and what of it speaks for a class, by the class's gradient.

Through windows, shifts and patch merging (Swin) both are products of sparse token matrices. Nobody has
published that, so the definition is ours. With A_l block l's attention and M a merging as `windows` has them,

    r = 1ᵀ/T · F_L ⋯ M ⋯ F_1        F_l = (Ā_l + I)/2 of rollout, I + mean_h((∇A_l ⊙ A_l)⁺) of relevance,

an M wherever patches are merged between two blocks. A merging has no residual connection, so no I is added to
it, and no gradient weighs it. In a single window, without mergings, r is the mean row of the ViT's matrix.

Shapes: B images, H heads, T tokens with the class token first, K classes; of windows R rows, W windows of N
tokens each, h × w patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import Fusion, fuse, scaled
from vitkd.explain.maps.recording import Recording
from vitkd.explain.maps.windows import Windows, identity, pooling_row, received, times, unmerged
from vitkd.models.output import at_least_float32


def attention_gradients(recording: Recording, target: Tensor) -> tuple[Tensor, ...]:
    """Per block [B, H, T, T]: image b's logit of class target[b] by the weights of image b.

    The recording keeps its graph, so that another target can be asked for.

    Args:
        target: [B] class indices.

    Raises:
        ConfigError: a class that does not exist, or a recording made without gradients.
    """
    count, classes = recording.logits.shape
    assert target.shape == (count,), f"{[*target.shape]} classes for {count} images"
    check_classes(target, classes)
    if not recording.logits.requires_grad:
        raise ConfigError("the recording has no gradients: record outside torch.no_grad")
    # An image's weights reach its own logits only, so one backward pass serves the whole batch.
    chosen = recording.logits.gather(1, target[:, None]).sum()
    return torch.autograd.grad(chosen, recording.weights, retain_graph=True)


def check_classes(target: Tensor, classes: int) -> None:
    """Raise ConfigError unless all of `target` lie in 0 to classes − 1."""
    for wrong in target[(target < 0) | (target >= classes)][:1].tolist():
        raise ConfigError(f"class {wrong}: the model has classes 0 to {classes - 1}")


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
    if not 0 <= discard < 1:
        raise ConfigError(f"discard={discard}: must lie in [0, 1)")
    if not 0 <= start_block < len(weights):
        raise ConfigError(f"start_block={start_block}: must be 0 to {len(weights) - 1}")
    fused = [fuse(each, fusion) for each in weights[start_block:]]
    identity = torch.eye(fused[0].shape[-1], dtype=fused[0].dtype, device=fused[0].device)
    flow = identity.expand_as(fused[0])
    for each in fused:
        with_residual = _discard_lowest(each, discard, keep) + identity
        flow = with_residual / with_residual.sum(-1, keepdim=True) @ flow
    return flow


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
        gradients: the class's logit by `weights`, as `attention_gradients` gives it.
        discard, start_block, keep: as for `rollout`.
    """
    fused = [weighted_by_gradient(a, g)[:, None] for a, g in zip(weights, gradients, strict=True)]
    return rollout(fused, discard=discard, start_block=start_block, keep=keep)


def weighted_by_gradient(weights: Tensor, gradient: Tensor) -> Tensor:
    """Ā = mean_h((A ⊙ ∇A)⁺) [B, T, T] of one block's [B, H, T, T] (Chefer et al. 2021, equation 5)."""
    return (at_least_float32(weights) * at_least_float32(gradient)).clamp_min(0).mean(1)


def relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Class-specific relevance R [B, T, T] (Chefer et al. 2021, equations 5 and 6, for self-attention).

    R = I, then per block R ← R + mean_h((∇A ⊙ A)⁺) R.

    Args:
        weights: per block [B, H, T, T].
        gradients: the class's logit by `weights`, as `attention_gradients` gives it.
    """
    first = at_least_float32(weights[0])
    r = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).repeat(len(first), 1, 1)
    for a, gradient in zip(weights, gradients, strict=True):
        r = r + weighted_by_gradient(a, gradient) @ r
    return r


def attention_grad_cam(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017) with the last block's heads as its channels [B, T, T].

    Each head weighs as much as the mean of its gradient; the weighted mean's positive part is returned.
    """
    a, gradient = at_least_float32(weights[-1]), at_least_float32(gradients[-1])
    return (gradient.mean((-2, -1), keepdim=True) * a).mean(1).clamp_min(0)


def windowed_rollout(
    weights: Sequence[Tensor], windows: Sequence[Windows], rows: Tensor | None = None
) -> Tensor:
    """Attention rollout through windows [B, h, w]: shares of the mean of the last tokens, which sum to 1.

    Args:
        weights: per block [B, H, W·N, N].
        windows: of every block.
        rows: [R, T] over the last block's tokens, to start from instead of their mean: I for every token's
            rollout. The maps are [B, R, h, w] then.
    """
    with_residual = (a + identity(place, a) for a, place in zip(map(fuse, weights), windows, strict=True))
    return _through([*map(scaled, with_residual)], windows, rows)


def windowed_gradient_rollout(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    windows: Sequence[Windows],
    rows: Tensor | None = None,
) -> Tensor:
    """`windowed_rollout` of Ā = mean_h((A ⊙ ∇A)⁺); `gradients` as for `gradient_rollout`."""
    fused = [weighted_by_gradient(a, g)[:, None] for a, g in zip(weights, gradients, strict=True)]
    return windowed_rollout(fused, windows, rows)


def windowed_relevance(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    windows: Sequence[Windows],
    rows: Tensor | None = None,
) -> Tensor:
    """Class-specific relevance through windows [B, h, w]; `gradients` as for `relevance`, `rows` as above."""
    speaks = map(weighted_by_gradient, weights, gradients)
    steps = [a + identity(place, a) for a, place in zip(speaks, windows, strict=True)]
    return _through(steps, windows, rows)


def windowed_grad_cam(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], windows: Sequence[Windows]
) -> Tensor:
    """`attention_grad_cam` within windows [B, h, w]: what each patch receives of the last block's."""
    return received(attention_grad_cam(weights, gradients), windows)


def _through(factors: Sequence[Tensor], windows: Sequence[Windows], rows: Tensor | None) -> Tensor:
    """rows · F_L ⋯ M ⋯ F_1 as maps [B, R, h, w], of factors [B, W·N, N]; of the mean row, [B, h, w]."""
    grid = windows[-1].grid
    flow = pooling_row(windows[-1], factors[-1]) if rows is None else rows
    flow = flow.expand(len(factors[-1]), -1, -1)
    for factor, place in zip(reversed(factors), reversed(windows), strict=True):
        flow, grid = times(unmerged(flow, grid, place.grid), factor, place), place.grid
    maps = flow.unflatten(-1, windows[0].grid)
    return maps if rows is not None else maps.squeeze(1)


def _discard_lowest(fused: Tensor, share: float, keep: Sequence[int]) -> Tensor:
    """[B, T, T] with the lowest ⌊share·T²⌋ entries of each image zero, but for those of tokens to keep."""
    entries = fused.flatten(1)
    lowest = entries.topk(int(share * entries.shape[1]), largest=False).indices
    drop = torch.zeros_like(entries, dtype=torch.bool).scatter(1, lowest, True).view_as(fused)
    drop[:, [*keep], :] = drop[:, :, [*keep]] = False
    return fused.masked_fill(drop, 0)
