"""A finished run's student as one file that works without vitkd: `python -m vitkd.export run=outputs/…`."""

from vitkd.process.start import start

start(__name__)

import logging
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from omegaconf import DictConfig

from vitkd.cli.command import run_command
from vitkd.cli.console import Job, show, start_logging
from vitkd.config.schema import instantiate
from vitkd.errors import ConfigError, check, check_choice
from vitkd.export.classifier import Classifier, Classify
from vitkd.export.files import write_program, write_student
from vitkd.export.formats import FORMATS
from vitkd.export.latency import comparison
from vitkd.export.sources import read_sources
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")


@dataclass
class Settings:
    """What the command line says; conf/export.yaml describes each."""

    run: str
    format: str
    epoch: str
    out: str | None
    root: str | None
    paths: dict[str, Any]

    def __post_init__(self) -> None:
        check_choice(self, "format", FORMATS)
        check_choice(self, "epoch", ("best", "last"))
        suffix = FORMATS[self.format].suffix
        check(self, "out", self.file.suffix == suffix, f"must end with {suffix} with format={self.format}")

    @property
    def file(self) -> Path:
        """Where to write to."""
        return Path(self.out or Path(self.run, f"student{FORMATS[self.format].suffix}"))

    @property
    def program(self) -> Path:
        """The Python program that shows how to use it."""
        return self.file.with_name(f"{self.file.stem}_{self.file.suffix[1:]}.py")


def main() -> None:
    """Export the student of the run of the command line."""
    run_command("export", export_run)


def export_run(composed: DictConfig, job: Job) -> None:
    """Write the student and a program that uses it, and show its size and latency beside the teacher's."""
    start_logging()
    settings = instantiate("", Settings, composed)
    form, file, program = FORMATS[settings.format], settings.file, settings.program
    form.check_installed()
    RunFolder.existing(Path(settings.run))
    check_place(settings)
    for library in ("onnx_ir", "onnxscript"):  # they log every node that they change, or leave
        logging.getLogger(library).setLevel(logging.ERROR)
    sources = read_sources(Path(settings.run), settings.epoch, settings.paths.get("data"), settings.root)
    job.folder = settings.run
    log.info("exporting %s, %s epoch, and checking the file", settings.run, settings.epoch)
    difference = write_student(file, form, sources)
    write_program(program, file, form, sources.student)
    models = in_pytorch("student", sources.student)
    models[f"student, {form.runtime}"] = form.open(file), file.stat().st_size
    show(*comparison(models | in_pytorch("teacher", sources.teacher), sources.student.size), "")
    log.info("parity    logits differ from PyTorch's by at most %.1e", difference)
    log.info("model     %s", file)
    log.info("use       python %s PICTURE ...", program)


def in_pytorch(name: str, model: Classifier | None) -> dict[str, tuple[Classify, int]]:
    """A row of the comparison, if there is such a model: the bytes are its weights'."""
    return {} if model is None else {f"{name}, PyTorch": (model, model.num_bytes)}


def check_place(settings: Settings) -> None:
    """ConfigError if the files cannot be written, or if `out` names what is there already."""
    file, program = settings.file, settings.program
    for place in (file, program):
        if place.is_dir() or (settings.out and place.exists()):
            raise ConfigError(f"out={file}: {place} exists already; remove it, or name another file")
    try:
        with TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); set out=FILE to another") from error


if __name__ == "__main__":
    main()
