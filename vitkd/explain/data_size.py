"""What `by_data_size` does: runs that differ in their share of the training images, in one figure."""

import logging
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkd.config.roles import first_difference
from vitkd.config.run import Config
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.explain.gallery.data_size import data_size_figure
from vitkd.explain.gallery.figures import png
from vitkd.explain.gallery.files import as_json
from vitkd.explain.job import in_random_order
from vitkd.explain.measures.data_size import OfSize, Trained, by_size, measure_sizes
from vitkd.explain.settings import Settings
from vitkd.explain.sources import check_same_images
from vitkd.models import ModelConfig
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import check_images
from vitkd.runs.load import config_of, load_student

log = logging.getLogger("vitkd")

DATA_SIZE_FILES = {"data_size.json", "data_size.png"}
"""all that there may be"""
MOST_IMAGES = 512
"""test images on which models are measured"""
LEAST_IMAGES = 4
"""for which CKA is defined"""
SHARED = (
    *("dataset", "student", "method", "alpha", "weighting", "granularity", "loss"),
    *("optimizer", "schedule", "label_smoothing", "ema_decay"),
)
"""groups of settings in which all runs are alike"""
FREE = ("train_fraction", "max_epochs", "passes")
"""settings of the data set in which they may differ: how many images, and for how long"""


def files_by_data_size(settings: Settings, device: torch.device) -> dict[str, bytes]:
    """File name → content, of all finished runs below the folder that `settings.by_data_size` names.

    Raises ConfigError if there are none, or if they differ in more than their training images.
    """
    folders = find_runs(Path(str(settings.by_data_size)))
    configs = [config_of(folder, settings.paths.get("data"), settings.root) for folder in folders]
    check_alike(folders, configs)
    with closing(ImageDataModule(configs[0].dataset, configs[0].paths.data, 0)) as data:
        trained = []
        for folder, config in zip(folders, configs, strict=True):
            check_images(folder, config, data)
            model = load_student(folder, settings.epoch).to(device)
            count = len(data.training_images(config.dataset.train_fraction))
            trained.append(Trained(model, count, config.seed))
        check_maps(trained[0].model.config)
        images = drawn_images(data, settings.seed, device)
    log.info("measuring %d models on %d test images", len(trained), len(images))
    sizes = measure_sizes(trained, images)
    title = f"{configs[0].dataset.name}, {trained[0].model.config}"
    of_runs = described(folders, trained, sizes)
    return {"data_size.json": as_json(of_runs), "data_size.png": png(data_size_figure(sizes, title))}


def find_runs(top: Path) -> list[RunFolder]:
    """The finished runs in and below a folder; those of teachers in a store are left out.

    Raises ConfigError if there are none.
    """
    places = sorted(place.parent for place in top.rglob("student.safetensors"))
    runs = [RunFolder(place) for place in places if "teachers" not in place.relative_to(top).parts]
    done = [run for run in runs if run.state == "done"]
    if not done:
        raise ConfigError(f"by_data_size={top}: has no finished run; python -m vitkd.train makes some")
    return done


def check_alike(folders: Sequence[RunFolder], configs: Sequence[Config]) -> None:
    """ConfigError unless runs differ in training images and seeds alone, as far as that shapes a student."""
    check_same_images([config.dataset for config in configs], "by_data_size")
    first, *others = map(shared_settings, configs)
    for folder, other in zip(folders[1:], others, strict=True):
        if setting := first_difference(first, other):
            raise ConfigError(
                f"by_data_size: {folders[0].path} and {folder.path} differ in "
                f"{setting.removesuffix('._target_')}; name a folder of runs that differ in "
                "dataset.train_fraction and seed"
            )


def shared_settings(config: Config) -> dict[str, Any]:
    """Those of a run in which all have to be alike, by group."""
    shared = {group: config.resolved[group] for group in SHARED}
    dataset = {name: value for name, value in shared["dataset"].items() if name not in FREE}
    return {**shared, "dataset": dataset}


def check_maps(student: ModelConfig) -> None:
    """ConfigError unless all blocks attend, over the same tokens."""
    layouts = student.attention_layouts()
    if not layouts:
        raise ConfigError(f"by_data_size: student={student} has no attention maps; name runs of a ViT")
    if any(layout.windows > 1 for layout in layouts):
        raise ConfigError(
            f"by_data_size: student={student} attends within windows, and its blocks have other tokens than "
            "each other; name runs of a ViT"
        )


def drawn_images(data: ImageDataModule, seed: int, device: torch.device) -> Tensor:
    """At most MOST_IMAGES of the test split [B, C, H, W], drawn by the seed."""
    batches = in_random_order(data, seed, device)
    count = ceil(MOST_IMAGES / data.dataset.eval_batch_size)
    images = torch.cat([batch.image for batch in islice(batches, count)])[:MOST_IMAGES]
    if len(images) < LEAST_IMAGES:
        raise ConfigError(
            f"by_data_size: there are {len(images)} test images; add some, at least {LEAST_IMAGES}"
        )
    return images


def described(
    folders: Sequence[RunFolder], trained: Sequence[Trained], sizes: Sequence[OfSize]
) -> list[dict[str, Any]]:
    """What `data_size.json` holds: by size its runs, and by run [L, H] distances and [L, L] alignments."""
    return [
        {
            "training_images": size.images,
            "runs": [str(folders[place].path) for place in places],
            "distance": size.distance,
            "cka": size.cka,
        }
        for size, places in zip(sizes, by_size(trained).values(), strict=True)
    ]
