"""`head_map=squeeze`: m student heads learn what n > m teacher heads have most in common, by a linear map.

Let X [n, L] be the scores of the teacher's heads on a calibration batch, each row (query) less its mean over
keys, which the softmax ignores, and A [m, n] the means over m equal parts of the heads, as `group_mean` takes
them. Student head i learns from the scores Σ_j W_ij T_j, with

    U = the eigenvectors of X Xᵀ of its m largest eigenvalues λ      [n, m]
    P Σ Qᵀ = A U                                                     its singular value decomposition
    W = c · P Qᵀ Uᵀ,  c² = (m/n) · ‖X‖² / Σ λ                        [m, n]

By least squares no m maps tell more about the n: of all of rank m, U Uᵀ X is the nearest to X (Eckart and
Young 1936). Which maps span these, P Qᵀ decides: those nearest to the groups' means (orthogonal Procrustes,
Schönemann 1966). c makes them as large, in the mean square, as the teacher's, for a softmax of larger scores
is sharper. So W is A where the heads of a group are equal, and the identity where m = n.

Shapes: B images, n teacher heads, m student heads, Q queries, K keys.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.methods.maps.alignment import Alignment, without_tokens
from vitkd.methods.maps.granularity import BlockPair
from vitkd.models import Model, Taps

IMAGES_AT_ONCE = 4
"""all blocks' maps of so many are in memory together"""


@torch.no_grad()
def squeeze_heads(
    pairs: Sequence[BlockPair], alignments: Sequence[Alignment], teacher: Model, images: Tensor
) -> list[BlockPair]:
    """The pairs, with weights where the student's block has fewer heads than the teacher's.

    The teacher sees a calibration batch, images [B, C, H, W]; no random number is drawn.

    Raises ConfigError if its scores are not finite.
    """
    both = zip(pairs, alignments, strict=True)
    squeezed = {pair: alignment for pair, alignment in both if len(pair.teacher_heads[0]) > 1}
    sums = {pair: torch.zeros((), dtype=torch.float64) for pair in squeezed}
    blocks = tuple(sorted({pair.teacher_block for pair in squeezed}))
    taps = Taps(scores=blocks, logits=False, part=pairs[0].part)
    for some in images.split(IMAGES_AT_ONCE) if squeezed else ():
        scores = teacher.eval()(some, taps).scores
        for pair, alignment in squeezed.items():
            sums[pair] = sums[pair] + second_moments(scores[pair.teacher_block], alignment)
    return [with_weights(pair, sums[pair]) if pair in sums else pair for pair in pairs]


def with_weights(pair: BlockPair, moments: Tensor) -> BlockPair:
    """The pair, its teacher heads weighed by their second moments [n, n] on a calibration batch."""
    if not moments.isfinite().all():
        raise ConfigError(
            f"granularity.head_map=squeeze: the scores of teacher block {pair.teacher_block} are not finite; "
            "choose another teacher, or head_map=index"
        )
    # Rounded now, so that what is recorded is what trains.
    weights = head_weights(moments, len(pair.student_heads)).float().tolist()
    return replace(pair, weights=tuple(map(tuple, weights)))


def second_moments(scores: Tensor, alignment: Alignment) -> Tensor:
    """X Xᵀ [n, n] in float64 of the scores [B, n, Q, K], without entries that are not compared."""
    kept, dropped = alignment.kept, alignment.dropped_from_teacher
    x = without_tokens(scores, kept, kept + dropped, (-2, -1)).double()
    # The student's mask would be of another grid.
    allowed = alignment.allowed if alignment.resize is None else None
    counts = torch.ones_like(x[0, 0]) if allowed is None else allowed.to(x)
    x = x * counts
    centred = (x - x.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)) * counts
    return torch.einsum("bhqk,bgqk->hg", centred, centred)


def head_weights(moments: Tensor, students: int) -> Tensor:
    """W [m, n] of second moments X Xᵀ [n, n]; the means A where all heads attend uniformly."""
    means = group_means(students, len(moments))
    eigenvalues, eigenvectors = torch.linalg.eigh(moments)  # in ascending order
    largest = eigenvalues[-students:].sum()
    if largest <= 0:
        return means
    basis = eigenvectors[:, -students:]
    left, _, right = torch.linalg.svd(means @ basis)
    scale = (students / len(moments) * moments.trace() / largest).sqrt()
    return scale * left @ right @ basis.T


def group_means(students: int, teachers: int) -> Tensor:
    """A [m, n] float64: row i is the mean over the i-th of m equal parts of n heads, which may cut a head."""
    size = teachers / students
    starts = torch.arange(students, dtype=torch.float64)[:, None] * size
    heads = torch.arange(teachers)
    overlaps = torch.minimum(starts + size, heads + 1) - torch.maximum(starts, heads)
    return overlaps.clamp(min=0) / size
