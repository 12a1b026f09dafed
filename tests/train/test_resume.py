"""A run that is killed, at whatever point, and started again ends as if nothing had happened, bit for bit."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import crashes
from tests.crashes import Ended, Strike
from tests.photos import noise_photos
from vitkd.runs.checkpoints import read_checkpoint

# 3 epochs of 10 steps; with dropout, a warm-up, and windows of 4 steps that are cut by most kills.
SMALL = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=3",
        "+trainer.limit_train_batches=10",
        "teacher.trainer.limit_train_batches=10",
        "teacher.max_epochs=2",
    ),
    *("teacher.depth=1", "student.depth=1", "student.dropout=0.1", "student.emb_dropout=0.1"),
    *("schedule.warmup=0.3", "log_every_n_steps=4", "pictures_every_n_epochs=2", "name=run", "resume=auto"),
]
# What is measured in seconds differs from run to run.
TIMED = {"wall_seconds", "images_per_second", "train/images_per_second"}

# Of a student where its teacher is there, else of the teacher.
STEP = "vitkd.train.module:DistillModule.training_step"
VALIDATION = "vitkd.train.module:DistillModule.validation_step"
SAVE = "vitkd.runs.checkpoints:write_checkpoint"
RENAME = "vitkd.runs.checkpoints:Path.replace"
EVERY_STEP, EVERY_EPOCH = "checkpoint_minutes=0", "checkpoint_minutes=10"

KILLS = {
    "in the first epoch": Strike(STEP, 5),
    "in the middle of an epoch": Strike(STEP, 15),
    "at the last batch of an epoch": Strike(STEP, 20),
    "at the first batch of an epoch": Strike(STEP, 21),
    "during validation": Strike(VALIDATION, 2),
    "before a checkpoint is written": Strike(SAVE, 3),
    "while a checkpoint takes its place": Strike(RENAME, 11),
    "before the last checkpoint": Strike(STEP, 30, after=True),
    "before the test": Strike("vitkd.train.student:measure_both"),
    "before the final figures": Strike("vitkd.runs.folder:RunFolder.write_metrics"),
}


class Variant(NamedTuple):
    """One way to train, run to its end without a hitch."""

    settings: list[str]
    folder: Path

    @property
    def teachers(self) -> Path:
        return self.folder / "outputs" / "teachers"


def run_of(folder: Path) -> Path:
    (run,) = (folder / "outputs").glob("*/run")
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return noise_photos(tmp_path_factory.mktemp("photos"), of_each_class=80, size=8)


@pytest.fixture(scope="module")
def variant(tmp_path_factory, photos) -> Callable[[str], Variant]:
    files = ("dataset=image_folder", f"dataset.root={photos}", "dataset.image_size=8", "dataset.patch_size=4")
    models = ("teacher=small", "student=small", "dataset.batch_size=12", "dataset.eval_batch_size=4")
    settings = {
        "plain": SMALL,
        "averaged": [*SMALL, "ema_decay=0.9"],
        "workers": [*SMALL, *files, *models, "dataset.resident_limit_gib=0", "dataset.workers=2"],
        "accumulated": [*SMALL, "trainer.accumulate_grad_batches=3", "trainer.precision=bf16-mixed"],
        "bank": [*SMALL, "method=crd", "method.negatives=64", "ema_decay=0.9"],
        "queue": [*SMALL, "method=crd", "method.bank=queue", "method.negatives=100"],
    }
    made: dict[str, Variant] = {}

    def variant(name: str) -> Variant:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            ended = crashes.run(settings[name], folder)
            assert ended.code == 0, ended
            made[name] = Variant(settings[name], folder)
        return made[name]

    return variant


def struck_and_resumed(variant: Variant, folder: Path, strike: Strike, *settings: str) -> tuple[Ended, Ended]:
    """Run with the reference's teacher until the strike, and then to the end."""
    shutil.copytree(variant.teachers, folder / "outputs" / "teachers")
    struck = crashes.run([*variant.settings, *settings], folder, strike)
    resumed = crashes.run([*variant.settings, *settings], folder)
    assert resumed.code == 0, resumed
    return struck, resumed


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one.keys() - TIMED)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def rows_of(run: Path) -> Iterator[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield {key: value for key, value in row.items() if key not in TIMED}


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - TIMED
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_nothing_happened(run: Path, reference: Path) -> None:
    """All that a run leaves equals what an uninterrupted one leaves."""
    assert same(load_file(run / "student.safetensors"), load_file(reference / "student.safetensors"))
    mine, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, reference))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_state"):
        assert same(mine[part], theirs[part]), part
    assert [*rows_of(run)] == [*rows_of(reference)]
    assert curves_of(run) == curves_of(reference)
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (run, reference))
    assert same(mine, theirs)
    predictions, expected = (np.load(folder / "test_predictions.npz") for folder in (run, reference))
    assert all((predictions[name] == expected[name]).all() for name in expected.files)
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert sorted(file.name for file in run.iterdir() if "tfevents" not in file.name) == sorted(
        file.name for file in reference.iterdir() if "tfevents" not in file.name
    )


def test_the_reference_is_worth_comparing_with(variant):
    run = run_of(variant("plain").folder)
    steps = [int(row["step"]) for row in rows_of(run)]

    assert steps == [4, 8, 10, 12, 16, 20, 24, 28, 30]
    assert all(row["val/acc"] for row in rows_of(run) if int(row["step"]) % 10 == 0)
    assert [step for step, _ in curves_of(run)["train/total_loss"]] == steps
    assert len({row["train/lr"] for row in rows_of(run)}) == len(steps), "the schedule moves"


@pytest.mark.parametrize("kill", ["in the middle of an epoch"])
def test_killed_and_resumed(kill, variant, tmp_path):
    struck, resumed = struck_and_resumed(variant("plain"), tmp_path, KILLS[kill], EVERY_STEP)

    assert struck.code == -signal.SIGKILL
    assert "after step 14" in resumed.out
    assert_nothing_happened(run_of(tmp_path), run_of(variant("plain").folder))


@pytest.mark.slow
@pytest.mark.parametrize("saves", [EVERY_STEP, EVERY_EPOCH])
@pytest.mark.parametrize("kill", KILLS)
def test_killed_anywhere(kill, saves, variant, tmp_path):
    struck, resumed = struck_and_resumed(variant("plain"), tmp_path, KILLS[kill], saves)

    assert struck.code == -signal.SIGKILL
    assert "resuming" in resumed.out or kill == "in the first epoch"
    assert_nothing_happened(run_of(tmp_path), run_of(variant("plain").folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill", ["in the middle of an epoch", "during validation", "while a checkpoint takes its place"]
)
@pytest.mark.parametrize("name", ["averaged", "workers", "accumulated", "bank", "queue"])
def test_killed_however_it_trains(name, kill, variant, tmp_path):
    struck, _ = struck_and_resumed(variant(name), tmp_path, KILLS[kill], EVERY_STEP)

    assert struck.code == -signal.SIGKILL
    assert_nothing_happened(run_of(tmp_path), run_of(variant(name).folder))


@pytest.mark.slow
@pytest.mark.parametrize("saves", [EVERY_STEP, EVERY_EPOCH])
@pytest.mark.parametrize("nth", [7, 10, 14], ids=["first epoch", "last batch", "second epoch"])
def test_killed_while_the_teacher_trains(nth, saves, variant, tmp_path):
    reference = variant("plain")
    settings = [*reference.settings, saves]

    assert crashes.run(settings, tmp_path, Strike(STEP, nth)).code == -signal.SIGKILL
    assert not [*tmp_path.glob("outputs/*/run")], "the student's folder waits for its teacher"
    assert crashes.run(settings, tmp_path).code == 0

    (mine,), (theirs,) = (folder.glob("outputs/teachers/*/*/") for folder in (tmp_path, reference.folder))
    assert mine.name == theirs.name
    assert_nothing_happened(mine, theirs)
    assert_nothing_happened(run_of(tmp_path), run_of(reference.folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "averaged"])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
@pytest.mark.parametrize(
    ("where", "nth", "saved"),
    [(STEP, 15, 15), (STEP, 20, 20), (VALIDATION, 2, 20), (STEP, 30, 30)],
    ids=["mid-epoch", "at the last batch of an epoch", "during validation", "at the very last batch"],
)
def test_sigterm_and_ctrl_c(where, nth, saved, number, code, name, variant, tmp_path):
    """The step that is under way is finished and saved, nothing more is trained."""
    reference = variant(name)
    strike = Strike(where, nth, number)
    shutil.copytree(reference.teachers, tmp_path / "outputs" / "teachers")

    result = crashes.run(reference.settings, tmp_path, strike)
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    resumed = crashes.run(reference.settings, tmp_path)

    assert (result.code, status["state"]) == (code, "stopped")
    assert f"saved at step {saved}" in result.out
    assert len(result.err.splitlines()) == 1, "one line says what happened"
    assert f"after step {saved}" in resumed.out
    assert_nothing_happened(run_of(tmp_path), run_of(reference.folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strikes", "code", "resumes"),
    [
        ([Strike(STEP, 15, signal.SIGHUP)], 129, 15),
        ([Strike(STEP, 15, signal.SIGINT), Strike(SAVE, 2, signal.SIGINT)], 130, 10),
    ],
    ids=["a closed terminal", "a second Ctrl-C during the save of the first"],
)
def test_other_ways_to_stop(strikes, code, resumes, variant, tmp_path):
    reference = variant("plain")
    shutil.copytree(reference.teachers, tmp_path / "outputs" / "teachers")

    result = crashes.run(reference.settings, tmp_path, *strikes)
    status = json.loads((run_of(tmp_path) / "status.json").read_text())
    resumed = crashes.run(reference.settings, tmp_path)

    assert (result.code, status["state"]) == (code, "stopped")
    assert len(result.err.splitlines()) == 1
    assert f"after step {resumes}" in resumed.out
    assert_nothing_happened(run_of(tmp_path), run_of(reference.folder))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_terminal_signals_the_workers_as_well(number, code, photos, tmp_path):
    """All processes that it has started get its signals; one that ended would end the run before its save."""
    files = ["dataset=image_folder", f"dataset.root={photos}", "dataset.image_size=8", "dataset.patch_size=4"]
    settings = [*files, "method=none", "student=small", "dataset.batch_size=4", "dataset.workers=2"]
    settings += ["dataset.resident_limit_gib=0", "trainer=cpu", "trainer.max_epochs=100000", "name=run"]
    line = [sys.executable, "-m", "vitkd.train", *settings]
    with subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        while not run.stdout.readline().startswith("student: epoch 1/"):
            assert run.poll() is None
        os.killpg(run.pid, number)
        out, err = run.communicate()

    assert run.returncode == code
    assert "saved at step" in out
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_killed_again_and_again(variant, tmp_path):
    reference = variant("plain")
    shutil.copytree(reference.teachers, tmp_path / "outputs" / "teachers")

    kills = 0
    while crashes.run([*reference.settings, EVERY_STEP], tmp_path, Strike(STEP, 6)).code:
        kills += 1

    assert kills == 5
    assert_nothing_happened(run_of(tmp_path), run_of(reference.folder))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "absent"])
@pytest.mark.parametrize(
    "files", [["last.ckpt"], ["last.ckpt", "previous-last.ckpt"], ["best.ckpt"]], ids=str
)
def test_damaged_checkpoints_lose_nothing(files, damage, variant, tmp_path):
    """What the other checkpoint does not hold is trained again, to the same bits."""
    reference = variant("plain")
    shutil.copytree(reference.teachers, tmp_path / "outputs" / "teachers")
    crashes.run(reference.settings, tmp_path, Strike(STEP, 25))
    for name in files:
        file = run_of(tmp_path) / "checkpoints" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes({"flipped": data, "cut": data[:1000]}.get(damage, b""))
        if damage == "absent":
            file.unlink()

    resumed = crashes.run(reference.settings, tmp_path)

    assert resumed.code == 0
    lines = [line for line in resumed.out.splitlines() if line.startswith("warning")]
    assert len(lines) == (0 if damage == "absent" or "best.ckpt" in files else len(files))
    after = {("last.ckpt",): "after step 10", ("best.ckpt",): "after step 20"}.get(tuple(files))
    assert ("resuming" in resumed.out) == (after is not None)
    assert after is None or after in resumed.out
    for aside in (run_of(tmp_path) / "checkpoints").glob("*.damaged"):
        aside.unlink()
    assert_nothing_happened(run_of(tmp_path), run_of(reference.folder))


def test_a_run_that_is_done_is_left_alone(variant):
    reference = variant("plain")
    before = {file: file.stat().st_mtime_ns for file in run_of(reference.folder).rglob("*")}

    again = crashes.run(reference.settings, reference.folder)

    assert again.code == 0
    assert "already done" in again.out
    assert {file: file.stat().st_mtime_ns for file in run_of(reference.folder).rglob("*")} == before
