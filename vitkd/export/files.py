"""The files of an export: the student, and a Python program that uses it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import vitkd
from vitkd.errors import RunError, one_line
from vitkd.export.classifier import Classifier
from vitkd.export.formats import Format
from vitkd.export.parity import check_parity
from vitkd.export.sources import Sources
from vitkd.runs.files import write_atomically, write_problem

LONGEST_REASON = 200


def write_student(file: Path, form: Format, sources: Sources) -> float:
    """Write the student to `file`, run it, and return by how much its logits differ from PyTorch's.

    Raises RunError if it cannot be exported or written, or differs too much; then there is no file.
    """
    differences = []

    def run_it(written: Path) -> None:
        differences.append(check_parity(form.open(written), sources.student, sources.pixels))

    with one_line_errors(form, sources.student):
        content = form.to_bytes(sources.student, about(sources))
        write_atomically(file, content, check=run_it)
    return differences[0]


@contextmanager
def one_line_errors(form: Format, student: Classifier) -> Iterator[None]:
    """RunError for a full disk, and for an operation that the format, or what runs it, does not know."""
    try:
        yield
    except RunError:
        raise
    except OSError as error:
        if problem := write_problem(error):
            raise RunError(f"{problem} or set out=FILE") from error
        raise
    except Exception as error:  # exporters and runtimes raise almost anything
        reason = one_line(error)[:LONGEST_REASON]
        raise RunError(
            f"{student.model.config}: cannot be exported for {form.runtime} ({reason}); choose another format"
        ) from error


def about(sources: Sources) -> dict[str, str]:
    """What a file says about itself."""
    shape = ", ".join(map(str, sources.student.size))
    colours = "grey" if sources.student.size[0] == 1 else "RGB"
    return {
        "class_names": json.dumps(sources.class_names, ensure_ascii=False),
        "input": f"images: float32 [batch, {shape}] in 0..1, {colours}, not normalised",
        "output": f"logits: float32 [batch, {len(sources.class_names)}]",
        "made_by": f"vitkd {vitkd.__version__}",
    }


def write_program(program: Path, file: Path, form: Format, student: Classifier) -> None:
    """Write a Python program that classifies pictures by `file`, which lies beside it."""
    environment = Environment(
        loader=PackageLoader("vitkd.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    channels, size, _ = student.size
    facts = {"file": file.name, "module": form.module, "channels": channels, "size": size}
    write_atomically(program, environment.get_template("program.py.jinja").render(facts))
