"""An exported file answers as the model does, at every batch size, and is used without vitkd."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vitkd.data.decoding import decode
from vitkd.errors import RunError
from vitkd.export import files
from vitkd.export.classifier import Classifier, Classify
from vitkd.export.files import write_program, write_student
from vitkd.export.formats import FORMATS, Format
from vitkd.export.sources import Sources
from vitkd.models import ModelConfig, ResNetConfig, ViTConfig

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
NAMES = ["cat", "d'og", 'a "bee"', "ü", "\\n"]
WITHOUT_VITKD = """
import runpy, sys
sys.modules["vitkd"] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SHAPE = {"image_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4}
SIZES = {"embed_dim": 12, "depth": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}


def sources_of(config: ModelConfig) -> Sources:
    """A student whose logits differ between images, with uneven statistics where it has any."""
    torch.manual_seed(1)
    model = config.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif hasattr(module, "log_temperature"):
            nn.init.normal_(module.log_temperature)
    shape = (4, config.channels, config.image_size, config.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    mean, std = MEAN[: config.channels], STD[: config.channels]
    return Sources(Classifier(model, mean, std).eval(), None, NAMES, pixels)


class Exported(NamedTuple):
    name: str
    form: Format
    file: Path
    program: Path
    sources: Sources


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tmp_path_factory) -> Exported:
    name, form = request.param, FORMATS[request.param]
    folder, sources = tmp_path_factory.mktemp(request.param), sources_of(ViTConfig(**SHAPE, **SIZES))
    file, program = folder / f"it's{form.suffix}", folder / "use.py"
    write_student(file, form, sources)
    write_program(program, file, form, sources.student)
    return Exported(name, form, file, program, sources)


@torch.inference_mode()
def assert_same(classify: Classify, sources: Sources) -> None:
    """By hand: images in 0..1, mean and std a channel, the model."""
    model, (channels, height, width) = sources.student.model, sources.student.size
    mean, std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))
    for batch in (1, 2, 3, 17):
        images = torch.rand(batch, channels, height, width)
        expected = model((images - mean) / std).logits
        assert batch == 1 or (expected[0] - expected[1]).abs().max() > 1e-3, "all images look alike to it"
        torch.testing.assert_close(classify(images), expected, rtol=0, atol=1e-5)


def test_it_answers_as_the_model_does_at_every_batch_size(exported):
    assert_same(exported.form.open(exported.file), exported.sources)


def about(exported: Exported) -> Mapping[str, str]:
    """What the file says of itself, read by its format's own means."""
    if exported.name == "onnx":
        return {entry.key: entry.value for entry in onnx.load(exported.file).metadata_props}
    texts = dict.fromkeys(("class_names", "input", "output", "made_by"), "")
    torch.export.load(exported.file, extra_files=texts)
    return texts


def test_it_holds_the_class_names_and_says_what_it_takes(exported):
    texts = about(exported)

    assert json.loads(texts["class_names"]) == NAMES
    assert texts["input"] == "images: float32 [batch, 3, 8, 8] in 0..1, RGB, not normalised"
    assert texts["output"] == "logits: float32 [batch, 5]"


def test_it_names_no_place_on_this_machine(exported):
    content = exported.file.read_bytes()

    assert str(Path(files.__file__).parents[2]).encode() not in content
    assert sys.prefix.encode() not in content


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_an_onnx_file_is_whole_and_takes_any_batch(exported):
    model = onnx.load(exported.file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)

    ((images,), (logits,)) = model.graph.input, model.graph.output
    dims = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in (images, logits)]
    assert dims == [["batch", 3, 8, 8], ["batch", 5]]
    assert [*exported.file.parent.glob("*.data")] == []


def pictures_in(folder: Path) -> list[Path]:
    """Noise of several shapes and modes."""
    random = np.random.default_rng(0)
    pictures = []
    for number, (shape, mode) in enumerate([((8, 8, 3), "RGB"), ((9, 20, 3), "RGB"), ((30, 12), "L")]):
        pictures.append(folder / f"{number}.png")
        Image.fromarray(random.integers(256, size=shape, dtype=np.uint8), mode).save(pictures[-1])
    return pictures


@torch.inference_mode()
def predicted(sources: Sources, pictures: list[Path]) -> list[str]:
    """The model's classes of pictures that vitkd reads."""
    channels, size, _ = sources.student.size
    images = torch.stack([decode(picture, size, channels) for picture in pictures]) / 255
    return [sources.class_names[label] for label in sources.student(images).argmax(-1)]


def assert_program_agrees(exported: Exported, tmp_path: Path) -> None:
    pictures = pictures_in(tmp_path)
    line = [sys.executable, "-c", WITHOUT_VITKD, exported.program, *pictures]

    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, encoding="utf-8")

    assert done.returncode == 0, done.stderr
    names = predicted(exported.sources, pictures)
    assert done.stdout.splitlines() == [f"{p} {name}" for p, name in zip(pictures, names, strict=True)]


@pytest.mark.parametrize("exported", ["onnx"], indirect=True)
def test_the_program_beside_it_needs_no_vitkd(exported, tmp_path):
    assert_program_agrees(exported, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["torch_export"], indirect=True)
def test_nor_does_that_of_the_other_format(exported, tmp_path):
    assert_program_agrees(exported, tmp_path)


def test_the_docs_show_the_program(tmp_path):
    shown = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")

    student = sources_of(ViTConfig(**(SHAPE | {"channels": 1}), **SIZES)).student
    write_program(tmp_path / "use.py", Path("student.onnx"), FORMATS["onnx"], student)

    assert f"```py\n{(tmp_path / 'use.py').read_text(encoding='utf-8')}```\n" in shown


def broken(change: Callable[[Tensor, int], Tensor]) -> Format:
    """A format whose files answer with the logits of a batch after `change`."""

    def run(file: Path) -> Classify:
        return lambda images: change(STUDENT.student(images), len(images))

    return replace(FORMATS["torch_export"], to_bytes=lambda *_: b"content", open=run)


STUDENT = sources_of(ViTConfig(**SHAPE, **SIZES))


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda logits, batch: logits + 2e-4, 1),
        (lambda logits, batch: logits + 2e-4 * (batch > 1), 4),
        (lambda logits, batch: logits * float("nan"), 1),
    ],
    ids=["by a constant", "in batches alone", "not a number"],
)
def test_a_file_that_answers_otherwise_does_not_stay(change, batch, tmp_path):
    (tmp_path / "student.pt2").write_bytes(b"before")

    with pytest.raises(RunError, match=f"at batch size {batch}, more than 0.0001") as refused:
        write_student(tmp_path / "student.pt2", broken(change), STUDENT)

    assert "\n" not in str(refused.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_tenth_of_that_is_rounding(tmp_path):
    found = write_student(tmp_path / "student.pt2", broken(lambda logits, _: logits + 1e-5), STUDENT)

    assert found == pytest.approx(1e-5, rel=0.1)


def test_what_a_runtime_does_not_know_is_one_line(tmp_path):
    def raise_error(logits: Tensor, batch: int) -> Tensor:
        raise KeyError("unknown operation\nat line 3")

    with pytest.raises(RunError, match=r"blocks×heads.*torch\.export.*unknown operation"):
        write_student(tmp_path / "student.pt2", broken(raise_error), STUDENT)

    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, monkeypatch):
    def full(file: IO[bytes]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitkd.runs.files.force_to_disk", full)
    (tmp_path / "student.pt2").write_bytes(b"before")

    with pytest.raises(RunError, match=r"No space left on device.*make room or set out=FILE"):
        write_student(tmp_path / "student.pt2", broken(lambda logits, _: logits), STUDENT)

    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


STUDENTS = {
    "spt": ViTConfig(**SHAPE, **SIZES, tokenizer="spt"),
    "lsa": ViTConfig(**SHAPE, **SIZES, attention="lsa"),
    "two heads": ViTConfig(**SHAPE, **SIZES, distillation_token=True),
    "all of a ViT": ViTConfig(
        **(SHAPE | {"channels": 1}),
        **(SIZES | {"depth": 3}),
        **{"tokenizer": "spt", "attention": "lsa", "distillation_token": True, "qkv_bias": True},
        **{"dropout": 0.1, "emb_dropout": 0.1, "patch_norm": False},
    ),
    "resnet": ResNetConfig(32, 3, 5),
    "resnet, small stem": ResNetConfig(8, 1, 5, stem="small"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("config", STUDENTS.values(), ids=STUDENTS)
def test_so_does_every_student(config, form, tmp_path):
    sources = sources_of(config)

    write_student(tmp_path / "student", form, sources)

    assert_same(form.open(tmp_path / "student"), sources)
