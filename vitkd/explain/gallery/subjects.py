"""A model before chosen images: what it answers, and where it looks by every method.

Shapes: N images, C channels, H × W pixels, L blocks, A heads, T tokens, h × w patches.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitkd.explain.gallery.page import ATTENTION, Subject
from vitkd.explain.maps.attention import token_map
from vitkd.explain.maps.methods import explain_by
from vitkd.explain.maps.recording import Recording, evaluating, logits_of, record, who_reads
from vitkd.explain.measures.regions import attention_features, region_map

AT_A_TIME = 64
MOST_NUMBERS = 16_000_000
"""of one subject's attention maps; beyond, heads are averaged, or the page would be too large to open"""
MOST_OF_HEADS, MOST_OF_PATCHES = 1_000_000, 4_000_000
"""of the maps of all its patches: up to the first by every head, up to the second by their mean, else none"""


def subject_of(
    name: str,
    role: Literal["teacher", "student"],
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str],
    first_block: int = -1,
) -> tuple[Subject, Tensor]:
    """The model's answers and maps of normalised images [N, C, H, W], and its `attention_features`.

    Class-specific methods explain the class that the model predicts.

    Raises ConfigError if its maps cannot be had, there is no such method, or an optional package is absent.
    """
    rows, patches, features, logits = [], [], [], []
    for part in images.split(AT_A_TIME):
        with torch.no_grad():
            recording = record(model, part)
            rows.append(class_rows(recording).cpu())
            if (of_patches := patch_rows(recording, len(images))) is not None:
                patches.append(of_patches.cpu())
            features.append(features_of(recording).cpu())
        logits.append(recording.logits)
    answers, confidence = answers_of(torch.cat(logits))
    attention = torch.cat(rows)
    if attention.numel() > MOST_NUMBERS:
        attention = attention.mean(2, keepdim=True)
    maps = {ATTENTION: attention.numpy()}
    for method in methods:
        if method != ATTENTION:
            maps[method] = maps_of(method, model, images, answers).cpu().numpy()
    subject = Subject(
        name,
        role,
        answers.tolist(),
        confidence,
        maps,
        first_block % attention.shape[1],
        who_reads(recording),
        torch.cat(patches).numpy() if patches else None,
    )
    return subject, torch.cat(features)


@torch.no_grad()
def without_maps(name: str, role: Literal["teacher", "student"], model: nn.Module, images: Tensor) -> Subject:
    """The answers, to normalised images [N, C, H, W], of a model that has no attention maps."""
    with evaluating(model):
        logits = torch.cat([logits_of(model, part) for part in images.split(AT_A_TIME)])
    answers, confidence = answers_of(logits)
    return Subject(name, role, answers.tolist(), confidence, {})


def answers_of(logits: Tensor) -> tuple[Tensor, list[float]]:
    """The classes [N] that logits [N, K] say, and the probability of each."""
    best = logits.float().softmax(-1).max(-1)
    return best.indices, best.values.tolist()


def maps_of(method: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """`explain_by` a few images at a time, for gradients of all blocks take much memory: [N, h, w]."""
    # Noise begins anew at each call.
    size = max(len(images), 1) if method == "random" else AT_A_TIME
    parts = zip(images.split(size), target.split(size), strict=True)
    return torch.cat([explain_by(method, model, part, classes) for part, classes in parts])


def class_rows(recording: Recording) -> Tensor:
    """What the classifier takes from each patch, [N, L, A, h, w]: the mean row of the tokens it reads."""
    weights = torch.stack(recording.weights, 1).float()
    return token_map(weights, recording.grid, recording.prefix, recording.readers)


def patch_rows(recording: Recording, images: int) -> Tensor | None:
    """What each patch gives to every patch, [N, L, A or 1, h·w, h, w], as `class_rows` for the class token.

    By every head, by their mean or not at all, as that many `images` allow.
    """
    prefix = recording.prefix
    weights = [each[..., prefix:, prefix:] for each in recording.weights]
    numbers = images * sum(each[0].numel() for each in weights)
    if numbers > MOST_OF_PATCHES * weights[0].shape[1]:
        return None
    if numbers > MOST_OF_HEADS:
        weights = [each.mean(1, keepdim=True) for each in weights]
    return torch.stack(weights, 1).float().unflatten(-1, recording.grid)


def features_of(recording: Recording) -> Tensor:
    """`attention_features` of all blocks, [N, h·w, 2·L]."""
    return attention_features(recording.weights, recording.grid, recording.prefix, recording.readers)


def regions_of(features: Tensor, clusters: int, subject: Subject) -> NDArray[np.int64]:
    """Regions [N, h, w] of a subject's images, from the least active, 0."""
    height, width = subject.maps[ATTENTION].shape[-2:]
    return region_map(features, clusters, grid=(height, width)).numpy()


def head_mean(subject: Subject, block: int | None = None) -> Tensor:
    """Attention of one block, by default the one shown first, averaged over heads and scaled to sum 1."""
    maps = torch.from_numpy(subject.maps[ATTENTION][:, subject.first_block if block is None else block])
    mean = maps.mean(1)
    return mean / mean.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(mean.dtype).tiny)
