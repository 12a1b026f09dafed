"""The page as one HTML file that needs nothing else: no server, no network, no library.

The file holds its arrays as base64 of 16-bit integers, 2.7 bytes a number, and its images as PNG, or as JPEG
above 64 pixels a side: 1 MB for 128 images of 32×32 with every head of ten and of five blocks on a 4×4 grid,
10 MB a model with twelve blocks of twelve heads on a 14×14 grid. `subjects` bounds what every patch adds.

Shapes: N images shown, H × W pixels, L blocks, A heads, h × w patches.
"""

import math
from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_hex
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitkd.explain.gallery import charts
from vitkd.explain.gallery.cells import CELLS
from vitkd.explain.gallery.contents import GalleryPage
from vitkd.explain.gallery.figures import COLOURS, attention_unit, common_name
from vitkd.explain.maps.subjects import ATTENTION, REGIONS, Maps, Subject

REGION_COLOURS = matplotlib.colormaps["coolwarm"]
"""Blue to red in perceptually even steps (Moreland 2009), for an order that can be seen."""

SHARP_PIXELS = 64
"""Larger images are photographs: as JPEG they take a tenth, and single pixels do not matter."""
JPEG_QUALITY = 90

LEVELS = 2**16 - 1

TITLES = {
    "rollout": "attention rollout",
    "relevance": "class relevance (Chefer)",
    "grad_cam": "Grad-CAM of the last attention",
    "pytorch_grad_cam": "Grad-CAM of the tokens",
    "random": "random (the baseline)",
    REGIONS: "attention regions",
}
"""of methods that do not go by their own names"""
OTHER_UNIT = "relevance, arbitrary units"


def render(page: GalleryPage) -> str:
    """The page; the same arguments give the same page."""
    environment = Environment(
        loader=PackageLoader("vitkd.explain.gallery", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    plain = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    environment.policies["json.dumps_kwargs"] = plain
    height, width = page.pixels.shape[2:]
    methods = [method for subject in page.subjects for method in subject.maps]
    in_order = sorted(methods, key=REGIONS.__eq__)  # regions last
    titles = {method: TITLES.get(method, method.replace("_", " ")) for method in in_order}
    grids = [subject.patches.shape[-2:] for subject in page.subjects if subject.patches is not None]
    return environment.get_template("page.html").render(
        page=page,
        # [teacher right, wrong][student right, wrong]
        grid=(CELLS[:2], CELLS[2:]) if any(page.cells) else (),
        shown={cell: page.cells.count(cell) for cell in page.cells} if any(page.cells) else {},
        total=sum(page.counts.values()),
        titles=titles,
        classes=sorted({*page.labels} - {-1}, key=lambda label: page.class_names[label]),
        figure_1=page.figure_1 and _data_url("image/png", page.figure_1),
        aspect=f"{width} / {height}",
        patches=max(grids, key=math.prod, default=None),
        charts=charts,
        readers=common_name(page.readers),
        gradient=", ".join(to_hex(COLOURS(level)) for level in np.linspace(0, 1, 17)),
        data=_data(page, titles),
    )


def encode(maps: Maps) -> dict[str, Any]:
    """Maps [N, ...] as base64 of little-endian uint16 q, each image's value being low + step · q.

    An image's lowest value is low, so that its zeros stay zeros unless others are below. Every value is exact
    to half a step, 1/131,070 of the image's range.
    """
    values = maps.astype(np.float64).reshape(len(maps), -1)
    low = values.min(1)
    step = (values.max(1) - low).clip(min=0) / LEVELS
    levels = np.rint((values - low[:, None]) / np.where(step > 0, step, 1)[:, None]).clip(0, LEVELS)
    return {
        "shape": [*maps.shape],
        "low": [float(f"{each:.7g}") for each in low],
        "step": [float(f"{each:.7g}") for each in step],
        "data": b64encode(levels.astype("<u2").tobytes()).decode("ascii"),
    }


def image_url(pixels: Tensor) -> str:
    """[C, H, W] in 0..1 as a `data:` URL; a grey image gets three equal channels."""
    file = BytesIO()
    levels = (pixels.expand(3, -1, -1).movedim(0, -1) * 255).round().to(torch.uint8)
    image = Image.fromarray(levels.contiguous().numpy())
    encoding = "png" if max(image.size) <= SHARP_PIXELS else "jpeg"
    image.save(file, encoding, optimize=encoding == "png", quality=JPEG_QUALITY)
    return _data_url(f"image/{encoding}", file.getvalue())


def region_colours(count: int) -> NDArray[np.float64]:
    """Colours [count, 3] in 0..1 of ordered regions: blue for the least active, red for the most."""
    return REGION_COLOURS(np.linspace(0, 1, count) if count > 1 else np.array([0.5]))[:, :3]


def number(value: str | float | int | None) -> str:
    """A table's value in words: four digits of a fraction, a dash for what is undefined."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int | np.integer) else value


def _data(page: GalleryPage, titles: Mapping[str, str]) -> dict[str, Any]:
    """What the page's script reads."""
    regions = [subject.maps[REGIONS] for subject in page.subjects if REGIONS in subject.maps]
    count = 1 + max((int(each.max()) for each in regions), default=0)
    units = {
        ATTENTION: attention_unit(page.readers).replace("\n", " "),
        REGIONS: "regions by the attention they receive",
    }
    return {
        "images": [image_url(pixels) for pixels in page.pixels],
        "isSharp": max(page.pixels.shape[2:]) <= SHARP_PIXELS,
        "labels": page.labels,
        "cells": page.cells,
        "counts": page.counts,
        "indices": page.numbers,
        "classes": page.class_names,
        "units": {method: units.get(method, OTHER_UNIT) for method in titles},
        "titles": titles,
        "subjects": [_subject(subject) for subject in page.subjects],
        "colours": _bytes(COLOURS(np.linspace(0, 1, 256))[:, :3]),
        "regionColours": _bytes(region_colours(count)),
    }


def _subject(subject: Subject) -> dict[str, Any]:
    blocks = subject.maps[ATTENTION].shape[1] if ATTENTION in subject.maps else 1
    return {
        "name": subject.name,
        "predicted": subject.predicted,
        "confidence": [round(each, 4) for each in subject.confidence],
        "firstBlock": subject.first_block % blocks,
        "maps": {method: encode(maps) for method, maps in subject.maps.items()},
        "patches": None if subject.patches is None else encode(subject.patches),
        "heads": [*subject.heads] or None,
    }


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode('ascii')}"


def _bytes(colours: NDArray[np.float64]) -> list[list[int]]:
    return np.rint(255 * colours).astype(int).tolist()
