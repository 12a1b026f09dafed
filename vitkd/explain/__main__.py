"""Where a student looks, and whether it learned that from its teacher: `python -m vitkd.explain run=…`."""

from vitkd.process.start import start

start(__name__)

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from omegaconf import DictConfig

from vitkd.cli.command import run_command
from vitkd.cli.console import Job, start_logging
from vitkd.config.schema import instantiate
from vitkd.errors import ConfigError
from vitkd.evaluate.__main__ import device_of
from vitkd.explain.gallery.files import FILES, files_of
from vitkd.explain.job import explain_pictures, explain_test_split
from vitkd.explain.settings import Settings
from vitkd.explain.sources import open_sources
from vitkd.runs.files import write_atomically

log = logging.getLogger("vitkd")


def main() -> None:
    """Explain what the command line names."""
    run_command("explain", explain_job)


def explain_job(composed: DictConfig, job: Job) -> None:
    """Load the models, explain them, and write figures, arrays, metrics and the page into one folder."""
    start_logging()
    settings = instantiate("", Settings, composed)
    settings.check_files()
    check_place(settings.folder)
    with open_sources(settings, device_of(settings.accelerator)) as sources:
        explain = explain_test_split if settings.image is None else explain_pictures
        explanation = explain(settings, sources)
    job.folder = str(settings.folder)
    write(files_of(explanation), settings.folder)


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
    if "config.yaml" in names or (names & FILES and "maps.npz" not in names):
        raise ConfigError(f"out={folder}: holds other files than an explanation's; name a folder of its own")


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write every file, each whole or not at all, and remove those of an earlier explanation."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
    for name in FILES - files.keys():
        (folder / name).unlink(missing_ok=True)
    log.info("figures   %s", ", ".join(sorted(name for name in files if name.endswith(".png"))) or "none")
    log.info("arrays    %s", folder / "maps.npz")
    log.info("page      %s", folder / "index.html")


if __name__ == "__main__":
    main()
