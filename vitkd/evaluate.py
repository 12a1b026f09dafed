"""Measure a finished run again, from its folder alone: `python -m vitkd.evaluate run=outputs/…`."""

from pathlib import Path

import lightning as L
from omegaconf import DictConfig, OmegaConf

from vitkd.cli import entry_point
from vitkd.config import parse
from vitkd.data import ImageDataModule
from vitkd.runs import results
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.console import print_comparison, start_logging
from vitkd.runs.folder import RunFolder


@entry_point("evaluate")
def main(composed: DictConfig) -> None:
    """Compute the test figures again and print them beside those that the run wrote."""
    start_logging()
    folder = RunFolder.existing(Path(composed.run))
    reported = folder.read_metrics()
    settings = folder.read_config()
    settings["paths"]["data"] = composed.paths.data or settings["paths"]["data"]
    config = parse(OmegaConf.create(settings))
    last, _ = load_from_checkpoint(folder.last)
    best, _ = load_from_checkpoint(folder.best) if folder.best.exists() else (last, 0)
    teacher = results.read_teacher_predictions(folder)
    data = ImageDataModule(config.dataset, config.paths.data, config.seed)
    device = L.Trainer(accelerator=composed.accelerator, devices=1, logger=False).strategy.root_device
    test, _ = results.measure(last, best, data.loader("test", device), device, teacher)
    print_comparison(reported, test)


if __name__ == "__main__":
    main()
