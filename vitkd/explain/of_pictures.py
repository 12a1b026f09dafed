"""The explanation of the user's own pictures."""

import logging
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.pixels import Format, format_of, normalise, read_picture
from vitkd.explain.maps.recording import has_maps
from vitkd.explain.maps.subjects import Subject, regions_of, subject_of, without_maps
from vitkd.explain.settings import Settings
from vitkd.explain.sources import TEACHER, Sources

log = logging.getLogger("vitkd")


def explain_pictures(settings: Settings, sources: Sources) -> Explanation:
    """Where the models look in the pictures of `settings.image`."""
    paths = settings.pictures
    size, channels, mean, std = _format(sources)
    pixels = torch.stack([read_picture(path, size, channels) for path in paths])
    subjects, regions = look(settings, sources, normalise(pixels, mean, std).to(sources.device))
    return Explanation(
        title=sources.title,
        source=", ".join(path.name for path in paths[:3]) + (" …" if len(paths) > 3 else ""),
        pixels=pixels,
        labels=[-1] * len(paths),
        cells=[""] * len(paths),
        numbers=[*range(len(paths))],
        class_names=_class_names(sources, subjects),
        subjects=subjects,
        regions=regions,
        notes=[*sources.notes(), *_note_on_weights(settings), *note_on_patches(subjects)],
    )


def look(
    settings: Settings, sources: Sources, images: Tensor
) -> tuple[list[Subject], dict[str, NDArray[np.int64]]]:
    """Every model's predictions and maps of the images, and its regions in them if it has maps."""
    subjects, regions = [], {}
    for name, model in sources.models.items():
        if name == TEACHER and not has_maps(model):
            subjects.append(without_maps(name, "teacher", model, images))
            continue
        block = sources.shown_blocks.get(name, -1)
        role: Literal["teacher", "student"] = "teacher" if name == TEACHER else "student"
        subject, features = subject_of(name, role, model, images, settings.methods, block)
        subjects.append(subject)
        regions[name] = regions_of(features, settings.regions, subject)
    return subjects, regions


def note_on_patches(subjects: list[Subject]) -> list[str]:
    """Which models' patches the page cannot show the attention of."""
    left_out = " and ".join(each.name for each in subjects if each.maps and each.patches is None)
    text = f"What single patches of {left_out} attend to is left out to keep the page small; lower images."
    return [text] if left_out else []


def _format(sources: Sources) -> Format:
    """The images that the models take."""
    if not sources.runs:
        return format_of(next(iter(sources.models.values())))
    data = sources.first.config.dataset
    return Format(data.image_size, data.channels, data.mean, data.std)


def _class_names(sources: Sources, subjects: list[Subject]) -> list[str]:
    """Those of the data set; numbers where there is none."""
    if sources.data is not None:
        return sources.data.class_names
    return [f"class {number}" for number in range(1 + max(max(each.predicted) for each in subjects))]


def _note_on_weights(settings: Settings) -> list[str]:
    """A warning of a model that is not trained."""
    if settings.model is None or not settings.model.startswith("timm:") or settings.pretrained:
        return []
    note = f"The weights of {settings.model} are random: it is not trained; set pretrained=true."
    log.warning("warning: %s%s", note[0].lower(), note[1:])
    return [note]
