"""Where a student looks, and whether it learned that from its teacher: `python -m vitkd.explain run=…`."""

from vitkd.process.start import start

start(__name__)

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

import torch
from omegaconf import DictConfig

from vitkd.cli.command import run_command
from vitkd.cli.console import Job, start_logging
from vitkd.config.schema import instantiate
from vitkd.errors import ConfigError
from vitkd.evaluate.__main__ import device_of
from vitkd.explain.data_size import DATA_SIZE_FILES, files_by_data_size
from vitkd.explain.gallery.files import FILES, files_of
from vitkd.explain.job import explain_pictures, explain_test_split
from vitkd.explain.settings import Settings
from vitkd.explain.sources import open_sources
from vitkd.runs.files import write_atomically

log = logging.getLogger("vitkd")

ALL_FILES = FILES | DATA_SIZE_FILES
FIRST_FILES = {"maps.npz", "data_size.json"}
"""written before any other, they tell whose folder this is"""


def main() -> None:
    """Explain what the command line names."""
    run_command("explain", explain_job)


def explain_job(composed: DictConfig, job: Job) -> None:
    """Load the models, explain them, and write what was found into one folder."""
    start_logging()
    settings = instantiate("", Settings, composed)
    settings.check_files()
    check_place(settings.folder)
    device = device_of(settings.accelerator)
    files = files_by_data_size if settings.by_data_size is not None else explained_files
    content = files(settings, device)
    job.folder = str(settings.folder)
    write(content, settings.folder)


def explained_files(settings: Settings, device: torch.device) -> dict[str, bytes]:
    """File name → content, of what models look at."""
    with open_sources(settings, device) as sources:
        explain = explain_test_split if settings.image is None else explain_pictures
        return files_of(explain(settings, sources))


def check_place(folder: Path) -> None:
    """ConfigError if `folder` cannot be written to, or holds other files than an explanation's."""
    made: list[Path] = []
    try:
        made += [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            names = {each.name for each in folder.iterdir()}
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror}); set out=DIR") from error
    finally:
        for each in made:
            with suppress(OSError):
                each.rmdir()
    if "config.yaml" in names or (names & ALL_FILES and not names & FIRST_FILES):
        raise ConfigError(f"out={folder}: holds other files than an explanation's; name a folder of its own")


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write every file, each whole or not at all, and remove those of an earlier explanation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    for name in ALL_FILES - files.keys():
        (folder / name).unlink(missing_ok=True)
    log.info("figures   %s", ", ".join(sorted(name for name in files if name.endswith(".png"))) or "none")
    for what, name in (("arrays", "maps.npz"), ("metrics", "data_size.json"), ("page", "index.html")):
        if name in files:
            log.info("%-9s %s", what, folder / name)


if __name__ == "__main__":
    main()
