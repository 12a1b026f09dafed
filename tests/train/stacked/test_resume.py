"""A stack that is killed, at whatever point, and started again ends as if nothing had happened."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import crashes
from tests.cli.test_multirun import SweepResult, contents, read, records_of
from tests.crashes import Ended, Strike
from tests.train.test_resume import curves_of, rows_of, same
from vitkd.runs.checkpoints import newest_good
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackFolder, read_slot, release_slot

pytestmark = pytest.mark.slow

# 2 epochs of 7 steps, in windows of 4; with dropout, a warm-up, averaged weights, two orders, two learning
# rates (0.001 and 0.011) and weight decays, and students of 1 map and of 4.
SETTINGS = [
    *(
        "-m",
        "hydra/launcher=stacked",
        "trainer=cpu",
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=7",
        "teacher.trainer.limit_train_batches=7",
    ),
    *("teacher.max_epochs=1", "teacher.depth=1", "student.depth=1", "dataset.batch_size=16"),
    *("student.dropout=0.1", "schedule.warmup=0.3", "log_every_n_steps=4", "pictures_every_n_epochs=0"),
    *("ema_decay=0.9", "optimizer.lr=0.0${seed}1", "optimizer.weight_decay=${seed}"),
    *("name=${hydra:runtime.choices.granularity}-${seed}", "checkpoint_minutes=0"),
]
JOBS = ["granularity=head,encoder", "seed=0,1"]
NAMES = ["encoder-0", "encoder-1", "head-0", "head-1"]

STEP = "vitkd.train.module:DistillModule.training_step"
VALIDATION = "vitkd.train.stacked.module:StackedModule.validation_step"
FIGURES = "vitkd.runs.folder:RunFolder.write_metrics"

KILLS = {
    "at the first step": Strike(STEP, 1),
    "in the second epoch": Strike(STEP, 11),
    "during validation": Strike(VALIDATION, 1),
    "while a checkpoint takes its place": Strike("vitkd.runs.checkpoints:write_atomically", 5, after=True),
    "when the third student is concluded": Strike(FIGURES, 3, after=True),
    "when the last one is done": Strike("vitkd.runs.folder:RunFolder._set_status", 8, after=True),
}


def run_of(folder: Path, name: str) -> Path:
    return folder / "outputs" / "digits" / name


def result_of(ended: Ended, folder: Path) -> SweepResult:
    return SweepResult(*ended, records_of(folder / "outputs"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Where the stack was trained without a hitch."""
    folder = tmp_path_factory.mktemp("reference")
    ended = crashes.run([*SETTINGS, *JOBS], folder)
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def start(reference, tmp_path) -> Callable[..., Ended]:
    """start(*settings_and_strikes) runs the command beside a copy of the reference's teacher."""
    shutil.copytree(reference / "outputs" / "teachers", tmp_path / "outputs" / "teachers")

    def run(*arguments: str | Strike, jobs: list[str] = JOBS) -> Ended:
        settings = [argument for argument in arguments if isinstance(argument, str)]
        strikes = [argument for argument in arguments if isinstance(argument, Strike)]
        return crashes.run([*SETTINGS, *jobs, *settings], tmp_path, *strikes)

    return run


def assert_nothing_happened(folder: Path, reference: Path, names: list[str] = NAMES) -> None:
    """Every run equals that of an uninterrupted stack, and nothing lies beside them."""
    assert {path.name for path in (folder / "outputs").iterdir()} == {"digits", "sweeps", "teachers"}
    assert sorted(path.name for path in (folder / "outputs" / "digits").iterdir()) == names
    for name in names:
        assert_run_equals(run_of(folder, name), run_of(reference, name))


def assert_run_equals(run: Path, expected: Path) -> None:
    assert same(load_file(run / "student.safetensors"), load_file(expected / "student.safetensors"))
    assert [*rows_of(run)] == [*rows_of(expected)]
    assert curves_of(run) == curves_of(expected)
    mine, theirs = ({**read(folder / "metrics.json"), "stack/students": 0} for folder in (run, expected))
    assert same(mine, theirs)
    for kind in ("last", "best"):
        mine, theirs = (newest_good(folder / "checkpoints" / f"{kind}.ckpt")[1] for folder in (run, expected))
        assert same(mine, theirs)
    predictions, others = (np.load(folder / "test_predictions.npz") for folder in (run, expected))
    assert all((predictions[key] == others[key]).all() for key in others.files)
    assert read(run / "status.json")["state"] == "done"
    files = [
        {path.name for path in folder.iterdir() if "tfevents" not in path.name} for folder in (run, expected)
    ]
    assert files[0] == files[1]


def test_the_reference_is_worth_comparing_with(reference):
    assert_nothing_happened(reference, reference)
    for name, maps, rate in (("encoder-0", 4, 0.001), ("encoder-1", 4, 0.011), ("head-1", 1, 0.011)):
        rows = [*rows_of(run_of(reference, name))]
        assert [int(row["step"]) for row in rows] == [4, 7, 8, 12, 14]
        assert len([key for key in rows[0] if key.startswith("train/map_loss/")]) == maps
        assert max(float(row["train/lr"]) for row in rows) == pytest.approx(rate, rel=0.1)
        assert [bool(row["val/acc"]) for row in rows] == [False, True, False, False, True]


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed(kill, start, reference, tmp_path):
    struck = start(KILLS[kill])
    resumed = start()

    assert struck.code == -signal.SIGKILL
    assert resumed.code == 0, resumed
    assert ("resuming" in resumed.out) == (kill not in ("at the first step", "when the last one is done"))
    assert_nothing_happened(tmp_path, reference)


def test_sigterm(start, reference, tmp_path):
    stopped = result_of(start(Strike(STEP, 9, signal.SIGTERM), "checkpoint_minutes=10"), tmp_path)

    assert (stopped.code, stopped.states) == (143, ["stopped"] * 4)
    assert "saved at step 9" in stopped.out
    assert len(stopped.err.splitlines()) == 1
    assert {RunFolder(run_of(tmp_path, name)).state for name in NAMES} == {"stopped"}

    resumed = start("checkpoint_minutes=10")
    assert resumed.code == 0, resumed
    assert "after step 9" in resumed.out
    assert_nothing_happened(tmp_path, reference)


def test_some_of_a_stack_resume_without_the_others(start, reference, tmp_path):
    start(Strike(STEP, 11))

    some = start(jobs=["granularity=head", "seed=0,1"])

    assert some.code == 0, some
    assert "after step 10" in some.out
    for name in ("head-0", "head-1"):
        assert_close(run_of(tmp_path, name), run_of(reference, name))
    (left,) = (tmp_path / "outputs" / "stacks").iterdir()
    assert StackFolder(left).is_saved, "for those that are left"

    rest = start()
    assert rest.code == 0, rest
    assert "after step 10" in rest.out
    assert (
        sorted(job["state"] for job in records_of(tmp_path / "outputs")) == ["done"] * 2 + ["done before"] * 2
    )
    for name in NAMES:
        assert_close(run_of(tmp_path, name), run_of(reference, name))
    assert not (tmp_path / "outputs" / "stacks").exists()


def assert_close(run: Path, expected: Path) -> None:
    """Another number of students may round otherwise."""
    mine, theirs = (load_file(folder / "student.safetensors") for folder in (run, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine, theirs = ([*rows_of(folder)] for folder in (run, expected))
    for row, other in zip(mine, theirs, strict=True):
        assert row.keys() == other.keys()
        for key in other:
            assert float(row[key] or -1) == pytest.approx(float(other[key] or -1), rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(("most", "stacks"), [(3, 2), (1, 4)])
def test_in_smaller_stacks_all_resume(most, stacks, start, reference, tmp_path):
    start(Strike(STEP, 11))

    resumed = start(f"hydra.launcher.max_students={most}")

    assert resumed.code == 0, resumed
    assert resumed.out.count("after step 10") == stacks
    for name in NAMES:
        assert_close(run_of(tmp_path, name), run_of(reference, name))
    assert not (tmp_path / "outputs" / "stacks").exists()


def alone(folder: Path, *strikes: Strike) -> Ended:
    """The job of head-0 without the launcher."""
    settings = [setting for setting in SETTINGS if setting not in ("-m", "hydra/launcher=stacked")]
    return crashes.run([*settings, "granularity=head", "seed=0", "resume=auto"], folder, *strikes)


def test_by_itself_one_of_them_starts_over_and_resumes_that(start, reference, tmp_path):
    start(Strike(STEP, 11))

    struck = alone(tmp_path, Strike(STEP, 5))

    assert struck.code == -signal.SIGKILL
    assert "head-0: starting over: only hydra/launcher=stacked could resume its stack\n" in struck.out
    assert not (run_of(tmp_path, "head-0") / "stack.json").exists()

    rest = start()
    assert rest.code == 0, rest
    assert "job 0 trains by itself: it resumes from a checkpoint of its own\n" in rest.out
    assert "after step 4" in rest.out
    assert "after step 10" in rest.out
    for name in NAMES:
        assert_close(run_of(tmp_path, name), run_of(reference, name))
    assert not (tmp_path / "outputs" / "stacks").exists()


def test_by_itself_one_that_was_being_concluded_starts_over(start, reference, tmp_path):
    start(Strike("vitkd.train.stacked.job:write_checkpoints", 3, after=True))
    before = [path.name for path in run_of(tmp_path, "head-0").glob("checkpoints/*.ckpt")]

    ended = alone(tmp_path)

    assert "last.ckpt" in before, "with weights alone in it"
    assert "starting over" in ended.out
    assert ended.code == 0, ended
    assert_close(run_of(tmp_path, "head-0"), run_of(reference, "head-0"))
    assert not (run_of(tmp_path, "head-0") / "stack.json").exists()


@pytest.mark.parametrize("damage", ["last", "both", "folder"])
def test_damage_loses_nothing(damage, start, reference, tmp_path):
    start(Strike(STEP, 11))
    place = read_slot(RunFolder(run_of(tmp_path, "head-1")), tmp_path / "outputs" / "stacks")
    assert place is not None
    if damage == "folder":
        shutil.rmtree(place.folder.path)
    else:
        for file in ("last.ckpt", "previous-last.ckpt")[: 1 + (damage == "both")]:
            path = place.folder.last.with_name(file)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    resumed = start()

    assert resumed.code == 0, resumed
    assert ("after step 9" in resumed.out) == (damage == "last")
    assert_nothing_happened(tmp_path, reference)


def test_a_foreign_place_is_none_and_nothing_outside_is_removed(tmp_path):
    run, outside = RunFolder(tmp_path / "run"), tmp_path / "outside"
    for folder in (run.path, outside, tmp_path / "stacks" / "own"):
        folder.mkdir(parents=True)
    for folder in (outside, tmp_path, tmp_path / "stacks"):
        (folder / "runs.json").write_text("[]")
    before = contents(tmp_path)
    for stack in ("../outside", str(outside), "..", ".", "", None, 7):
        run.stack.write_text(json.dumps({"stack": stack, "job": 0, "jobs": 2}))

        assert read_slot(run, tmp_path / "stacks") is None
        release_slot(run, tmp_path / "stacks")
    for text in ("", "[]", '{"stack": "own"}', '{"stack": "own", "job": 2, "jobs": 2}', "nonsense"):
        run.stack.write_text(text)

        assert read_slot(run, tmp_path / "stacks") is None
        release_slot(run, tmp_path / "stacks")
    assert contents(tmp_path) == before
    assert (tmp_path / "stacks" / "own").is_dir()
