"""Experiment trackers get what TensorBoard gets, each value once, and never end a run; all of it offline."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from tests import crashes
from tests.crashes import Strike
from tests.trackers import Tracked, in_mlflow, in_wandb
from vitkd.config.loggers import LoggedRun
from vitkd.config.run import CONF_DIR, parse
from vitkd.runs.curves import MetricsFile
from vitkd.runs.loggers import MLflow, Tracker, Wandb

SETTINGS = {"alpha": 0.5, "loss": {"temperature": 2.0}}
PICTURE = np.zeros((8, 8, 3), np.uint8)
BRIEFLY = [
    *("trainer.max_epochs=2", "trainer.limit_train_batches=3", "log_every_n_steps=2", "trainer=cpu"),
    *("teacher.max_epochs=1", "teacher.trainer.limit_train_batches=1", "pictures_every_n_epochs=1"),
    *("name=run", "student.depth=1", "teacher.depth=1"),
]
ALL = ["logger=[tensorboard,wandb,mlflow]", "logger.wandb.mode=offline"]


@pytest.fixture(autouse=True)
def _alone(tmp_path):
    """No account of whoever runs the tests, and no variable of theirs."""
    theirs = {name: value for name, value in os.environ.items() if name.startswith(("WANDB", "MLFLOW"))}
    own = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "netrc"), "WANDB_ERROR_REPORTING": "false"}
    with mock.patch.dict(os.environ, own):
        for name in theirs:
            del os.environ[name]
        yield


@pytest.fixture
def run(tmp_path) -> Callable[..., LoggedRun]:
    (tmp_path / "run").mkdir()

    def run(start: int = 0, rows: Any = None, logged: Any = None) -> LoggedRun:
        return LoggedRun(tmp_path / "run", "digits/run", SETTINGS, start, rows or {}, logged or {})

    return run


@pytest.fixture(params=["wandb", "mlflow"])
def tracker(request, tmp_path) -> tuple[Any, Callable[[], Tracked]]:
    """An option, and what it holds of the run in the end."""
    if request.param == "wandb":
        return Wandb("vitkd", None, "offline", None, []), lambda: in_wandb(tmp_path / "run")
    store = tmp_path / "mlruns"

    def read() -> Tracked:
        ids = json.loads((tmp_path / "run" / "loggers.json").read_text())
        return in_mlflow(store, ids["mlflow"])

    return MLflow(str(store), "vitkd"), read


def test_a_tracker_gets_curves_pictures_settings_and_results(tracker, run):
    option, read = tracker
    opened = option.open(run())
    opened.log_metrics({"train/acc": 0.25, "train/class_loss": 2.0}, 2)
    opened.log_metrics({"train/acc": 0.5, "train/class_loss": 1.0}, 4)
    opened.log_picture("attention/block1", PICTURE, 4)
    opened.finalize("success")  # training has ended; what is measured then is still to come
    opened.conclude(SETTINGS, (), {"test/acc_last": 0.75})

    tracked = read()

    assert tracked.curves == {
        "train/acc": [(2, 0.25), (4, 0.5)],
        "train/class_loss": [(2, 2.0), (4, 1.0)],
    }
    assert tracked.pictures == [("attention/block1", 4)]
    assert tracked.results["test/acc_last"] == 0.75
    assert str(tracked.settings["alpha"]) == "0.5"


def test_a_resumed_run_continues_with_each_step_once(tracker, run, tmp_path):
    option, read = tracker
    killed = option.open(run())
    for step in (2, 4, 6):
        killed.log_metrics({"train/acc": step / 10}, step)
    killed.log_picture("attention/block1", PICTURE, 4)
    killed.finalize("failed")
    before = (tmp_path / "run" / "loggers.json").read_bytes()

    # The checkpoint is of step 2; step 6 was logged in part.
    resumed = option.open(run(2, {2: {"train/acc": 0.2}}, {4: {"train/acc"}, 6: {"train/acc"}}))
    for step in (4, 6, 8):
        resumed.log_metrics({"train/acc": step / 10, **({"val/acc": 0.1} if step > 4 else {})}, step)
        resumed.log_picture("attention/block1", PICTURE, step)
    resumed.conclude(SETTINGS, (), {})

    tracked = read()
    assert tracked.curves == {
        "train/acc": [(2, 0.2), (4, 0.4), (6, 0.6), (8, 0.8)],
        "val/acc": [(6, 0.1), (8, 0.1)],
    }
    # wandb's offline record is written once more: of a process that was killed there may be none.
    steps = [4, 6, 8] if isinstance(option, Wandb) else [4, 8]
    assert tracked.pictures == [("attention/block1", step) for step in steps]
    assert (tmp_path / "run" / "loggers.json").read_bytes() == before


def test_several_runs_are_open_at_once(tracker, tmp_path, run):
    """As the students of a stack."""
    option, _ = tracker
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    opened = [option.open(run()._replace(folder=folder, name=folder.name)) for folder in folders]
    for step in (1, 2):
        for number, each in enumerate(opened):
            each.log_metrics({"train/acc": float(number)}, step)
    for each in opened:
        each.conclude(SETTINGS, (), {})

    ids = [json.loads((folder / "loggers.json").read_text()) for folder in folders]
    assert ids[0] != ids[1]
    for number, folder in enumerate(folders):
        known = ids[number].get("mlflow")
        tracked = in_mlflow(tmp_path / "mlruns", known) if known else in_wandb(folder)
        assert tracked.curves == {"train/acc": [(1, number), (2, number)]}


@pytest.mark.parametrize("ended", ["FINISHED", "FAILED"])
def test_a_run_in_mlflow_ends_as_training_did(ended, run, tmp_path):
    opened = MLflow(str(tmp_path / "mlruns"), "vitkd").open(run())
    if ended == "FINISHED":
        opened.conclude(SETTINGS, (), {})
    else:
        opened.finalize("failed")

    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("vitkd").experiment_id])
    assert (found.info.status, found.info.run_name) == (ended, "digits/run")


class Unreliable:
    """A tracker's run that is lost after so many calls."""

    version, place = "id", "nowhere"

    def __init__(self, calls: int) -> None:
        self.calls, self.logged = calls, []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if not self.calls:
                raise ConnectionError("the server\nis gone")
            self.calls -= 1
            self.logged.append((name, arguments))

        return call


@pytest.mark.parametrize("calls", range(4))
def test_one_that_fails_is_one_warning_and_no_more(calls, run, caplog):
    """A value, a picture, results and the end: each may be where it fails."""
    run_there = Unreliable(calls)
    caplog.set_level("WARNING", logger="vitkd")
    opened = Tracker("wandb", lambda _: run_there, run())
    opened.log_metrics({"train/acc": 0.5}, 1)
    opened.log_picture("attention", PICTURE, 1)
    opened.conclude(SETTINGS, (), {"test/acc_last": 0.5})

    assert len(run_there.logged) == calls
    (line,) = caplog.messages
    assert line == "warning: logger=wandb: the server is gone; training continues without it"


def test_a_tracker_that_cannot_be_reached_is_one_warning(run, caplog):
    def connect(_: str | None) -> Any:
        raise OSError("no route to host")

    opened = Tracker("mlflow", connect, run())
    opened.log_metrics({"train/acc": 0.5}, 1)
    opened.conclude(SETTINGS, (), {})

    assert [line for line in caplog.messages if "no route to host" in line] == caplog.messages


def test_what_an_interrupted_attempt_logged_is_known_from_its_rows(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text("step,a,b\n1,0.1,\n2,0.2,0.3\n3,,0.4\n")

    opened = MetricsFile(file, start=1)

    assert opened.kept == {1: {"a": 0.1}}
    assert opened.dropped == {2: {"a", "b"}, 3: {"b"}}


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("logger=wandb", ["logger=wandb: is not logged in", "wandb login", "logger.wandb.mode=offline"]),
        ("logger=wnadb", ["logger=wnadb", "did you mean wandb?"]),
        ("logger=[tensorboard,mlfow]", ["mlfow", "did you mean mlflow?"]),
        ("logger.wandb.mode=offline", ["logger.wandb.mode", "setting of logger=wandb"]),
        ("logger=wandb logger.wandb.mod=offline", ["did you mean logger.wandb.mode?"]),
        ("logger=[tensorboard,wandb] logger.wandb.mod=offline", ["did you mean logger.wandb.mode?"]),
        ("logger=wandb logger.wandb.mode=ofline", ["mode=ofline", "choose online, offline or disabled"]),
        ("logger=wandb logger.wandb.project=a/b", ["logger.wandb.project=a/b", "128"]),
        ("logger=mlflow logger.mlflow.experiment_name=''", ["logger.mlflow.experiment_name"]),
        ("+trainer.logger=true", ["trainer.logger", "logger=tensorboard"]),
    ],
)
def test_a_mistake_is_one_line(arguments, fragments, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("train", *arguments.split(), *BRIEFLY)

    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("package", ["wandb", "mlflow", "sqlalchemy"])
def test_a_package_that_is_absent_is_one_line(package, command, tmp_path, monkeypatch):
    def absent(name: str) -> None:
        return None if name == package else find_spec(name)

    from importlib.util import find_spec

    for user in ("vitkd.config.loggers", "vitkd.runs.loggers"):
        monkeypatch.setattr(f"{user}.find_spec", absent)
    monkeypatch.chdir(tmp_path)
    database = ["logger=mlflow", "logger.mlflow.tracking_uri=sqlite:///x.db"]
    ended = command("train", *(database if package == "sqlalchemy" else [f"logger={package}"]), *BRIEFLY)

    assert ended.code == 2, ended
    (line,) = ended.err.splitlines()
    assert "pip install" in line
    assert (package if package != "sqlalchemy" else "SQLAlchemy") in line


def test_there_may_be_no_logger():
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        assert parse(hydra.compose("train", ["logger=[]"])).loggers == {}


def rows_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in metrics.csv."""
    with (run / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    names = [name for name in rows[0] if name != "step"]
    return {n: [(int(row["step"]), float(row[n])) for row in rows if row[n]] for n in names}


def assert_tracked(run: Path, outputs: Path) -> None:
    """Both trackers hold the run's curves, each step once, its pictures, settings and results."""
    ids, curves = json.loads((run / "loggers.json").read_text()), rows_of(run)
    metrics = json.loads((run / "metrics.json").read_text())
    for tracked in (in_wandb(run), in_mlflow(outputs / "mlruns", ids["mlflow"])):
        assert tracked.curves.keys() == curves.keys()
        for name, points in curves.items():
            assert [step for step, _ in tracked.curves[name]] == [step for step, _ in points], name
            if name != "train/images_per_second":  # of a step that was taken twice there are two
                assert dict(tracked.curves[name]) == pytest.approx(dict(points)), name
        assert tracked.results["test/acc_last"] == metrics["test/acc_last"]
        assert len({*tracked.pictures}) == len(tracked.pictures)
        assert "alpha" in tracked.settings


@pytest.mark.slow
def test_training_is_the_same_with_all_loggers(command, tmp_path):
    for name, loggers in (("with", ALL), ("without", ["logger=[]"])):
        ended = command("train", *BRIEFLY, *loggers, f"paths.outputs={tmp_path / name}")
        assert ended.code == 0, ended
        assert ended.err == ""
    one, other = (tmp_path / name / "digits" / "run" for name in ("with", "without"))

    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()
    assert not [*other.glob("events*"), *other.glob("wandb"), *other.glob("loggers.json")]
    assert_tracked(one, tmp_path / "with")
    assert {step for _, step in in_wandb(one).pictures} == {3, 6}
    # The teacher's curves are there as well.
    (teacher,) = (tmp_path / "with" / "teachers" / "digits").glob("*[0-9a-f]")
    assert in_wandb(teacher).curves.keys() == rows_of(teacher).keys()


@pytest.mark.slow
def test_a_run_that_was_killed_continues_in_the_same_runs(tmp_path):
    arguments = [*BRIEFLY, *ALL, "log_every_n_steps=1", "resume=auto"]
    # Of a student, in its second epoch: some steps were logged that no checkpoint has.
    struck = crashes.run(arguments, tmp_path, Strike("vitkd.train.logged:LoggedModule._write", 9))
    run = tmp_path / "outputs" / "digits" / "run"
    before = json.loads((run / "loggers.json").read_text())
    resumed = crashes.run(arguments, tmp_path)

    assert (struck.code, resumed.code) == (-9, 0), resumed
    assert "resuming" in resumed.out
    assert len([*run.glob("wandb/offline-run-*")]) == len([*run.glob("wandb/replaced-*")]) == 1
    assert json.loads((run / "loggers.json").read_text()) == before
    assert_tracked(run, tmp_path / "outputs")


@pytest.mark.slow
def test_each_student_of_a_stack_has_runs_of_its_own(command, tmp_path):
    arguments = [setting for setting in BRIEFLY if not setting.startswith("name=")]
    sweep = ["-m", "hydra/launcher=stacked", "seed=0,1", f"paths.outputs={tmp_path}", *ALL]
    ended = command("train", *sweep, *arguments)

    assert ended.code == 0, ended
    assert "train as one stack" in ended.out
    runs = [path.parent for path in (tmp_path / "digits").glob("*/loggers.json")]
    assert len(runs) == 2
    for run in runs:
        assert_tracked(run, tmp_path)
