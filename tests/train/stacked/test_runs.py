"""`hydra/launcher=stacked` leaves in every run folder what the job leaves alone."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.cli.test_multirun import SweepResult, Sweeps, contents, read
from tests.train.test_resume import curves_of, rows_of
from vitkd.models import load_model
from vitkd.runs.checkpoints import load_from_checkpoint, read_checkpoint

BRIEFLY = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=5",
        "teacher.trainer.limit_train_batches=5",
        "log_every_n_steps=2",
    ),
    *("student.depth=1", "teacher.depth=2", "teacher.max_epochs=1", "dataset.batch_size=32"),
]
JOBS = [
    "method=attention,none",
    "alpha=0.3,1",
    "student.dropout=0.1",
    "name=${hydra:runtime.choices.method}-${alpha}",
]
NAMES = ["attention-0.3", "attention-1", "none-0.3", "none-1"]
# Measured in seconds, or only there where students are stacked.
NOT_COMPARED = {"wall_seconds", "images_per_second", "stack/students"}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Both(NamedTuple):
    """The same jobs, together and one by one."""

    together: Sweeps
    alone: Sweeps
    result: SweepResult

    def folders(self, name: str) -> tuple[Path, Path]:
        return self.together.folder(name), self.alone.folder(name)


@pytest.fixture(scope="module")
def both(tmp_path_factory, command) -> Both:
    together, alone = (Sweeps(tmp_path_factory.mktemp(name) / "outputs", command) for name in ("many", "one"))
    result = together.run(*JOBS, *BRIEFLY, "hydra/launcher=stacked")
    assert result.code == 0, result.err
    shutil.copytree(together.path / "teachers", alone.path / "teachers")
    assert alone.run(*JOBS, *BRIEFLY).code == 0
    return Both(together, alone, result)


def files_of(run: Path) -> list[str]:
    """Every file, less TensorBoard's, whose names tell the time, and checkpoints before the last."""
    names = (str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    return sorted(name for name in names if "tfevents" not in name and "previous" not in name)


def close(mine: object, theirs: object) -> bool:
    if isinstance(mine, float) and isinstance(theirs, float):
        return bool(np.isclose(mine, theirs, **CLOSE))
    return mine == theirs


def test_says_what_trains_together(both):
    assert "jobs 2-3 cannot be stacked with jobs 0-1: different method" in both.result.out
    assert "jobs 0-1 train as one stack\n" in both.result.out
    assert "jobs 2-3 train as one stack\n" in both.result.out
    assert both.result.states == ["done"] * 4
    assert both.result.err == ""


def test_nothing_lies_beside_the_runs(both):
    assert {path.name for path in both.together.path.iterdir()} == {"digits", "sweeps", "teachers"}
    assert {path.name for path in both.together.path.glob("digits/*")} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
class TestARun:
    def test_has_the_same_files(self, name, both):
        mine, theirs = both.folders(name)

        assert files_of(mine) == files_of(theirs)
        assert ("attention.png" in files_of(mine)) == name.startswith("attention")

    def test_has_the_same_settings_pairs_and_state(self, name, both):
        mine, theirs = (yaml.safe_load((run / "config.yaml").read_text()) for run in both.folders(name))
        assert mine.pop("paths") != theirs.pop("paths")
        assert mine == theirs

        mine, theirs = (read(run / "status.json") for run in both.folders(name))
        assert mine.keys() == theirs.keys()
        assert (mine["state"], theirs["state"]) == ("done", "done")

        pairs = [run / "pairs.json" for run in both.folders(name)]
        assert len({path.read_text() if path.exists() else None for path in pairs}) == 1

    def test_has_the_same_figures(self, name, both):
        mine, theirs = (read(run / "metrics.json") for run in both.folders(name))

        assert mine.keys() - theirs.keys() == {"stack/students"}
        assert mine["stack/students"] == 2
        assert {key for key in theirs.keys() - NOT_COMPARED if not close(mine[key], theirs[key])} == set()

    def test_has_the_same_curves(self, name, both):
        mine, theirs = ([*rows_of(run)] for run in both.folders(name))
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        for row, expected in zip(mine, theirs, strict=True):
            assert row.keys() == expected.keys()
            for key, value in expected.items():
                assert close(float(row[key] or -1), float(value or -1)), key

        mine, theirs = (curves_of(run) for run in both.folders(name))
        assert mine.keys() == theirs.keys()
        for tag, points in theirs.items():
            assert [step for step, _ in mine[tag]] == [step for step, _ in points]

    def test_has_the_same_weights(self, name, both):
        mine, theirs = (load_file(run / "student.safetensors") for run in both.folders(name))
        torch.testing.assert_close(mine, theirs, **CLOSE)
        for kind in ("last", "best"):
            file = f"checkpoints/{kind}.ckpt"
            mine, theirs = (read_checkpoint(run / file) for run in both.folders(name))
            assert (mine["epoch"], mine["global_step"]) == (theirs["epoch"], theirs.get("global_step", 10))
            assert mine["model"] == theirs["model"]
            torch.testing.assert_close(mine["state_dict"], theirs["state_dict"], **CLOSE)

    def test_has_the_same_predictions(self, name, both):
        mine, theirs = (np.load(run / "test_predictions.npz") for run in both.folders(name))

        assert mine.files == theirs.files
        for model in theirs.files:
            assert (mine[model] != theirs[model]).sum() <= 1

    def test_its_checkpoints_are_what_it_reports(self, name, both):
        run = both.together.folder(name)

        best, epoch = load_from_checkpoint(run / "checkpoints" / "best.ckpt")
        assert epoch == read(run / "metrics.json")["best_epoch"]
        torch.testing.assert_close(best.state_dict(), load_model(run).state_dict(), rtol=0, atol=0)

    def test_its_log_has_the_epochs_of_its_own(self, name, both):
        def lines(run: Path) -> list[str]:
            """Without the time of day, the images a second and what is said of the stack."""
            lines = [line for line in (run / "run.log").read_text().splitlines() if "/2  " in line]
            return [line[20:].rpartition("  ")[0] for line in lines if "median" not in line]

        mine, theirs = (lines(run) for run in both.folders(name))
        assert mine == theirs
        assert [line.split()[:3] for line in mine] == [["student:", "epoch", f"{n}/2"] for n in (1, 2)]
        assert all(("transfer" in line) == (name == "attention-0.3") for line in mine)

    def test_can_be_measured_again(self, name, both, command):
        again = command("evaluate", f"run={both.together.folder(name)}")

        assert again.code == 0, again.err
        assert "differs" not in again.out


def test_done_jobs_are_skipped(both):
    before = contents(both.together.path / "digits")

    again = both.together.run(*JOBS, *BRIEFLY, "hydra/launcher=stacked")

    assert (again.code, again.states) == (0, ["done before"] * 4)
    assert contents(both.together.path / "digits") == before


@pytest.mark.slow
def test_rerun_all_runs_them_again(both):
    again = both.together.run(*JOBS, *BRIEFLY, "hydra/launcher=stacked", "sweep.rerun=all")

    assert (again.code, again.states) == (0, ["done"] * 4)
    for name in NAMES:
        runs = [both.together.folder(folder) for folder in (name, f"{name}-2")]
        first, second = (load_file(run / "student.safetensors") for run in runs)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        shutil.rmtree(runs[1])


def test_evaluation_runs_one_by_one(both, command):
    runs = ",".join(str(both.together.folder(name)) for name in NAMES[:2])

    ended = command("evaluate", "-m", f"run={runs}", "hydra/launcher=stacked")

    assert ended.code == 0, ended.err
    assert ended.out.count("equal") >= 2
    assert "differs" not in ended.out
    assert json.loads((both.together.folder(NAMES[0]) / "status.json").read_text())["state"] == "done"
