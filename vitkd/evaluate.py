"""Measure a finished run again, from its folder alone: `python -m vitkd.evaluate run=outputs/…`."""

from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from vitkd.cli import entry_point
from vitkd.config import parse
from vitkd.data import ImageDataModule
from vitkd.errors import ConfigError
from vitkd.runs import results
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.console import print_comparison, start_logging
from vitkd.runs.folder import RunFolder


@entry_point("evaluate")
def main(composed: DictConfig) -> None:
    """Compute the test figures again and print them beside those that the run wrote."""
    start_logging()
    folder = RunFolder.existing(Path(str(composed.run)))
    reported = folder.read_metrics()
    settings = folder.read_config()
    settings["paths"]["data"] = composed.paths.data or settings["paths"]["data"]
    config = parse(OmegaConf.create(settings))
    last, _ = load_from_checkpoint(folder.last)
    had_validation = reported.get("val/acc_best") is not None
    best = load_from_checkpoint(folder.best)[0] if had_validation else last
    teacher = results.read_teacher_predictions(folder)
    data = ImageDataModule(config.dataset, config.paths.data, config.seed)
    device = device_of(composed.accelerator)
    test, _ = results.measure(last, best, data.loader("test", device), device, teacher)
    print_comparison(reported, test)


def device_of(accelerator: str) -> torch.device:
    """The device behind `accelerator`, which need not be the one that the run was trained on."""
    try:
        return L.Trainer(accelerator=accelerator, devices=1, logger=False).strategy.root_device
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"accelerator={accelerator}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
