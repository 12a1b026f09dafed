"""Several jobs by one command: none stops the others, and the same command again runs what is missing."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra.core.plugins import Plugins
from safetensors.torch import load_file

from tests import crashes
from tests.crashes import Strike
from vitkd.cli.console import Job
from vitkd.cli.jobs import Sweep, as_settings
from vitkd.runs.folder import RunFolder

ALONE = [
    *("method=none", "student.depth=1", "trainer=cpu", "trainer.max_epochs=2", "student.dropout=0.1"),
    *("+trainer.limit_train_batches=2", "pictures_every_n_epochs=0"),
]
BESIDE_A_TEACHER = [*ALONE[1:], "teacher.depth=1", "teacher.max_epochs=1"]
# One folder name a job, short enough for one line of the table.
NAMED = "name=seed${seed}"
STEP = "vitkd.train.module:DistillModule.training_step"
STEPS_A_JOB = 4


class SweepResult(NamedTuple):
    """What a multirun said and left."""

    code: int
    out: str
    err: str
    records: list[dict[str, Any]]
    """of outputs/sweeps/<time>/job-N.json, in order"""

    @property
    def closing(self) -> str:
        """What comes after all jobs: the table and, below it, what went wrong."""
        return re.split(r"^job +state .*\n", self.out, flags=re.MULTILINE)[-1]

    @property
    def table(self) -> list[str]:
        """The closing table's rows."""
        return [line for line in self.closing.splitlines() if re.match(r"\d+ ", line)]

    @property
    def states(self) -> list[str]:
        known = "done before|done|failed|stopped|not run|running elsewhere"
        return [re.findall(rf"  ({known})  ", row)[0] for row in self.table]


class Sweeps:
    """A folder of outputs, and the commands that add to it."""

    def __init__(self, path: Path, command: Any) -> None:
        self.path, self.command = path, command

    def run(self, *arguments: str) -> SweepResult:
        ended = self.command("train", "-m", *arguments, f"paths.outputs={self.path}")
        return SweepResult(*ended, records_of(self.path))

    def folder(self, name: str) -> Path:
        return self.path / "digits" / name


@pytest.fixture
def sweeps(tmp_path, command) -> Sweeps:
    return Sweeps(tmp_path / "outputs", command)


def records_of(outputs: Path) -> list[dict[str, Any]]:
    """What the newest sweep has on record."""
    newest = max((outputs / "sweeps").iterdir())
    return [read(newest / f"job-{n}.json") for n in range(len([*newest.glob("job-*.json")]))]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def state_of(folder: Path) -> str:
    return read(folder / "status.json")["state"]


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file, when it was written and what it holds."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def weights(outputs: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every student's, by its folder's name."""
    return {path.parent.name: load_file(path) for path in (outputs / "digits").glob("*/student.safetensors")}


def are_equal(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[run].keys() == b[run].keys() and all(torch.equal(a[run][name], b[run][name]) for name in a[run])
        for run in a
    )


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """at_step(n, act) lets `act` happen before the nth training step of all jobs together."""

    def arrange(nth: int, act: Callable[[], None]) -> None:
        from vitkd.train.module import DistillModule

        original, calls = DistillModule.training_step, 0

        def step(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                act()
            return original(*args)

        monkeypatch.setattr(DistillModule, "training_step", step)

    return arrange


class Mixed(NamedTuple):
    """A sweep of good and bad jobs, run twice."""

    sweeps: Sweeps
    first: SweepResult
    before: dict[Path, tuple[int, bytes]]
    again: SweepResult
    after: dict[Path, tuple[int, bytes]]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, command) -> Mixed:
    sweeps = Sweeps(tmp_path_factory.mktemp("mixed") / "outputs", command)
    jobs = ["alpha=7,0.5", "optimizer.lr=1e38,0.001", "name=a${alpha}-lr${optimizer.lr}", *BESIDE_A_TEACHER]
    first = sweeps.run(*jobs)
    before = contents(sweeps.path / "digits" / "a0.5-lr0.001")
    again = sweeps.run(*jobs)
    return Mixed(sweeps, first, before, again, contents(sweeps.path / "digits" / "a0.5-lr0.001"))


class TestJobsThatFail:
    """A value out of range, a loss that is not finite, and one good job, which comes last."""

    def test_do_not_stop_the_others(self, mixed):
        assert mixed.first.code == 1
        assert [job["state"] for job in mixed.first.records] == ["failed", "failed", "failed", "done"]
        assert state_of(mixed.sweeps.folder("a0.5-lr0.001")) == "done"

    def test_the_table_names_every_job_its_settings_and_its_state(self, mixed):
        assert [row.split("  ")[0] for row in mixed.first.table] == [
            "0 alpha=7 optimizer.lr=1e+38",
            "1 alpha=7 optimizer.lr=0.001",
            "2 alpha=0.5 optimizer.lr=1e+38",
            "3 alpha=0.5 optimizer.lr=0.001",
        ]
        assert mixed.first.states == ["failed", "failed", "failed", "done"]

    def test_the_table_names_figures_and_folders(self, mixed):
        metrics = read(mixed.sweeps.folder("a0.5-lr0.001") / "metrics.json")
        figures = [metrics[name] for name in ("teacher/test_acc", "val/acc_best", "test/acc_best")]

        row = mixed.first.table[3].split()
        assert row[-5:-1] == [f"{figure:.2%}" for figure in (*figures, metrics["test/acc_last"])]
        assert row[-1] == "a0.5-lr0.001"
        assert mixed.first.table[2].split()[-5:] == ["–"] * 4 + ["a0.5-lr1e+38"]
        assert f"folders   {mixed.sweeps.path / 'digits'}" in mixed.first.out.replace("\n", "")

    def test_each_is_reported_in_one_line_at_once_and_below_the_table(self, mixed):
        lines = [line for line in mixed.first.err.splitlines() if line.startswith("error: ")]

        first, same, other = (record["error"] for record in mixed.first.records[:3])
        assert same == first
        assert lines == [
            f"error: job {n} failed: {said}" for n, said in enumerate((first, "as job 0", other))
        ]
        assert "Traceback" not in mixed.first.err
        assert f"jobs 0-1 failed: {first}" in mixed.first.closing
        assert f"job 2 failed: {other}" in mixed.first.closing
        assert "alpha=7.0: must lie in [0, 1]" in lines[0]
        assert "is not finite" in lines[2]

    def test_run_again_where_the_good_one_is_skipped(self, mixed):
        assert mixed.again.code == 1
        assert mixed.again.states == ["failed", "failed", "failed", "done before"]
        assert mixed.after == mixed.before
        assert mixed.again.records[3]["metrics"] == mixed.first.records[3]["metrics"]
        assert mixed.again.table[3].split()[-5:] == mixed.first.table[3].split()[-5:]

    def test_go_on_in_their_own_folder(self, mixed):
        assert {path.name for path in (mixed.sweeps.path / "digits").iterdir()} == {
            "a0.5-lr0.001",
            "a0.5-lr1e+38",
        }

    def test_nothing_lies_beside_the_runs(self, mixed):
        assert {path.name for path in mixed.sweeps.path.iterdir()} == {"digits", "sweeps", "teachers"}


def test_an_unexpected_error_ends_its_own_job_alone(sweeps, at_step):
    def break_off() -> None:
        raise KeyError("something\nodd")

    at_step(1, break_off)
    ended = sweeps.run("seed=0,1", NAMED, *ALONE)

    assert (ended.code, ended.states) == (1, ["failed", "done"])
    # Whoever mends it needs to know where.
    assert "Traceback" in ended.err
    assert "break_off" in ended.err
    assert "KeyError" in ended.records[0]["error"]
    assert "\n" not in ended.records[0]["error"]


def test_a_choice_that_does_not_exist_is_reported_before_any_job_runs(sweeps):
    ended = sweeps.command("train", "-m", "loss=kl,nonsense", *ALONE, f"paths.outputs={sweeps.path}")

    assert ended.code == 2
    assert ended.err.startswith("error: loss=nonsense: no such option")
    assert ended.err.count("\n") == 1
    assert not (sweeps.path / "digits").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_stops_the_sweep_and_the_same_command_finishes_it(number, sweeps, at_step, monkeypatch):
    at_step(STEPS_A_JOB + 2, lambda: os.kill(os.getpid(), number))
    stopped = sweeps.run("seed=0,1,2,3", NAMED, *ALONE)

    assert stopped.code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert stopped.states == ["done", "stopped", "not run", "not run"]
    assert [row.split()[:2] for row in stopped.table] == [[str(n), f"seed={n}"] for n in range(4)]
    assert state_of(sweeps.folder("seed1")) == "stopped"
    assert not sweeps.folder("seed2").exists()
    assert len(stopped.err.splitlines()) == 1

    monkeypatch.undo()
    first = contents(sweeps.folder("seed0"))
    ended = sweeps.run("seed=0,1,2,3", NAMED, *ALONE)
    whole = Sweeps(sweeps.path.with_name("whole"), sweeps.command)
    whole.run("seed=0,1,2,3", NAMED, *ALONE)

    assert (ended.code, ended.states) == (0, ["done before", "done", "done", "done"])
    assert contents(sweeps.folder("seed0")) == first
    assert are_equal(weights(sweeps.path), weights(whole.path))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command) -> Sweeps:
    sweeps = Sweeps(tmp_path_factory.mktemp("again") / "outputs", command)
    assert sweeps.run("seed=0,1", NAMED, *ALONE).states == ["done", "done"]
    return sweeps


@pytest.mark.slow
class TestAgain:
    def test_all_is_done_before(self, outputs):
        before = contents(outputs.path / "digits")

        ended = outputs.run("seed=0,1", NAMED, *ALONE)

        assert (ended.code, ended.states, ended.err) == (0, ["done before", "done before"], "")
        assert contents(outputs.path / "digits") == before

    def test_a_wider_sweep_runs_what_is_new(self, outputs):
        assert outputs.run("seed=1,2", NAMED, *ALONE).states == ["done before", "done"]

    def test_a_run_by_itself_counts_too(self, outputs):
        alone = [*ALONE, "seed=5", "name=seed5", f"paths.outputs={outputs.path}"]
        assert outputs.command("train", *alone).code == 0

        assert outputs.run("seed=5,0", NAMED, *ALONE).states == ["done before", "done before"]

    def test_rerun_all_runs_all_again_beside_them(self, outputs):
        before = contents(outputs.folder("seed0"))

        ended = outputs.run("seed=0,1", NAMED, *ALONE, "sweep.rerun=all")

        assert ended.states == ["done", "done"]
        assert [Path(job["folder"]).name for job in ended.records] == ["seed0-2", "seed1-2"]
        assert contents(outputs.folder("seed0")) == before
        students = weights(outputs.path)
        assert are_equal({"": students["seed0"]}, {"": students["seed0-2"]})

    def test_another_setting_starts_a_new_run_and_names_it(self, outputs):
        ended = outputs.run("seed=0", NAMED, *ALONE, "optimizer.lr=0.01")

        (line,) = (line for line in ended.out.splitlines() if "starting a new run" in line)
        assert "optimizer.lr" in line
        assert ended.states == ["done"]
        assert RunFolder(Path(ended.records[0]["folder"])).read_config()["optimizer"]["lr"] == 0.01

    def test_what_changes_no_figure_does_not(self, outputs):
        ended = outputs.run("seed=0", NAMED, *ALONE, "checkpoint_minutes=3")

        assert ended.states == ["done before"]

    @pytest.fixture
    def auto(self, outputs) -> Callable[..., Any]:
        """auto("seed=1") trains it by itself, with resume=auto."""
        into = f"paths.outputs={outputs.path}"
        return lambda *more: outputs.command("train", *ALONE, into, NAMED, "resume=auto", *more)

    def test_a_single_run_that_is_done_is_skipped(self, auto, outputs):
        before = contents(outputs.path / "digits")

        ended = auto("seed=1")

        assert (ended.code, ended.err) == (0, "")
        assert "already done" in ended.out
        assert str(outputs.folder("seed1")) in ended.out
        assert contents(outputs.path / "digits") == before

    def test_a_single_run_with_another_setting_starts_beside_and_names_it(self, auto, outputs):
        before = contents(outputs.folder("seed1"))

        ended = auto("seed=1", "student.mlp_dim=16")

        assert ended.code == 0
        (line,) = (line for line in ended.out.splitlines() if "starting a new run" in line)
        assert line.startswith(str(outputs.folder("seed1")))
        assert "has another student.mlp_dim:" in line
        assert contents(outputs.folder("seed1")) == before

    def test_a_running_run_is_skipped(self, auto, outputs):
        folder = RunFolder(outputs.folder("live"))
        folder.path.mkdir()
        settings = RunFolder(outputs.folder("seed1")).read_config()
        with folder.running(settings):
            before = contents(folder.path)

            single = auto("seed=1", "name=live")
            swept = outputs.run("seed=1", "name=live", *ALONE)

            assert contents(folder.path) == before
        assert single.code == swept.code == 0
        assert "skipped, another process is running it" in single.out
        assert swept.states == ["running elsewhere"]
        assert not outputs.folder("live-2").exists()


class TestPlanned:
    """The list of jobs, which is known before the first one runs."""

    @pytest.mark.parametrize(
        ("overrides", "count"),
        [
            (["seed=range(3)"], 3),
            (["seed=range(2,9,3)", "alpha=choice(0.1,0.2)"], 6),
            (["loss=glob(*)"], 5),
            (["loss=glob([k*,m*],exclude=mse)", "seed=0,1"], 2),
            (["alpha=0.1,0.2", "seed=sort(range(3),reverse=true)"], 6),
            (["name='a b','c,d'"], 2),
            (['name="a=b",c'], 2),
            (["seed=0,1", "name=s${seed}"], 2),
            (["seed=0,1", "+teacher.checkpoint=null,${name}"], 4),
            (["seed=0,1", "paths.data=${oc.env:HOME}"], 2),
            (["granularity.blocks=[0],[1]", "granularity=block"], 2),
            (["sweep=grid"], 108),
            (["sweep=grid", "loss=kl", "seed=0,1"], 24),
            (["sweep=grid", "hydra.sweeper.max_batch_size=50"], 108),
            (["seed=1"], 1),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_is_what_runs(self, overrides, count, sweeps, monkeypatch):
        launched: list[list[str]] = []
        # Hydra loads its plugins as classes of its own, which no import gives.
        plugins = Plugins.instance().class_name_to_class
        core = "hydra._internal.core_plugins"
        sweeper = plugins[f"{core}.basic_sweeper.BasicSweeper"]
        launcher = plugins[f"{core}.basic_launcher.BasicLauncher"]
        monkeypatch.setattr(sweeper, "validate_batch_is_legal", lambda *_: None)
        monkeypatch.setattr(launcher, "launch", lambda _, jobs, **__: launched.extend(jobs) or [])
        ended = sweeps.command("train", "-m", *overrides, f"paths.outputs={sweeps.path}")
        assert Sweep.current is not None

        assert (ended.code, ended.err) == (0, "")
        assert len(launched) == len(Sweep.current.planned) == count
        assert [as_settings(job) for job in launched] == [job.settings for job in Sweep.current.planned]

    def test_names_what_never_ran(self, sweeps, monkeypatch):
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("vitkd.train.job.run_job", stop)
        ended = sweeps.run("loss=glob(*)", "seed=range(2)")

        assert ended.code == 130
        assert ended.states == ["stopped"] + ["not run"] * 9
        assert ended.table[-1].startswith("9 loss=reverse_kl seed=1 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strike",
    [
        Strike(STEP, STEPS_A_JOB + 4),
        Strike("vitkd.runs.folder:RunFolder.claim", 2, after=True),
        Strike("vitkd.runs.folder:RunFolder.write_metrics", 2),
        Strike("vitkd.cli.jobs:write_atomically", 4),
    ],
    ids=["in training", "when its folder is made", "before its figures", "before its record"],
)
def test_a_sweep_that_was_killed_is_finished_by_the_same_command(strike, sweeps):
    arguments = ["-m", "seed=0,1,2", NAMED, *ALONE]
    killed = crashes.run(arguments, sweeps.path.parent, strike)
    done = contents(sweeps.folder("seed0"))

    ended = crashes.run(arguments, sweeps.path.parent)
    result = SweepResult(*ended, records_of(sweeps.path))
    whole = crashes.run([*arguments, "paths.outputs=whole"], sweeps.path.parent)

    assert (killed.code, ended.code, whole.code) == (-signal.SIGKILL, 0, 0), ended.err
    # A folder that was made and never used tells of nothing, and the run gets the next one.
    names = [Path(job["folder"]).name.removesuffix("-2") for job in result.records]
    assert names == ["seed0", "seed1", "seed2"]
    states = [result.records[n]["state"] for n in range(3)]
    assert states in (["done before", "done", "done"], ["done before", "done before", "done"])
    assert contents(sweeps.folder("seed0")) == done
    students = {name.removesuffix("-2"): student for name, student in weights(sweeps.path).items()}
    assert are_equal(students, weights(sweeps.path.with_name("whole")))


@pytest.mark.slow
def test_two_identical_sweeps_at_once_both_end_well(tmp_path):
    arguments = ["-m", "seed=0,1", NAMED, *BESIDE_A_TEACHER]
    both = [crashes.start(arguments, tmp_path) for _ in range(2)]
    ended = [crashes.end(process, tmp_path) for process in both]
    records = [read(path) for path in (tmp_path / "outputs" / "sweeps").glob("*/job-*.json")]

    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert [end.err for end in ended] == ["", ""]
    at_work = [job["folder"] for job in records if job["state"] == "done"]
    assert len(at_work) == len({*at_work})
    assert {job["state"] for job in records} <= {"done", "done before", "running elsewhere"}
    folders = [*(tmp_path / "outputs" / "digits").iterdir()]
    assert {state_of(folder) for folder in folders} == {"done"}
    students = weights(tmp_path / "outputs")
    for seed in (0, 1):
        same = [{"": student} for name, student in students.items() if name.startswith(f"seed{seed}")]
        assert same
        assert all(are_equal(same[0], other) for other in same)


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_skipped(tmp_path):
    arguments = [*ALONE, "name=live", "resume=auto", "trainer.max_epochs=100000"]
    live = crashes.start(arguments, tmp_path)
    folder = RunFolder(tmp_path / "outputs" / "digits" / "live")
    while not folder.last.exists():
        assert live.is_alive()
    os.kill(live.pid, signal.SIGSTOP)
    before = contents(folder.path)

    second = crashes.run(arguments, tmp_path)

    assert second.code == 0
    assert "skipped, another process is running it" in second.out
    assert contents(folder.path) == before
    os.kill(live.pid, signal.SIGTERM)
    os.kill(live.pid, signal.SIGCONT)
    assert crashes.end(live, tmp_path).code == 143
    assert folder.state == "stopped"
    assert [path.name for path in folder.path.parent.iterdir()] == ["live"]


def test_records_of_an_earlier_sweep_are_none_of_this_one(command, tmp_path):
    """Where `hydra.sweep.dir` is always the same."""
    fixed = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    stale = Job(7, {"seed": "7"}, "failed", error="long ago")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "job-7.json").write_text(json.dumps(asdict(stale)))
    strangers = {"job-8.json": '{"mine": 1}', "job-x.json": "notes", "job-9.json": "[]"}
    for name, content in strangers.items():
        (tmp_path / "sweep" / name).write_text(content)

    # Wherever -m stands.
    ended = command("train", *ALONE, f"paths.outputs={tmp_path}", "-m", fixed, "seed=0,1")

    assert ended.code == 0, ended.err
    assert "long ago" not in ended.out
    assert {name: (tmp_path / "sweep" / name).read_text() for name in strangers} == strangers


def test_a_record_that_is_removed_hides_no_failure(sweeps, at_step):
    at_step(1, lambda: shutil.rmtree(sweeps.path / "sweeps"))

    ended = sweeps.command("train", "-m", "seed=-1,0", NAMED, *ALONE, f"paths.outputs={sweeps.path}")

    assert ended.code == 1
    assert SweepResult(*ended, []).states == ["failed", "done"]


@pytest.mark.parametrize("launcher", ["basic", "stacked"])
def test_outputs_that_may_not_be_written_are_one_line_a_job(launcher, sweeps, tmp_path, monkeypatch):
    """Of a teacher's lock, the first file that a job makes there."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "teacher.lock")

    monkeypatch.setattr("vitkd.runs.teacher_store.acquired", refuse)
    ended = sweeps.run(f"hydra/launcher={launcher}", "seed=0,1", *BESIDE_A_TEACHER)

    assert (ended.code, ended.states) == (1, ["failed", "failed"])
    line, same = ended.err.splitlines()
    assert "teacher.lock: cannot be written" in line
    assert line.endswith("make that writable or set paths.outputs=DIR")
    assert same == "error: job 1 failed: as job 0"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [["name=run"], ["-m", "name=run"]], ids=["alone", "in a sweep"])
def test_outputs_that_are_removed_during_a_run_are_one_line(jobs, tmp_path):
    run = tmp_path / "outputs" / "digits" / "run"
    process = crashes.start([*jobs, *ALONE, "trainer.max_epochs=100000"], tmp_path)
    while not (run / "checkpoints" / "last.ckpt").exists():
        assert process.is_alive()

    shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
    ended = crashes.end(process, tmp_path)

    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert "outputs/digits/run: was removed" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["check_hydra", "print_jobs"], ids=["composing", "printing the table"])
def test_a_signal_outside_of_any_job_is_one_line_too(where, number, tmp_path):
    strike = Strike(f"vitkd.cli.command:{where}", 1, number)

    ended = crashes.run(["-m", "seed=-1,-2"], tmp_path, strike)

    assert ended.code == 128 + number
    name = {signal.SIGINT: "Ctrl-C"}.get(number, signal.Signals(number).name)
    assert ended.err.splitlines()[-1] == f"error: stopped by {name}"
    assert "Traceback" not in ended.err
