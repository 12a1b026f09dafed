"""What a model's blocks owe to how many images it was trained on (Zhu et al. 2023, arXiv 2302.03751).

How far each block attends, and how alike it represents images to the blocks of models that were trained on
the most of them: linear CKA (Kornblith et al. 2019) between all blocks of one and all blocks of the other. An
image is an example, whose features are all entries of all of its tokens: what tokens have in common in all
images, such as their positions, does not count.

Shapes: B images, L blocks, H heads, R runs of one size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitkd.explain.maps.recording import record
from vitkd.explain.measures.survey import CHUNK, reach_of
from vitkd.models import Model


class Trained(NamedTuple):
    """A model, and what it was trained on."""

    model: Model
    images: int
    """how many training images it had"""
    seed: int


@dataclass(frozen=True, eq=False)
class OfSize:
    """What was measured of all models that were trained on as many images."""

    images: int
    distance: Tensor
    """[R, L, H] mean attention distance over that of uniform attention"""
    cka: Tensor
    """[R, L, L] linear CKA of each block with each block of the models of most images, the mean over these"""


@torch.no_grad()
def measure_sizes(trained: Sequence[Trained], images: Tensor) -> list[OfSize]:
    """Measure models of one architecture on the same images [B, C, H, W], by size from the smallest.

    A model is compared with those of most images that had other seeds, if there are any: then no two of a
    pair began with the same weights, whatever the size.

    Raises ConfigError if a model's maps cannot be recorded.
    """
    distances, grams = zip(*(measure(each.model, images) for each in trained), strict=True)
    alike = [
        torch.stack([cka(grams[place], grams[other]) for other in others]).mean(0)
        for place, others in enumerate(compared_with(trained))
    ]
    return [
        OfSize(size, *(torch.stack([each[place] for place in places]) for each in (distances, alike)))
        for size, places in by_size(trained).items()
    ]


def measure(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """A model's attention distances [L, H], and its blocks' Gram matrices [L, B, B] of images."""
    distances, tokens = [], []
    for some in images.split(CHUNK):
        recording = record(model, some)
        distances.append(reach_of(recording).cpu())
        tokens.append([each.flatten(1).double().cpu() for each in recording.tokens])
    blocks = [torch.cat(each) for each in zip(*tokens, strict=True)]
    return torch.cat(distances).nanmean(0), torch.stack([each @ each.T for each in blocks])


def cka(ours: Tensor, theirs: Tensor) -> Tensor:
    """HSIC(K, M)/√(HSIC(K, K)·HSIC(M, M)) [L, L'] of each of [L, B, B] Gram matrices with each of [L', B, B].

    Unbiased (Song et al. 2012, section 2), as images are fewer than the features of one: about 0 for
    unrelated features, 1 for those that are alike up to rotation, shift and scale. Takes at least 4 images.
    """
    k, m = centred(ours), centred(theirs)
    norms = [each.square().sum((-1, -2)).sqrt() for each in (k, m)]
    return torch.einsum("aij,bij->ab", k, m) / (norms[0][:, None] * norms[1])


def centred(gram: Tensor) -> Tensor:
    """Symmetric matrices [..., B, B] with rows that sum to 0 and no diagonal (Székely and Rizzo 2014)."""
    count, others = gram.shape[-1], gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    rows = others.sum(-1, keepdim=True) / (count - 2)
    centred = others - rows - rows.mT + rows.sum(-2, keepdim=True) / (count - 1)
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))


def by_size(trained: Sequence[Trained]) -> dict[int, list[int]]:
    """Training images, from the fewest → the places of the models that had as many."""
    places: dict[int, list[int]] = {size: [] for size in sorted({each.images for each in trained})}
    for place, each in enumerate(trained):
        places[each.images].append(place)
    return places


def compared_with(trained: Sequence[Trained]) -> list[list[int]]:
    """For each model the places of those that its blocks are compared with."""
    largest = [*by_size(trained).values()][-1]
    return [[place for place in largest if trained[place].seed != each.seed] or largest for each in trained]
