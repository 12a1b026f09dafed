"""Run folders are read in every state, and nothing else is taken for one."""

import json
import shutil
import subprocess
import sys
from itertools import product

import pytest
import yaml
from filelock import FileLock

from tests.runs.foreign import EVERY, replace
from vitkd import __version__
from vitkd.config.run import CONF_DIR
from vitkd.errors import ConfigError
from vitkd.report.parsing import last, median_ratio, read_curves, settings_of
from vitkd.report.runs import Run, find_runs, read_run
from vitkd.report.settings import option
from vitkd.report.statistics import band
from vitkd.runs.folder import RunFolder


def states(*folders) -> dict[str, str]:
    return {run.path.name: run.state for run in find_runs(folders)}


def test_a_run_as_it_was_trained(finished):
    config = RunFolder(finished).read_config()
    metrics = RunFolder(finished).read_metrics()

    run = read_run(finished)

    assert (run.state, run.method, run.granularity, run.loss) == ("done", "attention", "block", "kl")
    assert (run.alpha, run.seed, run.dataset) == (config["alpha"], config["seed"], "digits")
    assert run.acc_last == pytest.approx(100 * metrics["test/acc_last"])
    assert run.acc_best == pytest.approx(100 * metrics["test/acc_best"])
    assert run.agreement == pytest.approx(100 * metrics["test/teacher_agreement"])
    assert (run.wall_seconds, run.teacher) == (metrics["wall_seconds"], metrics["teacher/weights"])
    assert run.settings["trainer.max_epochs"] == 1
    assert not run.is_teacher


def test_the_curves_of_a_run_as_it_was_trained(finished):
    curves = read_curves(finished / "metrics.csv")

    assert 100 * RunFolder(finished).read_metrics()["val/acc_last"] == pytest.approx(last(curves.validation))
    assert last(curves.transfer) > 0
    assert median_ratio(curves) > 0


def test_the_store_of_teachers_holds_teachers(finished):
    outputs = finished.parent.parent

    found = find_runs([outputs])

    assert [run.path.name for run in found if not run.is_teacher] == ["run"]
    (teacher,) = [run for run in found if run.is_teacher]
    assert teacher.path.parent == outputs / "teachers" / "digits"


def test_states(runs):
    runs.add("good")
    runs.add("failed", state="failed")
    runs.add("stopped", state="stopped")
    runs.add("killed", state="running")
    runs.add("no-metrics", acc=None)
    running = runs.add("running", state="running")

    with FileLock(running / ".lock"):
        found = states(runs.outputs)

    assert found == {
        "good": "done",
        "failed": "failed",
        "stopped": "stopped",
        "killed": "stopped",
        "no-metrics": "damaged",
        "running": "running",
    }


def test_a_run_of_another_version_is_refused_and_both_are_named(runs):
    runs.add("same", version=__version__)
    runs.add("other", version="0.0.9", acc=0.5)

    # Whatever else has changed between the versions.
    config = runs.add("stranger", version="9.0.0") / "config.yaml"
    config.write_text("version: 9.0.0\nmodel: vit\n")

    other, same, stranger = find_runs([runs.outputs])

    assert (other.state, other.acc_last) == ("incompatible", None)
    assert "0.0.9" in other.problem
    assert __version__ in other.problem
    assert (stranger.state, "9.0.0" in stranger.problem) == ("incompatible", True)
    assert same.state == "done"


def test_looking_leaves_a_folder_as_it_was(runs):
    path = runs.add(state="running")
    before = sorted(path.iterdir())

    find_runs([path])

    assert sorted(path.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    [
        *("", "[1, 2]", "a: [", "\x00", "seed: 0", "!!python/object:os.system {}", "&a [*a]"),
        "seed: zero\nalpha: 1\ndataset: {}\nstudent: {}\nmethod: {}\ntrainer: {}",
        "seed: 0\nalpha: much\ndataset: {}\nstudent: {}\nmethod: {}\ntrainer: {}",
    ],
)
def test_a_configuration_that_is_none(runs, text):
    (runs.add("run") / "config.yaml").write_text(text)

    assert states(runs.outputs) == {"run": "damaged"}


def test_a_configuration_that_grows_when_it_is_read(runs):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    mapping = "m0: &m0 {x: 1, y: 2}\n"
    mapping += "".join(f"m{n}: &m{n} {{x: *m{n - 1}, y: *m{n - 1}}}\n" for n in range(1, 40))
    config = runs.add("maps") / "config.yaml"
    config.write_text(config.read_text() + mapping)

    assert states(runs.outputs) == {"maps": "damaged"}

    config.write_text(config.read_text().replace(mapping, "") + bomb)
    assert states(runs.outputs) == {"maps": "damaged"}


NAMES = (
    *("config.yaml", "status.json", "metrics.json"),
    *("metrics.csv", "explain/fidelity.json", "command.json", "inputs.json", "test_details.json"),
)


def test_one_bad_run_is_one_line_and_all_others_are_reported(runs, report):
    """Every file of a run in turn is whatever a file can be."""
    runs.add("alone", method="none", acc=0.8125)
    kinds = [(name, kind) for name in NAMES for kind in EVERY]
    for number, (name, kind) in enumerate(kinds):
        path = runs.add(f"bad-{number}", seed=number + 1, curves=CURVES)
        replace(path / name, EVERY[kind])

    printed = report(runs.outputs)

    found = {run.path.name: run for run in find_runs([runs.outputs])}
    states: dict[str, set[str]] = {name: set() for name in NAMES}
    for number, (name, _) in enumerate(kinds):
        states[name].add(found[f"bad-{number}"].state)
    assert states == {
        "config.yaml": {"damaged"},
        "status.json": {"stopped"},
        "metrics.json": {"damaged"},
        **{name: {"done"} for name in NAMES[3:]},
    }
    assert "81.25" in printed
    assert f"{2 * len(EVERY)} runs damaged" in printed
    content = json.loads((runs.outputs / "report" / "report.json").read_text())
    assert len(content["runs"]) == 1 + len(kinds)


def test_a_number_that_cannot_be_computed_with_stops_no_report(runs, report):
    runs.add("alone", method="none")
    values = [1e308, -1e308, float("inf"), 2**1000, "x", [1], {}, True]
    names = ["wall_seconds", "epochs", "steps", "stack/students", "teacher/weights"]
    for seed, (name, value) in enumerate(product(names, values)):
        runs.add(seed=seed, metrics={name: value}, curves=f"step,val/acc\n1,{value}\n2,0.5\n")

    assert "90.00" in report(runs.outputs)
    assert {run.state for run in find_runs([runs.outputs])} == {"done"}


def test_a_configuration_that_is_too_deep(runs):
    config = runs.add("deep") / "config.yaml"
    config.write_text(config.read_text() + f"deep: {'[' * 300}{']' * 300}\n")

    assert states(runs.outputs) == {"deep": "damaged"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"test/acc_last": null}', '{"test/acc_last": "0.9"}', "{}" * 2]
)
def test_metrics_that_are_none(runs, text):
    (runs.add("run") / "metrics.json").write_text(text)

    assert states(runs.outputs) == {"run": "damaged"}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True])
def test_an_accuracy_is_a_share(runs, share):
    runs.add("run", acc=share)

    assert states(runs.outputs) == {"run": "damaged"}


def test_folders_that_hold_no_runs_are_passed_by(runs):
    runs.add("run")
    for place in ("digits/run/checkpoints", ".hydra", "digits/other/.hydra"):
        folder = runs.outputs / place
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("x: 1")

    assert states(runs.outputs) == {"run": "done"}


NAMES_OF_FOLDERS = ["report", "stacks", "sweeps", "checkpoints", "explain", "teachers", "v1.2", ".hidden"]


@pytest.mark.parametrize("name", NAMES_OF_FOLDERS)
def test_a_run_is_one_whatever_it_and_the_folders_around_it_are_called(name, runs, tmp_path):
    path = runs.add("run")
    places = [
        f"digits/{name}",
        f"{name}/block_kl",
        f"{name}/{name}/{name}",
        f"digits/run/{name}/digits/in-run",
    ]
    for place in places:
        shutil.copytree(path, tmp_path / "copies" / place)
    shutil.copytree(tmp_path / "copies", runs.outputs, dirs_exist_ok=True)

    found = find_runs([runs.outputs])

    assert [run.path for run in found] == sorted(runs.outputs / place for place in ["digits/run", *places])
    assert {run.state for run in found} == {"done"}


def test_a_run_named_like_a_stored_teacher_is_a_run(runs, finished):
    (teacher,) = (finished.parent.parent / "teachers" / "digits").glob("*/config.yaml")
    shutil.copytree(teacher.parent, runs.outputs / "teachers" / "digits" / teacher.parent.name)
    run = runs.add("run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"name": "202611271234"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(run, runs.outputs / "teachers" / "digits" / "202611271234")
    shutil.rmtree(run)

    assert {run.path.name: run.is_teacher for run in find_runs([runs.outputs])} == {
        teacher.parent.name: True,
        "202611271234": False,
    }


def test_another_program_s_configuration_is_foreign(runs):
    runs.add("run")
    other = runs.outputs / "digits" / "other"
    other.mkdir()
    (other / "config.yaml").write_text("model: resnet")

    assert states(runs.outputs) == {"other": "foreign", "run": "done"}


def test_runs_given_twice_count_once(runs):
    path = runs.add("run")

    assert len(find_runs([runs.outputs, path, path / "..", runs.outputs / "digits"])) == 1


def test_a_sweep_s_folder_stands_for_its_jobs(runs, monkeypatch):
    """Records name the folders as they were seen from where the sweep was started."""
    wanted = runs.add("a")
    runs.add("b")
    sweep = runs.outputs / "sweeps" / "now"
    sweep.mkdir(parents=True)
    recorded = wanted.relative_to(runs.outputs.parent)
    (sweep / "job-0.json").write_text(json.dumps({"number": 0, "folder": str(recorded)}))
    (sweep / "job-1.json").write_text(json.dumps({"number": 1, "folder": None}))
    (sweep / "job-2.json").write_text("{")

    assert states(sweep) == {"a": "done"}
    monkeypatch.chdir(runs.outputs.parent)
    assert states(sweep) == {"a": "done"}


def test_no_such_folder_and_no_runs(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="nowhere: there is no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="file: is a file"):
        find_runs([tmp_path / "file"])
    with pytest.raises(ConfigError, match="no runs in it"):
        find_runs([tmp_path])


@pytest.mark.parametrize(
    ("group", "target", "name"),
    [
        ("loss", "vitkd.methods.maps.losses.ReverseKL", "reverse_kl"),
        ("loss", "vitkd.methods.maps.losses.MSE", "mse"),
        ("granularity", "vitkd.methods.maps.granularity.Encoder", "encoder"),
        ("method", "vitkd.methods.attention.AttentionDistillation", "attention"),
        ("method", "vitkd.methods.none.NoDistillation", "none"),
        ("method", "vitkd.methods.base.LogitDistillation", "logit"),
    ],
)
def test_options_are_called_as_they_are_typed(group, target, name):
    assert option({f"{group}._target_": target}, group) == name


@pytest.mark.parametrize("file", sorted(CONF_DIR.glob("method/*.yaml")), ids=lambda file: file.stem)
def test_a_method_is_called_by_its_files_name(file):
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    target = settings.get("method", settings)["_target_"]

    assert option({"method._target_": target}, "method") == file.stem


def test_settings_are_flat():
    nested = {"a": {"b": [1, None], "c": None}, "d": 1.5, "e": float("inf"), "f": float("nan"), "g": -1}
    assert settings_of(nested) == {
        "a.b": "[1, null]",
        "a.c": None,
        "d": 1.5,
        "e": "Infinity",
        "f": "NaN",
        "g": -1,
    }


def test_a_setting_without_end_stops_no_report(runs, report):
    runs.add(method="none", optimizer__lr=float("inf"))
    runs.add(optimizer__lr=float("inf"), alpha=0.25)

    assert "alpha 0.25" in report(runs.outputs)


def test_fidelity_is_read_where_it_was_measured(runs):
    written = {
        "best": '{"epoch": "best", "summary": {"js_distilled": 0.25}}',
        "broken": '{"epoch": "best", "summary": 3}',
        "last": '{"epoch": "last", "summary": {"js_distilled": 0.5}}',
        "of-no-epoch": '{"summary": {"js_distilled": 0.25}}',
        "of-some-epoch": '{"epoch": ["best"], "summary": {"js_distilled": 0.25}}',
    }
    for name, text in written.items():
        path = runs.add(name)
        (path / "explain").mkdir()
        (path / "explain" / "fidelity.json").write_text(text)
    runs.add("unseen")

    found = {run.path.name: run.fidelity for run in find_runs([runs.outputs])}

    assert found == {
        "best": (0.25, "best"),
        "broken": None,
        "last": (0.5, "last"),
        "of-no-epoch": None,
        "of-some-epoch": None,
        "unseen": None,
    }


CURVES = """\
step,val/acc,train/acc,val/transfer_loss,train/gradient_ratio
10,0.5,,2.0,4
20,,0.3,,1
30,0.75,,1.5,9
"""


def test_curves_by_hand(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(CURVES + "40,0.9")

    curves = read_curves(file)

    assert curves.validation == {10: 50.0, 30: 75.0}
    assert last(curves.transfer) == 1.5
    assert median_ratio(curves) == 4


@pytest.mark.parametrize("written", [b"", b"\n", b"a,b\n1,2\n", b"\xff\xfe\n", b"step,val/acc\nx,y\n", None])
def test_a_file_without_curves(tmp_path, written):
    if written is not None:
        (tmp_path / "metrics.csv").write_bytes(written)

    curves = read_curves(tmp_path / "metrics.csv")

    assert curves == ({}, {}, {})
    assert last(curves.transfer) is None
    assert median_ratio(curves) is None


def test_a_band_by_hand():
    over_seeds = band([{1: 1.0, 2: 2.0}, {1: 3.0, 2: 6.0, 3: 9.0}, {}])

    assert over_seeds.steps.tolist() == [1, 2]
    assert over_seeds.mean.tolist() == [2.0, 4.0]
    assert over_seeds.std.tolist() == pytest.approx([2**0.5, 8**0.5])
    assert over_seeds.seeds == 2
    assert band([{}]) is None
    assert band([{1: 1.0}, {2: 1.0}]) is None


def test_the_student_alone_is_either():
    attention = Run("x", "done", method="attention", alpha=0.5)

    assert not attention.is_student_alone
    assert Run("x", "done", method="attention", alpha=1.0).is_student_alone
    assert Run("x", "done", method="none", alpha=0.5).is_student_alone
    assert Run("x", "done", method="logit", alpha=1.0).is_student_alone
    assert not Run("x", "done", method="logit", alpha=0.5).is_student_alone


def test_nothing_heavy_is_imported():
    check = "import sys, vitkd.report.__main__; print({'torch', 'lightning', 'hydra'} & {*sys.modules})"

    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
