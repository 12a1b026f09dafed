"""What a stack learns is what its students learn alone, however they differ and whatever the Trainer does."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.test_multirun import Sweeps, read
from tests.train.test_resume import rows_of

STACKED = "hydra/launcher=stacked"
SMALL = [
    *("trainer=cpu", "student.depth=2", "student.embed_dim=16", "teacher.depth=2", "teacher.max_epochs=2"),
    *("teacher.num_heads=8", "teacher.head_dim=8"),
    "pictures_every_n_epochs=0",
]

# granularity, loss and what else tells one student from another.
STUDENTS = {
    "a": ("head", "mse", "alpha: 0.3\ngranularity: {heads: [[0, 1], [2, 3]]}"),
    "b": ("block", "kl", "alpha: 0.5\nloss: {temperature: 2.0}\nlabel_smoothing: 0.1"),
    "c": (
        *("encoder", "kl"),
        "alpha: 0.7\ngranularity: {head_map: squeeze}\noptimizer: {weight_decay: 0.2, lr: 3.0e-3}\nseed: 1",
    ),
    "d": ("head", "js", "alpha: 1.0\nseed: 1\nschedule: {warmup: 0.3}"),
    "e": ("encoder", "mse", "alpha: 0.015\nloss: {center: row}\ngranularity: {head_map: hungarian}"),
    # It compares no maps.
    "f": ("block", "kl", "alpha: 0.4\nmethod: {temperature: 2.0}\nseed: 1"),
}
TEST_IMAGES = 359


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> Path:
    """A configuration folder with an experiment a student."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "experiment").mkdir()
    for name, (granularity, loss, settings) in STUDENTS.items():
        schedule = "constant" if name == "a" else "cosine"
        method = "logit" if name == "f" else "attention"
        chosen = {"granularity": granularity, "loss": loss, "schedule": schedule, "method": method}
        defaults = "".join(f"  - override /{group}: {option}\n" for group, option in chosen.items())
        text = f"# @package _global_\ndefaults:\n{defaults}\n{settings}\nname: {name}\n"
        (folder / "experiment" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, command) -> Path:
    """The store with the teacher of all."""
    sweeps = Sweeps(tmp_path_factory.mktemp("teachers"), command)
    assert command("train", *SMALL, "trainer.max_epochs=1", f"paths.outputs={sweeps.path}").code == 0
    return sweeps.path / "teachers"


def both_ways(options: Path, teachers: Path, folder: Path, command, *settings: str) -> tuple[Path, Path]:
    """The experiments' runs, together and one by one: a folder with one of each name."""
    outputs: list[Path] = []
    for way in ("stacked", "basic"):
        sweeps = Sweeps(folder / way, command)
        # Another precision or split means another teacher, which is trained once.
        shutil.copytree(outputs[0] / "teachers" if outputs else teachers, sweeps.path / "teachers")
        chosen = f"experiment={','.join(STUDENTS)}"
        ended = sweeps.run(f"--config-dir={options}", chosen, *SMALL, f"hydra/launcher={way}", *settings)
        assert (ended.code, ended.states) == (0, ["done"] * len(STUDENTS)), ended.err
        assert ("jobs 0-5 train as one stack\n" in ended.out) == (way == "stacked")
        outputs.append(sweeps.path)
    return outputs[0], outputs[1]


@pytest.mark.slow
def test_accuracies_after_200_steps(options, teachers, tmp_path, command):
    together, alone = both_ways(
        options, teachers, tmp_path, command, "trainer.max_epochs=5", "dataset.batch_size=32"
    )

    for name in STUDENTS:
        mine, theirs = (read(outputs / name / name / "metrics.json") for outputs in (together, alone))
        assert mine["steps"] == theirs["steps"] == 200
        assert name != "c" or theirs["test/acc_last"] > 0.5, "it learns"
        for key in ("test/acc_last", "test/acc_best", "test/teacher_agreement"):
            assert abs(mine[key] - theirs[key]) < 1.5 / TEST_IMAGES, (name, key)
        assert mine["teacher/weights"] == theirs["teacher/weights"]
        files = [outputs / name / name / "pairs.json" for outputs in (together, alone)]
        assert [file.exists() for file in files] == [name != "f"] * 2
        assert name == "f" or files[0].read_text() == files[1].read_text()


def near(curve: str, mine: str, theirs: str) -> bool:
    """Whether two values are equal up to rounding, which may move one of 32 images across a border."""
    if "" in (mine, theirs):
        return mine == theirs
    images = 1.5 / 32 if curve.endswith(("acc", "agreement")) else 0.0
    return float(mine) == pytest.approx(float(theirs), rel=1e-3, abs=max(images, 1e-6))


VARIANTS = {
    "one": [
        *("student.dropout=0.1", "student.emb_dropout=0.1", "ema_decay=0.9", "log_every_n_steps=1"),
        *("+trainer.gradient_clip_val=0.05", "student.drop_path_rate=0.2"),
        *("optimizer.decay_all=false", "optimizer.layer_decay=0.75"),
    ],
    "two": [
        *("trainer.accumulate_grad_batches=2", "trainer.check_val_every_n_epoch=2", "trainer.max_epochs=3"),
        *("+trainer.gradient_clip_val=0.001", "+trainer.gradient_clip_algorithm=value", "teacher.cache=off"),
    ],
    "three": ["trainer.precision=64-true", "dataset.val_fraction=0", "student.init=weight_selection"],
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_however_it_trains(variant, options, teachers, tmp_path, command):
    chosen = [
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=6",
        "teacher.trainer.limit_train_batches=6",
        *VARIANTS[variant],
    ]
    together, alone = both_ways(options, teachers, tmp_path, command, *chosen)

    for name in STUDENTS:
        runs = [outputs / name / name for outputs in (together, alone)]
        mine, theirs = (load_file(run / "student.safetensors") for run in runs)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-6)
        mine, theirs = ([*rows_of(run)] for run in runs)
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        assert mine[0].keys() == theirs[0].keys()
        for row, expected in zip(mine, theirs, strict=True):
            assert {key for key in row if not near(key, row[key], expected[key])} == set()
        for key in ("val/acc_last", "val/acc_best", "best_epoch", "epochs", "steps"):
            assert read(runs[0] / "metrics.json")[key] == read(runs[1] / "metrics.json")[key]
