"""A loss on attention maps of which only a few images' are in memory at a time.

Granularity `encoder` at 785 tokens would keep every block's T×T maps for the backward pass: the student's
scores, its softmax, the loss's logarithms, the teacher's target. But each map's value depends on that map's Q
and K alone. So a few images' maps are made from their factors, compared, differentiated at once and dropped;
what stays is the gradient of the value, as large as Q and K.

Shapes: S stacked students (absent for one), B batch, P student maps of one block, T tokens.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkd.models.output import QKV, at_least_float32, compared_in

# With head_dim 64 a head's Q and K, and their gradients, are as large as its scores at 128 tokens. Below it
# streaming saves next to nothing; measured at 145 it saves a quarter (`benchmarks.memory` has more sizes).
STREAM_ABOVE = 128

# The scores of one chunk; a loss and its gradient make some ten maps of that size meanwhile. On a CPU a step
# takes as long with half or twice of it; with much less a GPU would wait for launches.
CHUNK_BYTES = 2**23

Compare = Callable[[Tensor, slice], Tensor]
"""Student scores [*S, b, P, T, T] of a slice of the batch, and that slice → values [*S, b, P]."""


def streamed(student: QKV, compare: Compare, chunk: int) -> Tensor:
    """The values [*S, B, P] that `compare` gives for the scores of all images, and their gradient.

    Args:
        student: [*S, B, P, T, head_dim] each.
        compare: the value of an image's map p may depend on the student's map p of that image alone; all
            else in it is a constant.
        chunk: images at a time.
    """
    values: Tensor = _Streamed.apply(student.q, student.k, compare, chunk)
    return values


def images_at_a_time(maps: Iterable[QKV]) -> int:
    """How many images' scores fit into `CHUNK_BYTES`, whichever of `maps` has the largest; at least one."""
    sizes = []
    for factors in maps:
        *students, _, heads, tokens, _ = factors.q.shape
        sizes.append(prod(students) * heads * tokens**2 * compared_in(factors.q).itemsize)
    return max(CHUNK_BYTES // max(sizes), 1)


class _Streamed(torch.autograd.Function):
    """Value and gradient in one pass (as Hsu et al. 2024, "Liger Kernel", fuse a head with its loss).

    The gradient by an image's map p is linear in d total / d value [image, p], which the backward pass alone
    knows: forward keeps the gradient for 1, backward multiplies. Nothing is computed twice, however often the
    gradient is asked for.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, compare: Compare, chunk: int) -> Tensor:
        student = QKV(q, k)
        gradient = None
        if any(ctx.needs_input_grad):
            # In float32 even for float16: it is tiny before the loss scale, known in backward, enlarges it.
            gradient = tuple(torch.empty_like(x, dtype=compared_in(x)) for x in (q, k))
            ctx.save_for_backward(*gradient)
            ctx.dtype = q.dtype
        count = q.shape[-4]
        parts = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        return torch.cat([_values(student, images, compare, gradient) for images in parts], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, per_map: Tensor) -> tuple[Tensor | None, ...]:
        weight = per_map[..., None, None]
        q, k = ((weight * gradient).to(ctx.dtype) for gradient in ctx.saved_tensors)
        return q, k, None, None


def _values(student: QKV, images: slice, compare: Compare, gradient: tuple[Tensor, ...] | None) -> Tensor:
    """The values [*S, b, P] of `images`; their part of `gradient`, if wanted, is filled in."""
    leaves = QKV(*(at_least_float32(of_images(x, images)).detach() for x in (student.q, student.k)))
    if gradient is None:
        return compare(leaves.scores(), images)
    # Autocast would multiply in half precision on the way back, which elsewhere it has long ended by then.
    with torch.enable_grad(), torch.autocast(student.q.device.type, enabled=False):
        inputs = leaves.q.requires_grad_(), leaves.k.requires_grad_()
        values = compare(leaves.scores(), images)
        parts = torch.autograd.grad(values.sum(), inputs)
    for whole, part in zip(gradient, parts, strict=True):
        of_images(whole, images).copy_(part)
    return values.detach()


def of_images(factor: Tensor, images: slice) -> Tensor:
    """The part of [*S, B, H, T, head_dim] that belongs to some images; a view."""
    return factor.narrow(-4, images.start, images.stop - images.start)
