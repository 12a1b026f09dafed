"""A Swin from its training to every command that reads its run."""

import json
from pathlib import Path
from typing import Any

import pytest

SIZES = ("img_size=8", "window_size=2", "depths=[2,1]", "num_heads=[2,2]", "embed_dim=8")
BRIEF = [
    *("trainer=cpu", "trainer.max_epochs=1", "teacher.max_epochs=1", "dataset.batch_size=128"),
    *("teacher=swin", "loss=kl", *(f"teacher.{size}" for size in SIZES)),
]
SWIN = ["student=swin", "granularity=encoder", *(f"student.{size}" for size in SIZES)]

pytestmark = pytest.mark.slow


@pytest.fixture
def run(command, tmp_path) -> Any:
    def run(name: str, *arguments: str, code: int = 0) -> Any:
        brief = [*BRIEF, f"paths.outputs={tmp_path}"] if name == "train" else []
        ended = command(name, *brief, *arguments)
        assert ended.code == code, ended.err
        return ended

    return run


def test_it_learns_block_by_block_and_is_measured_and_reported(run, tmp_path):
    run("train", *SWIN, "name=swin")
    folder = Path(tmp_path, "digits", "swin")

    pairs = json.loads((folder / "pairs.json").read_text())
    assert [(pair["student_block"], pair["teacher_block"]) for pair in pairs] == [(0, 0), (1, 1), (2, 2)]
    run("evaluate", f"run={folder}")
    run("report", str(tmp_path))
    (line,) = run("explain", f"run={folder}", code=2).err.splitlines()
    assert "attends within windows" in line


def test_a_vit_that_it_taught_is_explained_without_its_maps(run, tmp_path):
    run("train", "student=small", "method=logit", "name=vit")

    ended = run("explain", f"run={tmp_path / 'digits' / 'vit'}", "images=2")

    assert "attends within windows" in ended.out + ended.err
    assert "only its predictions" in ended.out + ended.err
