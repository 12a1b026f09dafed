"""What the page shows, as plain data, checked to fit together.

Shapes: N images shown, H × W pixels, L blocks, A heads, h × w patches, K classes.
"""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitkd.explain.gallery.cells import CELLS
from vitkd.explain.gallery.charts import Curves, HeatMap
from vitkd.explain.maps.subjects import ATTENTION, Subject

REGIONS = "regions"
"""what the page draws in colours of its own"""


class Table(NamedTuple):
    """Metrics below the gallery; None stands for an undefined one."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


class Plot(NamedTuple):
    """A picture below the gallery."""

    title: str
    caption: str
    picture: bytes
    """PNG or SVG"""


@dataclass(frozen=True, eq=False)
class GalleryPage:
    """Everything that the page shows."""

    title: str
    subtitle: str
    """which runs, data set and epoch"""
    images: NDArray[np.uint8]
    """[N, H, W, 3]"""
    labels: Sequence[int]
    """[N]; -1 where the true class is not known"""
    cells: Sequence[str]
    """[N], of `CELLS`; "" for all images where there is no teacher"""
    indices: Sequence[int]
    """[N] numbers in the test split"""
    class_names: Sequence[str]
    """[K]"""
    subjects: Sequence[Subject]
    counts: Mapping[str, int] = field(default_factory=dict)
    """cell → images of the whole test split"""
    notes: Sequence[str] = ()
    """sentences beside the counts"""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    heat_maps: Sequence[HeatMap] = ()
    curves: Sequence[Curves] = ()
    regions: Mapping[str, NDArray[np.integer[Any]]] | None = None
    """subject's name → [N, h, w] labels from 0, the least active"""

    def __post_init__(self) -> None:
        """Raise ValueError where arguments do not fit together."""
        _check(self)

    @property
    def methods(self) -> list[str]:
        """What can be drawn, in the order in which subjects name it; regions last."""
        named = [method for subject in self.subjects for method in subject.maps]
        return [*dict.fromkeys(named), *([REGIONS] if self.regions else [])]


def _check(page: GalleryPage) -> None:
    n = len(page.images)
    if n == 0 or page.images.ndim != 4 or page.images.shape[3] != 3 or page.images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [N, H, W, 3], at least one, not {page.images.shape}")
    of_images: dict[str, Sized] = {"labels": page.labels, "cells": page.cells, "indices": page.indices}
    of_images |= {f"{name}'s regions": regions for name, regions in (page.regions or {}).items()}
    for subject in page.subjects:
        of_images |= {f"{subject.name}'s {what}": values for what, values in _of_images(subject).items()}
        _check_shapes(subject)
    for name, values in of_images.items():
        if len(values) != n:
            raise ValueError(f"{name}: {len(values)} for {n} images")
    _check_names(page)


def _of_images(subject: Subject) -> dict[str, Sized]:
    """What a subject has one of for each image."""
    patches = {} if subject.patches is None else {"patches": subject.patches}
    return {"predictions": subject.predicted, "confidences": subject.confidence, **subject.maps, **patches}


def _check_shapes(subject: Subject) -> None:
    for method, maps in subject.maps.items():
        axes = 5 if method == ATTENTION else 3
        if maps.ndim != axes or not np.isfinite(maps).all():
            shape = [*maps.shape]
            raise ValueError(f"{subject.name}'s {method}: finite values on {axes} axes, not {shape}")
    if subject.patches is not None:
        expected, shape = _shape_of_patches(subject), [*subject.patches.shape]
        if subject.patches.shape[1:] not in expected:
            raise ValueError(f"{subject.name}'s patches: {shape}, not [N, …] of {expected}")


def _shape_of_patches(subject: Subject) -> list[tuple[int, ...]]:
    """What `patches` may be for one image."""
    if ATTENTION not in subject.maps:
        return []
    blocks, heads, height, width = subject.maps[ATTENTION].shape[1:]
    return [(blocks, each, height * width, height, width) for each in (heads, 1)]


def _check_names(page: GalleryPage) -> None:
    known = {*CELLS}
    if {*page.cells} != {""} and not {*page.cells, *page.counts} <= known:
        raise ValueError(f"cells {sorted({*page.cells, *page.counts} - known)}: there are {sorted(known)}")
    predicted = [label for subject in page.subjects for label in subject.predicted]
    if not all(-1 <= label < len(page.class_names) for label in [*page.labels, *predicted]):
        raise ValueError(f"classes beyond the {len(page.class_names)} that have names")
    if unknown := {*(page.regions or {})} - {subject.name for subject in page.subjects}:
        raise ValueError(f"regions of {sorted(unknown)}, which are no subjects of the page")
