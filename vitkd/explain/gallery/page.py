"""The gallery as one HTML page that needs nothing else: no server, no network, no library.

The page holds its arrays as base64 of 16-bit integers, 2.7 bytes a number, and its images as PNG, or as JPEG
above 64 pixels a side. That makes 1 MB of 128 images of 32×32 with every head of ten and of five blocks on a
4×4 grid. Large grids cost more: 128 images with twelve blocks of twelve heads on a 14×14 grid take 10 MB a
subject, and twice the images twice as much; browsers open that, but it is no longer a file for an e-mail.
What every patch attends to may stand beside what the classifier does; `subjects` bounds it.

Shapes: N images shown, H × W pixels, L blocks, A heads, h × w patches, K classes.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from vitkd.explain.gallery.figures import attention_unit, region_colours, whose
from vitkd.explain.gallery.panel import COLOURS

ATTENTION, REGIONS = "attention", "regions"
"""what the page draws by block and head, and in colours of its own"""

CELLS = (("both right", "student wrong"), ("teacher wrong", "both wrong"))
"""[teacher right, wrong][student right, wrong]"""

SHARP_PIXELS = 64
"""Larger images are photographs: as JPEG they take a tenth, and no one counts their pixels."""
JPEG_QUALITY = 90

LEVELS = 2**16 - 1

TITLES = {
    ATTENTION: "attention",
    "rollout": "attention rollout",
    "gradient_rollout": "gradient rollout",
    "relevance": "class relevance (Chefer)",
    "grad_cam": "Grad-CAM of the last attention",
    "pytorch_grad_cam": "Grad-CAM of the tokens",
    "integrated_gradients": "integrated gradients",
    "random": "random (what a method must beat)",
    REGIONS: "attention regions",
}
"""of the methods that this package has; others go by their own names"""
UNITS = {REGIONS: "regions by the attention they draw"}
OTHER_UNIT = "relevance, arbitrary units"

Maps = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, what it answered and where it looked."""

    name: str
    role: Literal["teacher", "student"]
    predicted: Sequence[int]
    """[N]"""
    confidence: Sequence[float]
    """[N] probabilities in 0..1 of the class predicted"""
    maps: Mapping[str, Maps]
    """method → [N, h, w]; "attention" → [N, L, A, h, w], the weights of `readers`; may lack methods"""
    first_block: int = -1
    """whose attention is shown at first"""
    readers: str = "class token"
    """the tokens that it classifies by, in words"""
    patches: Maps | None = None
    """[N, L, A or 1, h·w, h, w]: what each patch gives to every patch, by each head or by their mean; None
    if that is not to be shown"""


class Table(NamedTuple):
    """Figures below the gallery; None stands for one that is undefined."""

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
    """sentences to stand beside the counts"""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    regions: Mapping[str, NDArray[np.integer[Any]]] | None = None
    """subject's name → [N, h, w] labels from 0, the least active"""

    def __post_init__(self) -> None:
        """Raise ValueError where arguments do not belong together."""
        _check(self)

    @property
    def methods(self) -> list[str]:
        """What can be drawn, in the order in which subjects name it; regions last."""
        named = [method for subject in self.subjects for method in subject.maps]
        return [*dict.fromkeys(named), *([REGIONS] if self.regions else [])]


def render(page: GalleryPage) -> str:
    """The page; the same arguments give the same page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    template = environment.from_string(
        files("vitkd.explain.gallery").joinpath("page.html").read_text("utf-8")
    )
    height, width = page.images.shape[1:3]
    return template.render(
        page=page,
        grid=CELLS if any(page.cells) else (),
        shown={cell: page.cells.count(cell) for cell in page.cells} if any(page.cells) else {},
        total=sum(page.counts.values()),
        titles={method: TITLES.get(method, method.replace("_", " ")) for method in page.methods},
        classes=sorted({*page.labels} - {-1}, key=lambda label: page.class_names[label]),
        plots=[(plot, picture_url(plot.picture)) for plot in page.plots],
        aspect=f"{width} / {height}",
        patches=_finest_grid(page.subjects),
        readers=whose(subject.readers for subject in page.subjects if ATTENTION in subject.maps),
        gradient=", ".join(_css(COLOURS(level)[:3]) for level in np.linspace(0, 1, 17)),
        data=_as_script(_data(page)),
    )


def encode(maps: Maps) -> dict[str, Any]:
    """Maps [N, ...] as base64 of little-endian uint16 q, each image's value being low + step · q.

    An image without negative values has low 0, so that its zeros stay zeros. Every value is met to
    half a step, 1/131,070 of the image's range.
    """
    values = np.asarray(maps, np.float64).reshape(len(maps), -1)
    low = values.min(1).clip(max=0)
    step = (values.max(1) - low).clip(min=0) / LEVELS
    levels = np.rint((values - low[:, None]) / np.where(step > 0, step, 1)[:, None]).clip(0, LEVELS)
    return {
        "shape": [*np.shape(maps)],
        "low": [float(f"{each:.7g}") for each in low],
        "step": [float(f"{each:.7g}") for each in step],
        "data": b64encode(levels.astype("<u2").tobytes()).decode("ascii"),
    }


def image_url(pixels: NDArray[np.uint8]) -> str:
    """[H, W, 3] as a `data:` URL."""
    file = BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if max(image.size) <= SHARP_PIXELS:
        image.save(file, "PNG", optimize=True)
        return _data_url("image/png", file.getvalue())
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return _data_url("image/jpeg", file.getvalue())


def picture_url(picture: bytes) -> str:
    """A PNG or an SVG as a `data:` URL."""
    kind = "image/png" if picture.startswith(b"\x89PNG") else "image/svg+xml"
    return _data_url(kind, picture)


def number(value: str | float | int | None) -> str:
    """A table's value as it is read: four digits of a fraction, a dash for what is undefined."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int | np.integer) else value


def _check(page: GalleryPage) -> None:
    n = len(page.images)
    if n == 0 or page.images.ndim != 4 or page.images.shape[3] != 3 or page.images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [N, H, W, 3], at least one, not {page.images.shape}")
    of_images: dict[str, Sized] = {"labels": page.labels, "cells": page.cells, "indices": page.indices}
    for subject in page.subjects:
        of_images |= {f"{subject.name}'s predictions": subject.predicted}
        of_images |= {f"{subject.name}'s confidences": subject.confidence}
        of_images |= {f"{subject.name}'s {method}": maps for method, maps in subject.maps.items()}
        if subject.patches is not None:
            of_images |= {f"{subject.name}'s patches": subject.patches}
            expected = _shape_of_patches(subject)
            if subject.patches.shape[1:] not in expected:
                raise ValueError(
                    f"{subject.name}'s patches: {[*subject.patches.shape]}, not [N, …] of {expected}"
                )
        for method, maps in subject.maps.items():
            axes = 5 if method == ATTENTION else 3
            if maps.ndim != axes or not np.isfinite(maps).all():
                raise ValueError(
                    f"{subject.name}'s {method}: finite values on {axes} axes, not {[*maps.shape]}"
                )
    of_images |= {f"{name}'s regions": regions for name, regions in (page.regions or {}).items()}
    for name, values in of_images.items():
        if len(values) != n:
            raise ValueError(f"{name}: {len(values)} for {n} images")
    _check_names(page)


def _shape_of_patches(subject: Subject) -> list[tuple[int, ...]]:
    """What `patches` may be for one image."""
    if ATTENTION not in subject.maps:
        return []
    blocks, heads, height, width = subject.maps[ATTENTION].shape[1:]
    return [(blocks, each, height * width, height, width) for each in (heads, 1)]


def _check_names(page: GalleryPage) -> None:
    known = {cell for row in CELLS for cell in row}
    if {*page.cells} != {""} and not {*page.cells, *page.counts} <= known:
        raise ValueError(f"cells {sorted({*page.cells, *page.counts} - known)}: there are {sorted(known)}")
    answered = [label for subject in page.subjects for label in subject.predicted]
    if not all(-1 <= label < len(page.class_names) for label in [*page.labels, *answered]):
        raise ValueError(f"classes beyond the {len(page.class_names)} that have names")
    if unnamed := {*(page.regions or {})} - {subject.name for subject in page.subjects}:
        raise ValueError(f"regions of {sorted(unnamed)}, who are among no subjects")


def _finest_grid(subjects: Sequence[Subject]) -> tuple[int, int] | None:
    """(h, w) of the patches that can be asked what they attend to, if any can."""
    grids = [subject.patches.shape[-2:] for subject in subjects if subject.patches is not None]
    return max(grids, key=lambda grid: grid[0] * grid[1], default=None)


def _data(page: GalleryPage) -> dict[str, Any]:
    """What the page's script reads."""
    regions = page.regions or {}
    count = 1 + max((int(each.max()) for each in regions.values()), default=0)
    shown = (subject.readers for subject in page.subjects if ATTENTION in subject.maps)
    units = UNITS | {ATTENTION: attention_unit(shown).replace("\n", " ")}
    return {
        "images": [image_url(pixels) for pixels in page.images],
        "isSharp": max(page.images.shape[1:3]) <= SHARP_PIXELS,
        "labels": [*map(int, page.labels)],
        "cells": [*page.cells],
        "counts": {cell: int(count) for cell, count in page.counts.items()},
        "indices": [*map(int, page.indices)],
        "classes": [*page.class_names],
        "units": {method: units.get(method, OTHER_UNIT) for method in page.methods},
        "titles": {method: TITLES.get(method, method.replace("_", " ")) for method in page.methods},
        "subjects": [_subject(subject, regions.get(subject.name)) for subject in page.subjects],
        "colours": [_bytes(COLOURS(level)[:3]) for level in np.linspace(0, 1, 256)],
        "regionColours": [_bytes(colour) for colour in region_colours(count)],
    }


def _subject(subject: Subject, regions: NDArray[np.integer[Any]] | None) -> dict[str, Any]:
    maps: dict[str, Maps | NDArray[np.integer[Any]]] = {**subject.maps}
    if regions is not None:
        maps[REGIONS] = regions
    blocks = subject.maps[ATTENTION].shape[1] if ATTENTION in subject.maps else 1
    patches = None if subject.patches is None else encode(np.asarray(subject.patches, np.float64))
    return {
        "name": subject.name,
        "role": subject.role,
        "predicted": [*map(int, subject.predicted)],
        "confidence": [round(float(each), 4) for each in subject.confidence],
        "firstBlock": subject.first_block % blocks,
        "maps": {method: encode(np.asarray(each, np.float64)) for method, each in maps.items()},
        "patches": patches,
    }


def _as_script(data: dict[str, Any]) -> Markup:
    """JSON that may stand inside a script element, whatever the names in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode('ascii')}"


def _bytes(colour: Sequence[float]) -> list[int]:
    return [round(255 * each) for each in colour]


def _css(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{each:02x}" for each in _bytes(colour))
