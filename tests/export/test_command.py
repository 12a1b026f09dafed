"""`python -m vitkd.export` exports a finished run, or says in one line why not."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from vitkd.data import ImageDataModule, Torchvision
from vitkd.export.sources import IMAGES, read_sources, sample_pixels
from vitkd.models import digest, load_model, save_model
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.load import config_of

QUICK = "format=torch_export"
ROWS = [
    ("run=nowhere", "run=nowhere: not a run folder"),
    ("run=.", "run=.: not a run folder"),
    ("run=RUN format=onx", "format=onx: choose onnx or torch_export"),
    ("run=RUN epoch=first", "epoch=first: choose best or last"),
    ("run=RUN out=no/where.onnx", "no/where.onnx: cannot be written (No such file or directory)"),
    ("run=RUN format=onnx out=model.pt2", "out=model.pt2: must end with .onnx with format=onnx"),
    ("run=RUN out=there.onnx", "out=there.onnx: there.onnx exists already; remove it"),
    ("run=RUN out=used.onnx", "out=used.onnx: used_onnx.py exists already; remove it"),
    ("run=RUN out=folder.onnx", "out=folder.onnx: folder.onnx exists already"),
    ("run=RUN root=nowhere", "root=nowhere: there is no such folder"),
    ("", "run: is missing and required"),
    ("run=RUN fromat=onnx", "fromat: no such setting; did you mean format?"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder."""
    (tmp_path / "here" / "folder.onnx").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("there.onnx").write_text("mine")
    Path("used_onnx.py").write_text("mine")
    return tmp_path / "here"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The run with its teacher, to be changed."""
    outputs = tmp_path / "outputs"
    shutil.copytree(finished.parents[1], outputs, ignore=shutil.ignore_patterns("student*.py", "student.pt2"))
    return outputs / "digits" / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("line", "says"), ROWS, ids=[row[0] for row in ROWS])
def test_bad_input_is_one_line(line, says, command, finished, folder):
    before = contents(folder) | contents(finished)

    ended = command("export", *shlex.split(line.replace("RUN", str(finished))))

    assert ended.code == 2
    (error,) = ended.err.splitlines()
    assert says in error
    assert contents(folder) | contents(finished) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_a_package_it_says_how_to_get_it(package, command, finished, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)

    ended = command("export", f"run={finished}", "format=onnx")

    assert ended.code == 2
    (error,) = ended.err.splitlines()
    assert error.startswith(f"error: {package} cannot be imported")
    assert error.endswith("pip install 'vitkd[onnx]'")


DAMAGE = {
    "student.safetensors": ("half", "student.safetensors: cannot be read"),
    "status.json": ('{"state": "stopped"}', "is not finished (it is stopped)"),
    "checkpoints/last.ckpt": ("half", "last.ckpt: is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_or_unfinished_run_is_one_line(name, command, copy):
    content, says = DAMAGE[name]
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content == "half" else content.encode())
    before = contents(copy)

    epoch = "last" if "last" in name else "best"
    ended = command("export", f"run={copy}", QUICK, f"epoch={epoch}")

    assert ended.code == 2
    (error,) = ended.err.splitlines()
    assert says in error
    assert contents(copy) == before


def exported_logits(file: Path, images: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    texts = {"class_names": ""}
    with torch.inference_mode():
        logits = torch.export.load(file, extra_files=texts).module()(images)
    return logits, json.loads(texts["class_names"])


def test_it_exports_the_student_of_a_run_and_compares_it_with_its_teacher(command, copy):
    (copy / "student.pt2").write_text("an export before")

    ended = command("export", f"run={copy}", QUICK)

    assert (ended.code, ended.err) == (0, "")
    config = config_of(RunFolder(copy), None, None)
    data = ImageDataModule(config.dataset, config.paths.data, 0)
    batch = data.first("test", 9)
    pixels = batch.image * config.dataset.std[0] + config.dataset.mean[0]
    logits, names = exported_logits(copy / "student.pt2", pixels)
    with torch.inference_mode():
        torch.testing.assert_close(logits, load_model(copy)(batch.image).logits, rtol=0, atol=1e-5)
    assert names == data.class_names
    rows = [line.split("  ")[0] for line in ended.out.splitlines()]
    assert {"student, PyTorch", "student, torch.export", "teacher, PyTorch"} <= {*rows}
    assert f"{torch.get_num_threads()} thread(s)" in ended.out
    assert ended.out.splitlines()[-1] == f"use       python {copy / 'student_pt2.py'} PICTURE ..."


def test_without_its_teacher_the_table_is_shorter_and_out_is_where_it_goes(command, copy, tmp_path):
    shutil.rmtree(copy.parents[1] / "teachers")
    before = contents(copy)

    ended = command("export", f"run={copy}", QUICK, f"out={tmp_path / 'a model.pt2'}")

    assert ended.code == 0, ended.err
    assert "the table is without the teacher" in ended.out
    assert "student, PyTorch" in ended.out
    assert "teacher, PyTorch" not in ended.out
    assert (tmp_path / "a model_pt2.py").is_file()
    assert contents(copy) == before


def test_no_parity_no_file(command, copy, monkeypatch):
    monkeypatch.setattr("vitkd.export.parity.TOLERANCE", -1.0)
    before = contents(copy)

    ended = command("export", f"run={copy}", QUICK)

    assert ended.code == 1
    (error,) = ended.err.splitlines()
    assert "differ from PyTorch's" in error
    assert contents(copy) == before


def test_the_epoch_is_as_chosen(copy):
    """Its one epoch is the best and the last, so one of them is changed."""
    changed = load_model(copy)
    torch.nn.init.zeros_(changed.head.bias)
    save_model(changed, copy / "student.safetensors", {"class_names": ["0"] * 10})

    best, last = (read_sources(copy, epoch, None, None).student.model for epoch in ("best", "last"))

    assert digest(best) == digest(changed)
    assert digest(last) == digest(load_from_checkpoint(copy / "checkpoints" / "last.ckpt")[0])
    assert digest(best) != digest(last)


def test_images_that_are_not_here_are_not_downloaded(finished, tmp_path, monkeypatch):
    """The file is then checked with random images of the same shape."""
    monkeypatch.setattr("vitkd.data.staging.RemoteFile.download", pytest.fail)
    config = config_of(RunFolder(finished), None, None)
    facts = {"channels": 1, "image_size": 28, "mean": [0.1], "std": [0.3], "patch_size": 7}
    config.dataset = Torchvision(name="mnist", num_classes=10, source="MNIST", **facts)
    config.paths.data = str(tmp_path)

    first, second = sample_pixels(config), sample_pixels(config)

    assert (first.shape, first.dtype) == ((IMAGES, 1, 28, 28), torch.uint8)
    assert not torch.equal(first, second)


def test_images_that_are_here_are_the_first_of_the_test_split(finished):
    config = config_of(RunFolder(finished), None, None)

    assert torch.equal(sample_pixels(config), config.dataset.load(Path())["test"].images[:IMAGES])


@pytest.mark.slow
def test_a_real_process_says_no_more_than_that(process, finished, tmp_path):
    """Not what onnxscript does to the graph."""
    ended = process("export", f"run={finished}", f"out={tmp_path / 'student.onnx'}", cwd=tmp_path)

    assert (ended.code, ended.err) == (0, "")
    first, table, *_, parity, model, use = ended.out.splitlines()
    assert first.startswith(f"exporting {finished}, best epoch")
    assert table.split() == ["size", "batch", "of", "1", "batch", "of", "64"]
    assert [line.split()[0] for line in (parity, model, use)] == ["parity", "model", "use"]
