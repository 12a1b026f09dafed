"""The evidence begins what fits, keeps what is done, resumes, and is reported truly."""

import csv
import io
import json
import math
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import vitkd
from benchmarks import evidence, evidence_table
from benchmarks.command import environment
from benchmarks.evidence import Stage
from benchmarks.evidence_table import ALONE, REPORTED, Result, arm_of, markdown, write_table
from benchmarks.evidence_time import Cost, jobs_of, measure
from vitkd.config import computing
from vitkd.config.roles import Separates, relevant
from vitkd.errors import ConfigError
from vitkd.models import digest, save_model
from vitkd.runs.folder import RunFolder

TINY_GRID = ("--grid", "granularity=head loss=kl alpha=0.5,1")


def options(*arguments: str, outputs: Path | str = "/o"):
    return evidence.read_arguments(["--outputs", str(outputs), "--data", "/d", *arguments])


@pytest.fixture
def teachers(monkeypatch):
    """teachers("teacher", …): those stages' teachers of seeds 0 and 1 are trained."""

    def done(*stages: str, seeds: tuple[int, ...] = (0,)) -> None:
        there = {stage: {seed: Path(f"/o/{stage}/run-{seed}") for seed in seeds} for stage in stages}
        monkeypatch.setattr(evidence, "teachers_of", lambda options, stage: there.get(stage, {}))

    return done


# What is run.


def test_students_come_after_their_teacher_and_the_reports_protocol_last(teachers):
    teachers()
    assert [stage.name for stage in evidence.stages(options())] == ["teacher", "protocol-teacher"]
    assert next(evidence.stages(options())).axes == {"seed": ("0",)}

    teachers("teacher", "protocol-teacher", seeds=(0, 1))
    found = [*evidence.stages(options("--teachers", "2"))]

    assert [stage.name for stage in found] == [
        *("teacher", "students-0", "students-1"),
        *("protocol-teacher", "protocol-students-0", "protocol-students-1"),
    ]
    assert found[0].axes == {"seed": ("0", "1")}
    assert {"teacher.checkpoint=/o/teacher/run-1", "paths.outputs=/o/students-1"} < set(found[2].settings)
    protocol = {"dataset=cifar100_report_protocol", "teacher.checkpoint=/o/protocol-teacher/run-1"}
    assert protocol < set(found[5].settings)
    assert all("pictures_every_n_epochs=0" in stage.settings for stage in found)


def test_one_stack_trains_the_student_alone_the_reports_cells_and_the_grid(teachers):
    teachers("teacher")
    _, students, *_ = evidence.stages(options())
    settings = [setting for setting in students.settings if not setting.startswith("teacher.checkpoint")]

    jobs = jobs_of(settings, students.axes)

    # 3 granularities × 2 losses × 3 alphas × 3 seeds, and the student alone once a seed.
    assert (len(jobs), sum(map(len, jobs))) == (54 + 3, 72)
    trained = [first for first, *_ in jobs]
    arms = [arm_of(config.resolved) for config in trained]
    assert {*REPORTED} - {"teacher"} < {*arms}
    assert arms.count(ALONE) == 3
    stacks = [json.dumps(relevant(config.resolved, Separates.STACKS), default=str) for config in trained]
    assert len({*stacks}) == 1


def test_further_overrides_go_to_every_stage_and_come_last(teachers):
    teachers("teacher")

    for stage in evidence.stages(options("trainer.precision=bf16-mixed", "--epochs", "3", "seed=7")):
        assert stage.settings[-2:] == ("trainer.precision=bf16-mixed", "seed=7")
        assert ("trainer.max_epochs=3" in stage.overrides) == ("students" in stage.name)


def test_a_stage_is_done_only_for_the_very_command(tmp_path, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(evidence, "admit", lambda options, stage: stage)
    monkeypatch.setattr(evidence, "run_stage", lambda options, stage: ran.append(stage.name) or 0)
    monkeypatch.setattr(evidence, "export", lambda *_: "")

    for epochs in ("1", "1", "2"):
        given = options("--quick", "--teacher-epochs", epochs, outputs=tmp_path)
        assert evidence.run_stages(given) == 0

    assert ran == ["teacher", "teacher"]


def test_a_stage_that_fails_is_skipped_and_reported_by_the_exit_code(tmp_path, monkeypatch, teachers):
    ran: list[str] = []
    teachers("teacher", "protocol-teacher")
    monkeypatch.setattr(evidence, "admit", lambda options, stage: stage)
    monkeypatch.setattr(evidence, "export", lambda *_: "")
    monkeypatch.setattr(
        evidence,
        "run_stage",
        lambda options, stage: ran.append(stage.name) or int(stage.name == "students-0"),
    )
    given = options(outputs=tmp_path)

    assert evidence.run_stages(given) == 1
    assert ran == ["teacher", "students-0", "protocol-teacher", "protocol-students-0"]
    assert evidence.next_stage(given, set()).name == "students-0"


def test_a_teacher_that_is_there_is_not_trained_and_its_weights_are_named(
    tmp_path, monkeypatch, tiny, capsys
):
    model = tiny().build()
    save_model(model, file := tmp_path / "teacher.safetensors", {})
    monkeypatch.setattr(evidence, "run_stages", lambda options: 0)
    monkeypatch.setattr(evidence, "export", lambda *_: "")

    assert evidence.main(["--teacher", str(file), "--outputs", str(tmp_path / "o")]) == 0

    assert f"weights {digest(model)}" in (tmp_path / "o" / "evidence.log").read_text("utf-8")
    first = next(evidence.stages(options("--teacher", str(file))))
    assert (first.name, f"teacher.checkpoint={file}" in first.settings) == ("students-0", True)
    assert evidence.main(["--teacher", str(tmp_path / "none"), "--outputs", str(tmp_path / "o")]) == 2
    assert "none: there is no such file" in capsys.readouterr().err


# What fits.

COST = Cost(students=57, step=0.02, epoch=14.0, fixed=40.0)


@pytest.mark.parametrize(("seconds", "epochs"), [(320, 20), (319.9, 19), (54, 1), (53, 0), (0, 0), (-5, 0)])
def test_as_many_epochs_fit_as_end_before_the_time_does(seconds, epochs):
    assert COST.epochs_in(seconds) == epochs


@pytest.mark.parametrize(
    ("asked", "seconds", "admitted"),
    [
        *((None, 1440, 100), (None, 1430, None), (7, 139, 7), (7, 137, None)),
        *((evidence.FIT, 139, 7), (evidence.FIT, 9999, 100), (evidence.FIT, 50, None)),
    ],
)
def test_a_stage_is_begun_only_if_it_can_finish(asked, seconds, admitted, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "left", lambda options: seconds)
    given = options(outputs=tmp_path)

    found = evidence.fitted(given, Stage("students-0", (), {}, asked), COST, 100)

    assert (found and found.epochs) == admitted
    line = (tmp_path / "evidence.log").read_text("utf-8")
    assert all(text in line for text in ("S = 57", "20.0 ms a step (measured)", "14.0 s an epoch"))
    assert (f"room for {COST.epochs_in(seconds)}: not begun" in line) == (admitted is None)


def test_what_cannot_finish_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "measure", lambda settings, axes: COST)
    monkeypatch.setattr(evidence, "run_stage", pytest.fail)

    given = options("--quick", "--minutes", "1", outputs=tmp_path)

    assert evidence.run_stages(given) == evidence.UNFINISHED
    assert evidence.run_stages(options("--quick", "--minutes", "0", outputs=tmp_path)) == evidence.UNFINISHED


def test_in_parts_or_without_an_end_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(evidence, "measure", pytest.fail)
    stage = Stage("students-0", ("dataset=digits", "schedule=constant"), {}, None)

    assert evidence.admit(options(), stage).epochs == 20
    assert evidence.admit(options(), replace(stage, epochs=evidence.FIT)).epochs == 20
    assert evidence.admit(options("--minutes", "1", "--in-parts"), replace(stage, epochs=3)).epochs == 3


def test_fewer_epochs_are_a_part_of_all_at_a_constant_rate_only():
    stage = Stage("students-0", ("dataset=digits", "schedule=cosine"), {}, 3)

    with pytest.raises(ConfigError, match=r"WarmupCosine .* 20 epochs; set schedule=constant"):
        evidence.admit(options(), stage)
    assert evidence.admit(options(), replace(stage, epochs=20)).epochs == 20


def test_the_steps_of_a_stages_own_students_are_timed():
    settings = ["dataset=digits", "student=small", "teacher=small", "trainer.limit_train_batches=5"]

    stack = measure(settings, {"loss": ("mse", "kl", "ce"), "alpha": ("0.5", "1"), "seed": ("0", "1")})
    alone = measure([*settings, "method=none"], {"seed": ("0",)})

    assert (stack.students, alone.students) == (6, 1)
    for cost, jobs in ((stack, 12), (alone, 1)):
        assert 0 < cost.step < math.inf
        # 5 steps, and 144 images held out, of which a forward pass is a third of a step's 64.
        assert cost.epoch / cost.step == pytest.approx(1.1 * (5 + 144 / 64 / 3), rel=0.02)
        # Both the last and the best weights answer 359 images.
        assert cost.fixed == pytest.approx(15 + 0.4 * jobs + 2 * 359 / 64 / 3 * cost.step)


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_they_are_timed_as_they_will_be_computed(choice, monkeypatch):
    asked = []
    monkeypatch.setattr(computing, "allow_kernels", asked.append)

    measure(["dataset=digits", "student=small", "method=none", f"kernels={choice}"], {"seed": ("0",)})

    assert asked == [choice]


@pytest.mark.parametrize("ignores", [False, True], ids=["saves", "hangs"])
def test_a_stage_is_stopped_when_its_time_is_up(tmp_path, monkeypatch, ignores):
    handler = "signal.SIG_IGN" if ignores else "lambda *_: sys.exit(143)"
    script = f"import signal, sys, time\nsignal.signal(signal.SIGTERM, {handler})\ntime.sleep(60)"
    monkeypatch.setattr(evidence, "train_command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(evidence, "RESERVE", 0.5)
    start = time.monotonic()

    given = options("--minutes", "0.03", outputs=tmp_path)

    assert evidence.run_stage(given, Stage("slow", (), {}, None)) is None
    assert time.monotonic() - start < 30
    assert "out of time" in (tmp_path / "evidence.log").read_text("utf-8")


# What is kept.

CELL = {
    "version": vitkd.__version__,
    "method": {"_target_": "vitkd.methods.attention.AttentionDistillation"},
    "granularity": {"_target_": "vitkd.methods.maps.granularity.Encoder"},
    "loss": {"_target_": "vitkd.methods.maps.losses.MSE"},
    "alpha": 0.00015,
    "seed": 0,
    "paths": {},
    "trainer": {"max_epochs": 19},
    "dataset": {"name": "cifar100", "max_epochs": 100},
}


def leave_run(folder: Path, config: dict, accuracy: float | None = 0.4, weights: bytes = b"weights") -> None:
    """A run folder as a run leaves it; without an accuracy the run was stopped."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    (folder / "status.json").write_text(
        json.dumps({"state": "stopped" if accuracy is None else "done"}), "utf-8"
    )
    (folder / "metrics.csv").write_text("step,val/acc\n703,0.1\n", "utf-8")
    (folder / "student.safetensors").write_bytes(weights)
    if accuracy is not None:
        metrics = dict.fromkeys(("test/acc_last", "test/acc_best", "val/acc_best"), accuracy)
        (folder / "metrics.json").write_text(json.dumps(metrics | {"hardware/device": "H100"}), "utf-8")


@pytest.fixture
def outputs(tmp_path) -> Path:
    """Runs of every stage: two teachers, a student alone, a cell and one that was stopped."""
    none = {"method": {"_target_": "vitkd.methods.none.NoDistillation"}}
    for seed in (0, 1):
        leave_run(tmp_path / "o" / "teacher" / f"seed_{seed}", CELL | none | {"seed": seed})
    leave_run(tmp_path / "o" / "students-0" / "cell", CELL, 0.43)
    leave_run(tmp_path / "o" / "students-0" / "alone", CELL | {"alpha": 1.0}, 0.41)
    leave_run(tmp_path / "o" / "students-0" / "stopped", CELL | {"seed": 1}, None)
    (tmp_path / "o" / "evidence.log").write_text("commands\n", "utf-8")
    return tmp_path / "o"


def test_the_table_can_be_made_from_the_export_alone(outputs, tmp_path):
    text = evidence_table.export(outputs, place := tmp_path / "kept")

    assert {path.name for path in place.iterdir()} == {
        *("runs.tar.gz", "evidence.log", "table.md", "teacher-0.safetensors", "teacher-1.safetensors")
    }
    outputs.rename(tmp_path / "gone")
    (place / "table.md").unlink()
    assert write_table(place) == text == (place / "table.md").read_text("utf-8")
    assert "# Evidence: H100" in text
    assert "| encoder mse 0.00015 | 1 | 19 of 100 | 42.86 | 43.00 | +2.00 |" in text
    with tarfile.open(place / "runs.tar.gz") as archive:
        assert "students-0/stopped/metrics.csv" in archive.getnames()


def test_no_more_is_kept_than_can_be_carried(outputs, tmp_path, capsys):
    for seed in range(2, 7):
        leave_run(outputs / "teacher" / f"seed_{seed}", CELL | {"seed": seed})
    leave_run(outputs / "protocol-teacher" / "large", CELL, weights=bytes(evidence_table.MOST_BYTES + 1))

    evidence_table.export(outputs, place := tmp_path / "kept")

    names = {path.name for path in place.iterdir()}
    assert len(names) == 7, "study.yaml is the eighth"
    assert {"runs.tar.gz", "table.md", "evidence.log", "teacher-0.safetensors"} < names
    assert "protocol-teacher-0.safetensors" not in names
    assert "protocol-teacher-0.safetensors: left out, 16.0 MiB" in capsys.readouterr().err


def test_nothing_done_makes_no_table(tmp_path):
    leave_run(tmp_path / "o" / "students-0" / "stopped", CELL, None)
    (tmp_path / "o" / "evidence.log").write_text("commands\n", "utf-8")

    assert evidence_table.export(tmp_path / "o", tmp_path / "kept") == ""


# What is reported.


def result(stage: str, arm: str, seed: int, last: float, chosen: float | None = None) -> Result:
    return Result(stage, arm, seed, "100", last, last + 1, chosen, "cpu", "cifar100")


def row_of(text: str, name: str) -> list[str]:
    """The cells of an arm's row, after its name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return line.strip("| ").split(" | ")[1:]


def test_gains_are_paired_by_seed_with_students_interval():
    own, alone = {0: 42.0, 1: 44.0, 2: 43.0, 7: 99.0}, {0: 41.0, 1: 42.0, 2: 40.0}
    results = [result("students-0", "block kl 0.5", seed, value) for seed, value in own.items()]
    results += [result("students-0", ALONE, seed, value) for seed, value in alone.items()]

    cells = row_of(markdown(results), "block kl 0.5")

    # Differences 1, 2, 3 of standard deviation 1; t of 2 degrees of freedom is 4.302653.
    half = 4.302653 / math.sqrt(3)
    assert cells[4] == f"+2.00 [{2 - half:.2f}, {2 + half:.2f}]".replace("-", "−")


def test_the_table_sets_each_arm_beside_the_reports_figure_and_keeps_stages_apart():
    results = [
        *(result("teacher", "teacher", seed, 45.0) for seed in (0, 1)),
        *(result("students-0", ALONE, seed, 40.0 + seed) for seed in (0, 1)),
        *(result("students-0", "head kl 0.5", seed, 39.0) for seed in (0, 1)),
        *(result("students-0", "block kl 0.5", seed, 42.0 + 2 * seed) for seed in (0, 1)),
        *(result("protocol-students-0", ALONE, seed, 0.0, chosen=41.0) for seed in (0, 1)),
        *(result("protocol-students-0", "block kl 0.5", seed, 0.0, chosen=43.0 + seed) for seed in (0, 1)),
    ]

    text = markdown(results)

    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")]
    assert names[2:] == ["teacher", ALONE, "block kl 0.5", "head kl 0.5"]
    teacher, alone, cell = (row_of(text, name) for name in ("teacher", ALONE, "block kl 0.5"))
    assert teacher[:5] == ["2", "100", "46.18", "45.00 ± 0.00", "–"]
    assert alone[2:] == ["41.08", "40.50 ± 0.71", "–", "41.50 ± 0.71", "–", "41.00 ± 0.00", "–"]
    assert cell[2:4] == ["43.33", "43.00 ± 1.41"]
    assert cell[4].startswith("+2.50 [")
    assert cell[7] == "43.50 ± 0.71"
    assert cell[8].startswith("+2.50 [")

    both = markdown([*results, result("students-1", "block kl 0.5", 0, 50.0)])

    assert row_of(both, "block kl 0.5 (students-1)")[3:5] == ["50.00", "–"]


def test_other_images_are_not_set_beside_the_reports_figures():
    text = markdown([Result("teacher", "teacher", 0, "20", 90.0, 90.0, None, "cpu", "digits")])

    assert row_of(text, "teacher")[:4] == ["1", "20", "", "90.00"]


def test_an_arm_is_named_by_what_its_student_learns_from():
    assert arm_of(CELL) == "encoder mse 0.00015"
    assert arm_of(CELL) in REPORTED
    assert arm_of(CELL | {"alpha": 1.0}) == ALONE
    assert arm_of(CELL | {"method": {"_target_": "vitkd.methods.none.NoDistillation"}}) == ALONE


# From end to end.


def curves_of(archive: Path) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """(granularity, alpha, seed) → the rows of the curves, of the students."""
    found = {}
    with tarfile.open(archive) as opened:
        for name in opened.getnames():
            if name.startswith("students") and name.endswith("metrics.csv"):
                config = yaml.safe_load(opened.extractfile(name.replace("metrics.csv", "config.yaml")).read())
                rows = io.TextIOWrapper(opened.extractfile(name), "utf-8")
                key = (config["granularity"]["_target_"], config["alpha"], config["seed"])
                found[key] = [*csv.DictReader(rows)]
    return found


@pytest.mark.slow
def test_the_evidence_runs_to_its_end_and_fewer_epochs_are_its_first(tmp_path, capsys):
    common = ["--quick", "--seeds", "2", *TINY_GRID, "trainer.accelerator=cpu"]
    first = [*common, "--outputs", str(tmp_path / "1"), "--epochs", "2", "--teacher-epochs", "2"]

    assert evidence.main([*first, "--minutes", "30"]) == 0
    once = capsys.readouterr().out
    assert evidence.main([*first, "--minutes", "30"]) == 0

    kept = tmp_path / "1" / "export"
    assert (kept / "table.md").read_text("utf-8") in once
    assert "ms a step (measured)" in (kept / "evidence.log").read_text("utf-8")
    assert "vitkd.train" not in capsys.readouterr().out
    text = write_table(kept)
    assert row_of(text, ALONE)[:3] == row_of(text, "head kl 0.5")[:3] == ["2", "2 of 20", ""]

    teacher = kept / "teacher-0.safetensors"
    again = [*common, "--outputs", str(tmp_path / "2"), "--epochs", "3", "--teacher", str(teacher)]
    assert evidence.main(again) == 0

    short, long = (curves_of(tmp_path / name / "export" / "runs.tar.gz") for name in ("1", "2"))
    assert len(short) == 4
    for key, rows in short.items():
        assert 0 < len(rows) < len(long[key])
        steps = {row["step"]: row for row in long[key]}
        for row in rows:
            assert {name: row[name] for name in ("train/loss", "val/acc") if name in row} == {
                name: steps[row["step"]][name] for name in ("train/loss", "val/acc") if name in row
            }


def interrupted(arguments: list[str]) -> str:
    """What the evidence prints after it was stopped in its first epochs."""
    driver = [sys.executable, "-m", "benchmarks.evidence", *arguments]
    with subprocess.Popen(driver, env=environment(), stdout=subprocess.PIPE, text=True) as driven:
        next(line for line in driven.stdout if ": epoch " in line)
        driven.send_signal(signal.SIGTERM)
        rest = driven.stdout.read()
    assert driven.returncode == evidence.TERMINATED
    return rest


@pytest.mark.slow
def test_an_interrupted_stage_is_kept_and_resumes(tmp_path):
    arguments = ["--quick", "--teachers", "2", "--outputs", str(tmp_path), *TINY_GRID]
    arguments += ["--teacher-epochs", "4000", "trainer.accelerator=cpu"]

    for _ in range(2):
        assert "4000/4000" not in interrupted(arguments)

    folders = [RunFolder(path.parent) for path in tmp_path.glob("teacher/**/status.json")]
    assert [folder.state for folder in folders] == ["stopped"] * 2
    assert all("resuming" in folder.log.read_text("utf-8") for folder in folders)
    with tarfile.open(tmp_path / "export" / "runs.tar.gz") as archive:
        assert len([name for name in archive.getnames() if name.endswith("metrics.csv")]) == 2
