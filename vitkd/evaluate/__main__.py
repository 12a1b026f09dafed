"""Measure a finished run again, from its folder alone: `python -m vitkd.evaluate run=outputs/…`."""

import gc

from vitkd.process.start import start

start(__name__)
# Imports make hardly any garbage, and collecting it takes half a second of four.
COLLECTS = gc.isenabled()
gc.disable()

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from vitkd.cli.command import run_command
from vitkd.cli.console import Job, print_comparison, print_hardest_classes, start_logging
from vitkd.config.computing import compute_as
from vitkd.config.schema import instantiate
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError, one_line
from vitkd.evaluate.measure import measure_both
from vitkd.models import load_model
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import check_images
from vitkd.runs.load import config_of
from vitkd.runs.results import read_teacher_predictions

if COLLECTS:
    gc.enable()


@dataclass
class Settings:
    """What the command line says; conf/evaluate.yaml describes each."""

    run: str
    root: str | None
    paths: dict[str, Any]
    accelerator: str


def main() -> None:
    """Measure the run of the command line."""
    run_command("evaluate", evaluate_run)


def evaluate_run(composed: DictConfig, job: Job) -> None:
    """Compute the test metrics again and compare them with the run's own; exit code 1 if one differs."""
    start_logging()
    settings = instantiate("", Settings, composed)
    folder = RunFolder.existing(Path(settings.run))
    reported = folder.read_metrics()
    config = config_of(folder, settings.paths.get("data"), settings.root)
    last, _ = load_from_checkpoint(folder.last)
    best = load_model(folder.student)
    device = device_of(settings.accelerator)
    compute_as(config, device)
    with closing(ImageDataModule(config.dataset, config.paths.data, config.seed)) as data:
        images = data.loader("test", device)
        known = None
        # Of other images, its predictions say nothing.
        if check_images(folder, config, data):
            known = read_teacher_predictions(
                folder.predictions, len(images.sampler.index), last.config.num_classes
            )
        teacher = None if known is None else torch.from_numpy(known)
        test = measure_both(last, best, images, device, teacher)
    all_equal = print_comparison(reported, test.metrics)
    print_hardest_classes(test.last.confusion.tolist(), data.class_names)
    if not all_equal:
        sys.exit(1)


def device_of(accelerator: str) -> torch.device:
    """The device behind `accelerator`, which need not be the one that the run was trained on."""
    try:
        return L.Trainer(accelerator=accelerator, devices=1, logger=False).strategy.root_device
    except Exception as error:  # Lightning and the accelerators raise many kinds
        raise ConfigError(f"accelerator={accelerator}: {one_line(error)}") from error


if __name__ == "__main__":
    main()
