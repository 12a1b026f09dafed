"""The page as one HTML file that needs nothing else: no server, no network, no library.

The file holds its arrays as base64 of 16-bit integers, 2.7 bytes a number, and its images as PNG, or as JPEG
above 64 pixels a side: 1 MB for 128 images of 32×32 with every head of ten and of five blocks on a 4×4 grid,
10 MB a model with twelve blocks of twelve heads on a 14×14 grid. `subjects` bounds what every patch adds.

Shapes: N images shown, H × W pixels, L blocks, A heads, h × w patches.
"""

import json
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from vitkd.explain.gallery import charts
from vitkd.explain.gallery.cells import CELLS
from vitkd.explain.gallery.figures import attention_unit, common_name
from vitkd.explain.gallery.page import REGIONS, GalleryPage
from vitkd.explain.gallery.panel import COLOURS
from vitkd.explain.maps.subjects import ATTENTION, Maps, Subject

REGION_COLOURS = matplotlib.colormaps["coolwarm"]
"""Blue to red in perceptually even steps (Moreland 2009), for an order that can be seen."""

SHARP_PIXELS = 64
"""Larger images are photographs: as JPEG they take a tenth, and single pixels do not matter."""
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
    "random": "random (the baseline)",
    REGIONS: "attention regions",
}
"""of the methods in this package; others go by their own names"""
UNITS = {REGIONS: "regions by the attention they receive"}
OTHER_UNIT = "relevance, arbitrary units"


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
        # [teacher right, wrong][student right, wrong]
        grid=(CELLS[:2], CELLS[2:]) if any(page.cells) else (),
        shown={cell: page.cells.count(cell) for cell in page.cells} if any(page.cells) else {},
        total=sum(page.counts.values()),
        titles=_titles(page),
        classes=sorted({*page.labels} - {-1}, key=lambda label: page.class_names[label]),
        plots=[(plot, picture_url(plot.picture)) for plot in page.plots],
        aspect=f"{width} / {height}",
        patches=_finest_grid(page.subjects),
        charts=charts,
        readers=common_name(_readers(page)),
        gradient=", ".join(charts.css(COLOURS(level)) for level in np.linspace(0, 1, 17)),
        data=_as_script(_data(page)),
    )


def encode(maps: Maps) -> dict[str, Any]:
    """Maps [N, ...] as base64 of little-endian uint16 q, each image's value being low + step · q.

    An image without negative values has low 0, so that its zeros stay zeros. Every value is exact to
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
    return _data_url("image/png" if picture.startswith(b"\x89PNG") else "image/svg+xml", picture)


def region_colours(count: int) -> list[tuple[float, float, float]]:
    """A colour for each of `count` ordered regions, in 0..1: blue for the least active, red for the most."""
    places = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
    return [(float(r), float(g), float(b)) for r, g, b, _ in REGION_COLOURS(places)]


def number(value: str | float | int | None) -> str:
    """A table's value in words: four digits of a fraction, a dash for what is undefined."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int | np.integer) else value


def _titles(page: GalleryPage) -> dict[str, str]:
    """Method → how it is called on the page."""
    return {method: TITLES.get(method, method.replace("_", " ")) for method in page.methods}


def _readers(page: GalleryPage) -> list[str]:
    """The tokens that each subject with maps classifies by."""
    return [subject.readers for subject in page.subjects if ATTENTION in subject.maps]


def _finest_grid(subjects: Sequence[Subject]) -> tuple[int, int] | None:
    """(h, w) of the patches whose attention the page holds, if it holds any."""
    grids = [subject.patches.shape[-2:] for subject in subjects if subject.patches is not None]
    return max(grids, key=lambda grid: grid[0] * grid[1], default=None)


def _data(page: GalleryPage) -> dict[str, Any]:
    """What the page's script reads."""
    regions = page.regions or {}
    count = 1 + max((int(each.max()) for each in regions.values()), default=0)
    units = UNITS | {ATTENTION: attention_unit(_readers(page)).replace("\n", " ")}
    return {
        "images": [image_url(pixels) for pixels in page.images],
        "isSharp": max(page.images.shape[1:3]) <= SHARP_PIXELS,
        "labels": [*map(int, page.labels)],
        "cells": [*page.cells],
        "counts": {cell: int(count) for cell, count in page.counts.items()},
        "indices": [*map(int, page.indices)],
        "classes": [*page.class_names],
        "units": {method: units.get(method, OTHER_UNIT) for method in page.methods},
        "titles": _titles(page),
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


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode('ascii')}"


def _bytes(colour: Sequence[float]) -> list[int]:
    return [round(255 * each) for each in colour]
