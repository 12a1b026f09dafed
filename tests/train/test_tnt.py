"""A TNT from its training to every command that reads its run, by either part of its attention."""

import json
from pathlib import Path

import pytest

SIZES = ("img_size=8", "patch_size=4", "first_stride=2", "embed_dim=8", "inner_dim=4")
HEADS = ("num_heads_outer=2", "num_heads_inner=2")
TNT = [
    *("trainer=cpu", "trainer.max_epochs=1", "teacher.max_epochs=1", "dataset.batch_size=128"),
    *("student=tnt", "teacher=tnt", "student.depth=2", "teacher.depth=4", "granularity=encoder"),
    *(f"{whose}.{size}" for whose in ("student", "teacher") for size in (*SIZES, *HEADS)),
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("part", ["outer", "inner"])
def test_it_learns_block_by_block_and_is_measured_explained_and_reported(part, command, tmp_path):
    folder = Path(tmp_path, "digits", part)
    for name, *arguments in (
        ("train", *TNT, f"paths.outputs={tmp_path}", f"granularity.part={part}", f"name={part}"),
        ("evaluate", f"run={folder}"),
        ("explain", f"run={folder}", "images=2", "faithfulness_images=0"),
        ("report", str(tmp_path)),
    ):
        ended = command(name, *arguments)
        assert ended.code == 0, ended.err
        # What is drawn is not what was learned.
        says_so = "learned the teacher's attention within patches" in ended.out + ended.err
        assert says_so == (name == "explain" and part == "inner")

    pairs = json.loads((folder / "pairs.json").read_text())
    assert [(pair["student_block"], pair["teacher_block"]) for pair in pairs] == [(0, 1), (1, 3)]
    assert {pair["part"] for pair in pairs} == {part}
    assert (folder / "attention.png").is_file()
    (explained,) = folder.glob("explain/index.html")
    assert ("within patches" in explained.read_text(encoding="utf-8")) == (part == "inner")
