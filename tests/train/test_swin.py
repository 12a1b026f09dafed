"""A Swin from its training to every command that reads its run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitkd.report.runs import read_run

SIZES = ("img_size=8", "window_size=2", "depths=[2,1]", "num_heads=[2,3]", "embed_dim=12")
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
    run("explain", f"run={folder}", "images=2", "faithfulness_images=4")
    with np.load(folder / "explain" / "maps.npz", allow_pickle=False) as maps:
        assert maps["student/attention"].shape[1:] == (3, 3, 4, 4)
        assert maps["student/heads"].tolist() == [2, 2, 3]
        assert (maps["student/attention"][:, :2, 2] == 0).all()
        # Each of a block's heads spreads 1 over the patches, in the merged stage too.
        np.testing.assert_allclose(maps["student/attention"].sum((-2, -1))[:, 2], 1, rtol=1e-5)
        np.testing.assert_allclose(maps["teacher/rollout"].sum((-2, -1)), 1, rtol=1e-5)
    assert (folder / "attention.png").stat().st_size > 0
    assert "not compared" not in (folder / "explain" / "index.html").read_text()
    fidelity = json.loads((folder / "explain" / "fidelity.json").read_text())
    learned = {(row["student_block"], row["teacher_block"]) for row in fidelity["rows"] if row["distilled"]}
    assert learned == {(0, 0), (1, 1), (2, 2)}
    assert fidelity["summary"]["js_distilled"] > 0
    assert read_run(folder).fidelity == (fidelity["summary"]["js_distilled"], "best")


def test_blocks_of_other_windows_are_shown_beside_the_reason(run, tmp_path):
    """One block of three learned, and of the others one has no such windows to be compared with."""
    blocks = ("granularity=block", "granularity.blocks=[2]", "granularity.teacher_blocks=[2]")
    run(
        "train",
        "student=swin",
        *(f"student.{size}" for size in SIZES),
        "student.depths=[1,2]",
        *blocks,
        "name=other",
    )
    folder = tmp_path / "digits" / "other"

    said = run("explain", f"run={folder}", "images=1", "faithfulness_images=0", "methods=[attention]").out

    assert "Blocks 1 and 1 of student and teacher are shown, not compared: 2×2 patches are not 4×4." in said
    rows = json.loads((folder / "explain" / "fidelity.json").read_text())["rows"]
    assert {row["student_block"] for row in rows} == {0, 2}


def test_a_vit_that_it_taught_is_explained_beside_it(run, tmp_path):
    run("train", "student=small", "method=logit", "name=vit")
    folder = tmp_path / "digits" / "vit"

    run("explain", f"run={folder}", "images=2", "faithfulness_images=4", "methods=[relevance]")

    with np.load(folder / "explain" / "maps.npz", allow_pickle=False) as maps:
        assert {"teacher/relevance", "student/relevance"} <= {*maps}


def test_a_method_that_windows_have_no_place_for_is_one_line(run, tmp_path):
    run("train", *SWIN, "name=swin")

    (line,) = run(
        "explain", f"run={tmp_path / 'digits' / 'swin'}", "methods=[pytorch_grad_cam]", "images=1", code=2
    ).err.splitlines()
    assert "pytorch_grad_cam" in line
    assert "methods=grad_cam" in line
