"""An explanation as files: the report's figures, arrays, metrics and the page."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from io import BytesIO
from typing import Any

import numpy as np
from torch import Tensor

from vitkd.explain.gallery.contents import finite, page_of
from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.figures import png
from vitkd.explain.gallery.render import render
from vitkd.explain.gallery.report_figures import NAMES, figures_of
from vitkd.explain.measures.distances import COMPARISONS
from vitkd.explain.measures.survey import FidelityResult

FILES = {*(f"{name}.png" for name in NAMES), "maps.npz", "metrics.json", "fidelity.json", "index.html"}
"""all that there may be"""


def files_of(explanation: Explanation) -> dict[str, bytes]:
    """File name → content."""
    pictures = {name: png(figure) for name, figure in figures_of(explanation).items()}
    files = {f"{name}.png": picture for name, picture in pictures.items()}
    files["maps.npz"] = arrays_of(explanation)
    files["metrics.json"] = as_json(metrics_of(explanation))
    if explanation.fidelity:
        files["fidelity.json"] = as_json(fidelity_of(explanation))
    files["index.html"] = render(page_of(explanation, pictures.get("figure_1"))).encode()
    return files


def arrays_of(explanation: Explanation) -> bytes:
    """The shown images and all maps, for NumPy."""
    shared = ("pixels", "labels", "numbers", "cells")
    content: dict[str, Any] = {name: np.asarray(getattr(explanation, name)) for name in shared}
    for subject in explanation.subjects:
        content[f"{subject.name}/predicted"] = np.asarray(subject.predicted)
        content[f"{subject.name}/confidence"] = np.asarray(subject.confidence)
        content |= {f"{subject.name}/{method}": maps for method, maps in subject.maps.items()}
        if subject.patches is not None:
            content[f"{subject.name}/patches"] = subject.patches
    file = BytesIO()
    np.savez_compressed(file, **content)
    return file.getvalue()


def metrics_of(explanation: Explanation) -> dict[str, Any]:
    """Every metric but the fidelity table, for `as_json`."""
    return {
        "title": explanation.title,
        "source": explanation.source,
        "cells": explanation.counts,
        "over_represented": explanation.over_represented,
        "correctness": explanation.correlations,
        "attention_distance": explanation.reach,
        "faithfulness": explanation.faithfulness,
        "images": explanation.numbers,
    }


def fidelity_of(explanation: Explanation) -> dict[str, Any]:
    """The first student's fidelity table, and its means over distilled and over all maps."""
    result = next(iter(explanation.fidelity.values()))
    rows = [
        asdict(row) | {"distilled": distilled}
        for row, distilled in zip(result.rows, result.distilled, strict=True)
    ]
    cka = {f"{student}.{teacher}": each._asdict() for (student, teacher), each in result.cka.items()}
    return {"epoch": explanation.epoch, "summary": _summary(result), "rows": rows, "cka": cka}


def _summary(result: FidelityResult) -> dict[str, float]:
    """Means over maps, such as `js_distilled` and `js_all_permuted`; none where no map defines one."""
    distilled = [row for row, is_distilled in zip(result.rows, result.distilled, strict=True) if is_distilled]
    summary = {}
    for metric in COMPARISONS:
        for which, rows in (("distilled", distilled), ("all", result.rows)):
            for part, suffix in (("metrics", ""), ("alone", "_alone"), ("permuted", "_permuted")):
                values = [(getattr(row, part) or {}).get(metric) for row in rows]
                known = [value for value in values if value is not None]
                if known:
                    summary[f"{metric}_{which}{suffix}"] = sum(known) / len(known)
    return summary


def as_json(content: Any) -> bytes:
    """Strict JSON of tensors, records, mappings and lists, with null for an undefined number."""
    return (json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Tensor):
        value = value.tolist()
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
