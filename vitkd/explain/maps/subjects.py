"""What a model predicts of chosen images, and where it looks by every method.

Shapes: N images, C channels, H × W pixels, L blocks, A heads, T tokens, h × w patches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitkd.explain.maps.attention import attention_features, fuse, region_map, scaled
from vitkd.explain.maps.methods import class_rows, explain_by
from vitkd.explain.maps.recording import Recording, logits_of, record, who_reads
from vitkd.explain.maps.windows import given, of_blocks, received

TEACHER = "teacher"
"""the name of that subject; all others are students"""
ATTENTION = "attention"
"""the method whose maps are kept by block and head"""
REGIONS = "regions"
"""beside the methods' maps: numbers from 0, the region that receives least attention"""

BATCH_SIZE = 64
MAX_ATTENTION_VALUES = 16_000_000
"""in one subject's attention maps; beyond, heads are averaged, to keep the page small enough to open"""
MAX_VALUES_BY_HEAD, MAX_PATCH_VALUES = 1_000_000, 4_000_000
"""in the maps of all its patches: up to the first by every head, up to the second by their mean, else none"""

Maps = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, what it predicted and where it looked."""

    name: str
    predicted: Sequence[int]
    """[N]"""
    confidence: Sequence[float]
    """[N] probabilities in 0..1 of the class predicted"""
    maps: Mapping[str, Maps]
    """method or "regions" → [N, h, w]; "attention" → [N, L, A, h, w], weights of the `readers`, 0 where a
    block has fewer heads than another"""
    first_block: int = -1
    """whose attention is shown at first"""
    readers: str = "class token"
    """the tokens that it classifies by, in words"""
    patches: Maps | None = None
    """[N, L, A or 1, h·w, h, w]: what each patch gives to every patch, by each head or by their mean; None
    where that is left out"""
    heads: Sequence[int] = ()
    """[L] of each block, where not all have A"""


def subject_of(
    name: str,
    model: nn.Module,
    images: Tensor,
    methods: Sequence[str],
    first_block: int = -1,
) -> tuple[Subject, Tensor]:
    """The model's predictions and maps of normalised images [N, C, H, W], and its `attention_features`.

    Class-specific methods explain the class that the model predicts.

    Raises ConfigError if its maps cannot be recorded, a method does not exist, or a package is absent.
    """
    rows, patches, features, logits = [], [], [], []
    for part in images.split(BATCH_SIZE):
        with torch.no_grad():
            recording = record(model, part)
            rows.append(rows_by_head(recording).cpu())
            if (of_patches := patch_rows(recording, len(images))) is not None:
                patches.append(of_patches.cpu())
            features.append(features_of(recording).cpu())
        logits.append(recording.logits)
    predicted, confidence = predictions_of(torch.cat(logits))
    attention = torch.cat(rows)
    heads = torch.tensor([each.shape[1] for each in recording.weights])
    if attention.numel() > MAX_ATTENTION_VALUES:
        attention = attention.sum(2, keepdim=True) / heads[:, None, None, None]
    maps = {ATTENTION: attention.numpy()}
    for method in methods:
        if method != ATTENTION:
            maps[method] = maps_of(method, model, images, predicted).cpu().numpy()
    subject = Subject(
        name,
        predicted.tolist(),
        confidence,
        maps,
        first_block % attention.shape[1],
        who_reads(recording),
        torch.cat(patches).numpy() if patches else None,
        heads.tolist() if 1 < attention.shape[2] != heads.min() else (),
    )
    return subject, torch.cat(features)


@torch.no_grad()
def without_maps(name: str, model: nn.Module, images: Tensor) -> Subject:
    """The predictions for normalised images [N, C, H, W] by a model that has no attention maps."""
    logits = torch.cat([logits_of(model, part) for part in images.split(BATCH_SIZE)])
    predicted, confidence = predictions_of(logits)
    return Subject(name, predicted.tolist(), confidence, {})


def predictions_of(logits: Tensor) -> tuple[Tensor, list[float]]:
    """The most likely classes [N] by logits [N, K], and the probability of each."""
    best = logits.float().softmax(-1).max(-1)
    return best.indices, best.values.tolist()


def maps_of(method: str, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """`explain_by` in batches, as gradients of all blocks take much memory: [N, h, w]."""
    # In parts, every part would get the same noise.
    size = max(len(images), 1) if method == "random" else BATCH_SIZE
    parts = zip(images.split(size), target.split(size), strict=True)
    return torch.cat([explain_by(method, model, part, classes) for part, classes in parts])


def rows_by_head(recording: Recording) -> Tensor:
    """What the tokens that the classifier reads give to every patch, [B, L, A, h, w] as in `Subject.maps`.

    Within windows it is what each patch receives from the tokens of its own.
    """
    if not recording.windows:
        return class_rows(torch.stack(recording.weights, 1), recording)
    return stacked(of_blocks(received, recording.weights, recording.windows)).float()


def stacked(maps: Sequence[Tensor]) -> Tensor:
    """Each block's maps [B, H, ...] as [B, L, A, ...], with 0 for the heads that a block has not."""
    most = max(each.shape[1] for each in maps)
    missing = [each.new_zeros(len(each), most - each.shape[1], *each.shape[2:]) for each in maps]
    return torch.stack([torch.cat(each, 1) for each in zip(maps, missing, strict=True)], 1)


def features_of(recording: Recording) -> Tensor:
    """`attention_features`, within windows [B, h·w, L]: what each patch receives in each block."""
    if not recording.windows:
        return attention_features(recording.weights, recording.grid, recording.prefix, recording.readers)
    maps = of_blocks(received, [*map(fuse, recording.weights)], recording.windows)
    features = torch.stack(maps, -1).flatten(1, 2)
    return features.shape[1] * scaled(features, dim=1)


def patch_rows(recording: Recording, images: int) -> Tensor | None:
    """What each patch gives to every patch, [N, L, A or 1, h·w, h, w], as `class_rows` for the class token.

    By every head, by their mean or not at all, as that many `images` allow.
    """
    weights, prefix = recording.weights, recording.prefix
    heads = max(each.shape[1] for each in weights)
    by_mean = images * len(weights) * math.prod(recording.grid) ** 2
    if by_mean > MAX_PATCH_VALUES:
        return None
    if by_mean * heads > MAX_VALUES_BY_HEAD:
        weights = tuple(each.mean(1, keepdim=True) for each in weights)
    if recording.windows:
        return stacked(of_blocks(given, weights, recording.windows)).float()
    of_patches = [each[..., prefix:, prefix:] for each in weights]
    return torch.stack(of_patches, 1).float().unflatten(-1, recording.grid)


def fits_one_image(subject: Subject) -> bool:
    """Whether the page would hold what every patch of a single image gives to every patch."""
    blocks, _, height, width = subject.maps[ATTENTION].shape[1:]
    return blocks * (height * width) ** 2 <= MAX_PATCH_VALUES


def with_regions(subject: Subject, features: Tensor, clusters: int) -> Subject:
    """A subject with the regions of its images by their `features`."""
    height, width = subject.maps[ATTENTION].shape[-2:]
    regions = region_map(features, clusters, grid=(height, width)).numpy()
    return replace(subject, maps={**subject.maps, REGIONS: regions})


def head_mean(subject: Subject, block: int | None = None) -> Tensor:
    """Attention of one block, by default the one shown first, averaged over heads and scaled to sum 1."""
    maps = torch.from_numpy(subject.maps[ATTENTION][:, subject.first_block if block is None else block])
    return scaled(maps.mean(1).flatten(1)).view_as(maps[:, 0])
