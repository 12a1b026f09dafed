"""What the command does: explain runs on their test split, or the user's own pictures.

Shapes: N images, C channels, H × W pixels.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from vitkd.data import ImageDataModule, Loader
from vitkd.data.loader import EpochOrder
from vitkd.errors import ConfigError, suggest
from vitkd.explain.gallery.cells import BOTH_RIGHT, IN_WORDS, Indices, cells, choose, over_represented
from vitkd.explain.gallery.explanation import Explanation, OfMethods
from vitkd.explain.gallery.figures import denormalise
from vitkd.explain.maps.methods import CLASS_SPECIFIC
from vitkd.explain.maps.recording import has_maps
from vitkd.explain.maps.subjects import (
    TEACHER,
    Subject,
    fits_one_image,
    maps_of,
    subject_of,
    with_regions,
    without_maps,
)
from vitkd.explain.measures.correctness import Correlation, correctness_correlation
from vitkd.explain.measures.faithfulness import MapsOfClasses, faithfulness
from vitkd.explain.measures.survey import Survey, survey
from vitkd.explain.settings import Settings
from vitkd.explain.sources import Sources, comparisons, read_picture
from vitkd.runs.load import Run

log = logging.getLogger("vitkd")


def explain_pictures(settings: Settings, sources: Sources) -> Explanation:
    """Where the models look in the pictures of `settings.image`."""
    paths = settings.find_pictures()
    size, channels, mean, std = sources.format
    pixels = torch.stack([read_picture(path, size, channels) for path in paths])
    subjects = _look(settings, sources, normalize(pixels, mean, std).to(sources.device))
    numbered = [f"class {i}" for i in range(1 + max(max(each.predicted) for each in subjects))]
    return Explanation(
        title=sources.title,
        source=", ".join(path.name for path in paths[:3]) + (" …" if len(paths) > 3 else ""),
        pixels=pixels,
        labels=[-1] * len(paths),
        cells=[""] * len(paths),
        numbers=[*range(len(paths))],
        class_names=numbered if len(sources.class_names) < len(numbered) else [*sources.class_names],
        subjects=subjects,
        notes=[*sources.notes(), *_note_on_weights(settings), *_note_on_patches(subjects)],
    )


def explain_test_split(settings: Settings, sources: Sources) -> Explanation:
    """Metrics of the whole test split, and maps of the images that the seed chooses from it."""
    runs, data, dataset = sources.runs, sources.data, sources.first.config.dataset
    assert data is not None
    if settings.of_class is not None:
        # Before the work, not after it.
        test_labels = data.loader("test", "cpu", rank=0, world_size=1).labels
        class_number(settings.of_class, data.class_names, test_labels.numpy())
    compared, remarks = comparisons(runs)
    for remark in remarks:
        log.info("%s", remark)
    notes = [*_note_on_students(sources), *sources.notes(), *remarks]
    log.info("measuring %s on the test split", ", ".join(sources.models))
    batches = in_random_order(data, settings.seed, sources.device)
    seen = survey(sources.models, (batch[:3] for batch in batches), compared)
    labels, class_names = seen.labels.numpy(), data.class_names
    of_cells = _cells(seen, next(iter(runs)))
    chosen, remarks = choose_images(of_cells, labels, class_names, settings)
    positions = [position for position, _ in chosen]
    images = _images(data, seen.numbers[positions], sources.device)
    log.info("explaining %d images by %s", len(images), ", ".join(settings.methods))
    subjects = _look(settings, sources, images)
    where = " and ".join(str(run.path) for run in runs.values())
    counted = of_cells if TEACHER in sources.models else {}
    return Explanation(
        title=sources.title,
        source=f"{where} · {dataset.name}, test split · {sources.first.epoch} epoch",
        epoch=settings.epoch,
        pixels=denormalise(images.cpu(), dataset.mean, dataset.std),
        labels=labels[positions].tolist(),
        cells=[name if counted else "" for _, name in chosen],
        numbers=seen.numbers[positions].tolist(),
        class_names=class_names,
        subjects=subjects,
        other_block=_other_block(sources.first),
        counts={name: len(indices) for name, indices in counted.items()},
        # Together, the cells have a 5 % chance of any false finding.
        over_represented={
            name: over_represented(indices, labels, class_names, 0.05 / len(counted))
            for name, indices in counted.items()
        },
        fidelity=seen.fidelity,
        correlations={name: _correlations(seen, name) for name in seen.fidelity},
        reach=seen.reach,
        faithfulness=_faithfulness(settings, sources, data, seen),
        notes=[*notes, *remarks, *_note_on_patches(subjects)],
    )


def _cells(seen: Survey, student: str) -> dict[str, Indices]:
    """The images by who is right; without a teacher they are all in the first cell, whoever is right."""
    labels = seen.labels.numpy()
    if TEACHER not in seen.predicted:
        return {BOTH_RIGHT: np.arange(len(labels))}
    return cells(labels, *(seen.predicted[name].numpy() for name in (TEACHER, student)))


def choose_images(
    of_cells: Mapping[str, Indices], labels: Indices, class_names: list[str], settings: Settings
) -> tuple[list[tuple[int, str]], list[str]]:
    """Positions of images to show, each with its cell; and notes on cells that have none."""
    chosen, notes, whose, label = [], [], "", settings.of_class
    if label is not None:
        wanted = labels == class_number(label, class_names, labels)
        of_cells = {name: indices[wanted[indices]] for name, indices in of_cells.items()}
        whose = f" of class {label}"
    for name, indices in of_cells.items():
        chosen += [(int(position), name) for position in choose(indices, settings.images, settings.seed)]
        if not len(indices):
            # No error: a good student leaves cells empty.
            notes.append(f"There is no image{whose} among {len(labels):,} where {IN_WORDS[name]}.")
    return chosen, notes


def class_number(name: str, class_names: list[str], labels: Indices) -> int:
    """A class's label; ConfigError if there is no such class, or none of its images."""
    if name not in class_names:
        hint = suggest(name, class_names)
        raise ConfigError(f"class {name}: the data set has none of that name; {hint}")
    if (number := class_names.index(name)) not in labels:
        raise ConfigError(f"of_class={name}: no image of that class is in the test split")
    return number


def in_random_order(data: ImageDataModule, seed: int, device: torch.device) -> Loader:
    """The test split's images, labels and positions in batches; a folder's files are sorted by class."""
    loader = data.loader("test", device, rank=0, world_size=1)
    permutation = torch.from_numpy(np.random.default_rng(seed).permutation(len(loader.sampler.index)))
    return _reordered(loader, permutation)


def _images(data: ImageDataModule, numbers: Tensor, device: torch.device) -> Tensor:
    """The normalised test images [N, C, H, W] at these positions of their split, in this order."""
    loader = _reordered(data.loader("test", device, rank=0, world_size=1), numbers)
    return torch.cat([batch.image for batch in loader])


def _reordered(loader: Loader, positions: Tensor) -> Loader:
    """The loader, yielding the test images at these positions in this order."""
    loader.sampler = EpochOrder(positions.to(loader.sampler.index.device), loader.sampler.batch_size)
    return loader


def _correlations(seen: Survey, student: str) -> dict[str, Correlation]:
    right = seen.predicted[student] == seen.labels
    teacher_right = seen.predicted[TEACHER] == seen.labels
    divergence = seen.fidelity[student].divergence
    return {
        "all test images": correctness_correlation(divergence, right),
        "those that the teacher has right": correctness_correlation(divergence, right, among=teacher_right),
    }


def _faithfulness(
    settings: Settings, sources: Sources, data: ImageDataModule, seen: Survey
) -> dict[str, OfMethods]:
    """Model → the faithfulness of its maps, on images drawn by the seed."""
    if settings.faithfulness_images == 0:
        return {}
    drawn = np.random.default_rng(settings.seed).permutation(len(seen.labels))[: settings.faithfulness_images]
    images = _images(data, seen.numbers[drawn], sources.device)
    labels = seen.labels[drawn].to(sources.device)
    mean, std = data.dataset.mean, data.dataset.std
    pixels = denormalise(images, mean, std)
    log.info("removing pixels of %d images, step by step", len(images))
    found: dict[str, OfMethods] = {}
    for name, model in ((name, model) for name, model in sources.models.items() if has_maps(model)):
        predicted = seen.predicted[name][drawn].to(sources.device)
        maps = {method: _maps_of(method, model, images, predicted, labels) for method in settings.methods}
        found[name] = faithfulness(
            model, pixels, lambda x: normalize(x, mean, std), maps, predicted, labels, seed=settings.seed
        )
    return found


def _maps_of(
    method: str, model: nn.Module, images: Tensor, predicted: Tensor, labels: Tensor
) -> Tensor | MapsOfClasses:
    """A method's maps, of both classes where they depend on the class."""
    if method in CLASS_SPECIFIC:
        return MapsOfClasses(*(maps_of(method, model, images, each) for each in (predicted, labels)))
    return maps_of(method, model, images, predicted)


def _other_block(run: Run) -> int | None:
    """The last student block that was not distilled, if some were and some not."""
    distilled = {pair["student_block"] for pair in run.outer_pairs}
    others = [block for block in range(len(run.student.attention)) if block not in distilled]
    return others[-1] if distilled and others else None


def _note_on_students(sources: Sources) -> list[str]:
    """Of two runs, which is which."""
    if len(sources.runs) < 2:
        return []
    notes = [f"{name}: {run.path}" for name, run in sources.runs.items()]
    if TEACHER in sources.models:
        notes.append(f"Right and wrong in the table and the cells are those of {next(iter(sources.runs))}.")
    return notes


def _look(settings: Settings, sources: Sources, images: Tensor) -> list[Subject]:
    """Every model's predictions and, if it has any, maps and regions of the images."""
    subjects = []
    for name, model in sources.models.items():
        if name == TEACHER and not has_maps(model):
            subjects.append(without_maps(name, model, images))
            continue
        block = sources.shown_blocks.get(name, -1)
        subject, features = subject_of(name, model, images, settings.methods, block)
        subjects.append(with_regions(subject, features, settings.regions))
    return subjects


def _note_on_patches(subjects: list[Subject]) -> list[str]:
    """Which models' patches the page cannot show the attention of."""
    left_out = [each for each in subjects if each.maps and each.patches is None]
    if not left_out:
        return []
    names = " and ".join(each.name for each in left_out)
    remedy = "; lower images" if all(map(fits_one_image, left_out)) else ""
    return [f"What single patches of {names} attend to is left out to keep the page small{remedy}."]


def _note_on_weights(settings: Settings) -> list[str]:
    """A warning of a model that is not trained."""
    if settings.model is None or not settings.model.startswith("timm:") or settings.pretrained:
        return []
    note = f"The weights of {settings.model} are random: it is not trained; set pretrained=true."
    log.warning("warning: %s%s", note[0].lower(), note[1:])
    return [note]
