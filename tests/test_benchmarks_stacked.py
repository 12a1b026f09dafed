"""The benchmarks of stacks run and count right; the evidence stops in time, resumes and is reported truly."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import evidence, flops, grid, stack, subject
from benchmarks.command import environment, train_command
from benchmarks.evidence_table import (
    ALONE,
    REPORTED,
    Estimate,
    Result,
    Table,
    arm_of,
    gain,
    interval,
    write_rounded,
)
from benchmarks.harness import Row, Settings
from vitkd.models import Taps, ViTConfig

QUICK = Settings(torch.device("cpu"), quick=True, rounds=2)
SHAPE = ViTConfig(
    image_size=16,
    channels=3,
    num_classes=7,
    patch_size=4,
    embed_dim=12,
    depth=3,
    num_heads=2,
    head_dim=5,
    mlp_dim=24,
)


def assert_sane(rows: list[Row]) -> None:
    for line in rows:
        for spread in filter(None, (line.figure, line.ratio)):
            assert 0 < spread.low <= spread.median <= spread.high < math.inf


def test_stacks_are_compared_with_as_many_separate_students(tmp_path, capsys):
    rows = stack.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "figures.json")])

    names = [line.name for line in rows]
    assert {"S=1 separate", "S=3 stacked", "S=3 stacked, 3 seeds", "S=3 stacked, no dropout"} < set(names)
    assert all((line.ratio is None) == ("separate" in line.name) for line in rows)
    assert_sane(rows)
    assert "S=3 stacked" in capsys.readouterr().out


def test_a_further_way_to_run_steps_is_compared_with_itself_and_with_eager(monkeypatch):
    def plainly(step):
        return step

    monkeypatch.setattr(stack, "ways", lambda settings: {stack.EAGER: plainly, stack.GRAPHED: plainly})
    config = subject.configure(QUICK)

    rows = stack.compare(config, subject.build_teacher(config, QUICK.device), 1, "", QUICK)

    assert [line.name for line in rows] == [
        *("S=1 separate", "S=1 separate, graphed"),
        *("S=1 stacked", "S=1 stacked, graphed", "S=1 stacked, graphed, to eager"),
    ]


def test_the_bars_are_for_arms_that_there_are():
    full = Settings(torch.device("cpu"), quick=False, rounds=1)

    for device, count, *ways in stack.BARS:
        assert count in {"cpu": stack.SIZES_ON_CPU, "cuda": stack.SIZES_ON_CUDA}[device]
        assert set(ways) <= {stack.EAGER, stack.GRAPHED}
    assert 8 in stack.sizes(full)


def test_the_students_of_a_stack_have_mixed_cells_and_equal_ones_are_neighbours():
    config = subject.configure(QUICK)

    modules = stack.students(config, subject.build_teacher(config, QUICK.device), 11)

    cells = [(type(m.objective.loss).__name__, m.objective.curves) for m in modules]
    assert len(set(cells)) == 9
    assert sum(a != b for a, b in pairwise(cells)) == 8


def counted(compute) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_norm": False},
        {"patch_norm": True},
        {"tokenizer": "spt", "attention": "lsa"},
        {"distillation_token": True},
    ],
)
def test_the_operations_are_those_that_pytorch_counts(changes):
    shape = replace(SHAPE, **changes)
    model, images = shape.build(), torch.randn(2, 3, 16, 16)
    # Fused attention is not counted on every device.
    every_block = Taps(scores=tuple(range(shape.depth)))

    with torch.no_grad():
        forward = counted(lambda: model(images, every_block))
        scores = counted(lambda: model(images, every_block._replace(logits=False)))
    training = counted(lambda: model(images, every_block).logits.sum().backward())

    assert forward == 2 * flops.forward_flops(shape)
    assert scores == 2 * flops.scores_flops(shape, shape.depth - 1)
    assert training == 2 * flops.training_flops(shape)


def test_the_peak_is_the_makers_or_measured():
    assert flops.known_peak("NVIDIA H200", "float32") == 67e12
    assert flops.known_peak("NVIDIA H100 PCIe", "tf32") == 378e12
    assert flops.known_peak("NVIDIA H100 NVL", "bf16") == 835.5e12
    assert flops.known_peak("NVIDIA H100 80GB HBM3", "bf16") == 989.5e12
    assert flops.known_peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert flops.known_peak("NVIDIA L40S", "bf16") == 362e12
    assert flops.known_peak("NVIDIA L40", "bf16") == 181e12
    assert flops.known_peak("NVIDIA A10G", "bf16") is None
    assert flops.known_peak("NVIDIA RTX A1000", "bf16") is None
    assert flops.known_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16") is None
    assert flops.known_peak("NVIDIA Nothing", "float32") is None
    assert flops.known_peak("Tesla T4", "bf16") is None
    assert flops.measured_peak(torch.device("cpu"), repeats=1, size=64) > 0


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        ({}, "float32"),
        ({"matmul_precision": "high"}, "tf32"),
        ({"trainer.precision": "bf16-mixed", "matmul_precision": "high"}, "bf16"),
    ],
)
def test_the_precision_is_what_the_overrides_ask_for(overrides, precision):
    assert grid.precision_of(overrides) == precision


def test_the_grids_figures_add_up_over_stacks():
    plan, _ = grid.read_arguments(["alpha=0.5"])
    plan = replace(plan, settings=QUICK)
    # Two stacks of two, one after the other, of 100 images a student at 50 and 25 a second.
    runs = [grid.Run(100, 50.0, 3.0, 2, seed) for seed in (0, 1)]
    runs += [grid.Run(100, 25.0, seconds, 2, 0) for seconds in (4.5, 5.5)]

    rows = {line.name: line.figure.median for line in grid.rows(plan, [20.0], [runs], SHAPE, SHAPE)}

    assert rows["training"] == 2 + 4
    assert rows["fit: training, validation, checkpoints"] == 3 + 5
    assert rows["images × students a second"] == 400 / 6
    teacher = 300 * flops.scores_flops(SHAPE, 2)
    assert rows["matrix products"] == pytest.approx((400 * flops.training_flops(SHAPE) + teacher) / 6 / 1e9)
    epochs = 6 * 100 * grid.TRAINING_IMAGES / 100 + 2 * 100 + 12
    assert rows["projected: 100 epochs, whole command"] == pytest.approx(epochs / 60)


def test_the_grid_on_cuda_is_the_whole_one():
    axes = grid.axes(Settings(torch.device("cuda"), quick=False, rounds=1))

    assert math.prod(len(values.split(",")) for values in axes.values()) == 108


def test_overrides_and_options_of_the_grid_are_distinguished():
    plan, rest = grid.read_arguments(
        ["--quick", "--data", "/d", "alpha=0.5", "+trainer.x=1", "--rounds", "2"]
    )

    assert plan.overrides == {"alpha": "0.5", "+trainer.x": "1"}
    assert plan.data == Path("/d")
    assert rest == ["--quick", "--rounds", "2"]


@pytest.mark.slow
def test_the_grid_runs_by_the_real_command_without_the_reports_images(tmp_path, capsys):
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--device", "cpu", "--rounds", "1", "--json", str(path), "--data", str(tmp_path)]

    rows = grid.main(arguments)

    assert "digits, for CIFAR-100 is not there" in capsys.readouterr().out
    assert_sane(rows)
    figures = {line["name"]: line["figure"]["median"] for line in json.loads(path.read_text("utf-8"))["rows"]}
    assert figures["students"] == 2
    assert figures["training"] < figures["whole command"]


# The evidence: what is run.


def options(*arguments: str):
    return evidence.read_arguments(["--outputs", "/o", "--data", "/d", *arguments])


def test_the_stages_begin_with_the_teacher_that_the_others_learn_from(monkeypatch):
    monkeypatch.setattr(evidence, "has_protocol", lambda: False)
    teachers = {"teacher": Path("/o/teacher/run")}

    assert [stage.name for stage in evidence.stages(options(), {})] == ["teacher"]
    teacher, cells, grid = evidence.stages(options(), teachers)

    assert [teacher.name, cells.name, grid.name] == ["teacher", "cells", "grid"]
    assert {"experiment=report/teacher", "seed=0,1,2,3,4", "trainer.max_epochs=100"} < set(teacher.overrides)
    assert {evidence.CELLS, "teacher.checkpoint=/o/teacher/run", "seed=0,1,2,3,4"} < set(cells.overrides)
    assert {*evidence.GRID, "seed=0,1,2", "paths.outputs=/o/grid"} < set(grid.overrides)
    assert all(stage.overrides[:2] == evidence.STACKED for stage in (teacher, cells, grid))


def test_the_reports_protocol_has_stages_and_a_teacher_of_its_own_before_the_grid(monkeypatch):
    monkeypatch.setattr(evidence, "has_protocol", lambda: True)
    teachers = {"teacher": Path("/o/a"), "protocol-teacher": Path("/o/b")}

    names = [stage.name for stage in evidence.stages(options(), teachers)]
    cells = evidence.stages(options(), teachers)[3]

    assert names == ["teacher", "cells", "protocol-teacher", "protocol-cells", "grid"]
    assert {"dataset=cifar100_report_protocol", "teacher.checkpoint=/o/b"} < set(cells.overrides)


def test_further_overrides_go_to_every_stage():
    given = options("trainer.precision=bf16-mixed", "--epochs", "3", "matmul_precision=high")

    for stage in evidence.stages(given, {"teacher": Path("/o/a")}):
        assert {"trainer.precision=bf16-mixed", "matmul_precision=high"} < set(stage.overrides)
        assert "trainer.max_epochs=3" in stage.overrides


def test_a_stage_is_done_only_for_the_very_command(tmp_path):
    (tmp_path / "cells").mkdir()
    short, long = (evidence.Stage("cells", (f"trainer.max_epochs={n}",)) for n in (1, 100))

    short.mark_done(tmp_path)

    assert short.is_done(tmp_path)
    assert not long.is_done(tmp_path)


def test_a_stage_that_fails_is_skipped_and_reported_by_the_exit_code(tmp_path, monkeypatch):
    ran: list[str] = []

    def run_stage(stage, deadline):
        ran.append(stage.name)
        (tmp_path / stage.name).mkdir()
        return int(stage.name == "cells")

    monkeypatch.setattr(evidence, "run_stage", run_stage)
    monkeypatch.setattr(evidence, "has_protocol", lambda: False)
    monkeypatch.setattr(evidence, "first_teachers", lambda outputs: {"teacher": outputs})
    given = evidence.read_arguments(["--outputs", str(tmp_path)])

    assert evidence.run_stages(given, evidence.Deadline(None)) == 1
    assert ran == ["teacher", "cells", "grid"]
    assert evidence.next_stage(given, set()).name == "cells"


def test_no_stage_is_begun_that_could_only_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "run_stage", pytest.fail)

    given = evidence.read_arguments(["--outputs", str(tmp_path)])

    assert evidence.run_stages(given, evidence.Deadline(0.0)) == evidence.UNFINISHED


def test_time_is_kept_back_for_saving():
    assert evidence.Deadline(9).reserve == 60
    assert 0 < evidence.Deadline(9).left <= 8 * 60
    assert evidence.Deadline(1).reserve == 15
    assert evidence.Deadline(None).left == math.inf


@pytest.mark.parametrize("ignores", [False, True], ids=["saves", "hangs"])
def test_a_stage_is_stopped_when_its_time_is_up(tmp_path, monkeypatch, ignores):
    script = "import signal, sys, time\n"
    script += (
        f"signal.signal(signal.SIGTERM, {'signal.SIG_IGN' if ignores else 'lambda *_: sys.exit(143)'})\n"
    )
    script += "time.sleep(60)"
    monkeypatch.setattr(evidence, "train_command", lambda *_: [sys.executable, "-c", script])
    start = time.monotonic()

    assert evidence.run_stage(evidence.Stage("slow", ()), evidence.Deadline(2 / 60)) is None
    assert time.monotonic() - start < 30


# The evidence: what is reported.


def result(stage: str, arm: str, seed: int, last: float, chosen: float | None = None) -> Result:
    return Result(stage, arm, seed, last, last + 1, chosen, "cpu", "cifar100")


def test_gains_are_paired_by_seed_with_students_interval():
    found = gain({0: 42.0, 1: 44.0, 2: 43.0, 7: 99.0}, {0: 41.0, 1: 42.0, 2: 40.0})

    assert found is not None
    assert found.mean == 2
    assert found.std == 1
    assert (found.high - found.low) / 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval(found) == "+2.00 [−0.48, +4.48]"
    assert gain({0: 1.0}, {1: 1.0}) is None
    assert interval(Estimate.of([0.5])) == "+0.50"
    assert interval(Estimate(-0.001, None, None, None)) == "+0.00"


def test_the_table_sets_each_arm_beside_the_reports_figure_and_keeps_protocols_apart():
    results = [
        *(result("teacher", "teacher", seed, 45.0) for seed in (0, 1)),
        *(result("cells", ALONE, seed, 40.0 + seed) for seed in (0, 1)),
        *(result("cells", "block kl 0.5", seed, 42.0 + 2 * seed) for seed in (0, 1)),
        *(result("grid", "block kl 0.5", seed, 41.0 + 3 * seed) for seed in (0, 1)),
        *(result("protocol-cells", ALONE, seed, 0.0, chosen=41.0) for seed in (0, 1)),
        *(result("protocol-cells", "block kl 0.5", seed, 0.0, chosen=43.0) for seed in (0, 1)),
    ]

    table = Table(results)

    assert [(line.stage, line.arm) for line in table.lines] == [
        *(("teacher", "teacher"), ("cells", ALONE), ("cells", "block kl 0.5"), ("grid", "block kl 0.5"))
    ]
    teacher, alone, cell, in_grid = table.lines
    assert (alone.last.mean, alone.best.mean, alone.gain_last) == (40.5, 41.5, None)
    assert (cell.gain_last.mean, cell.protocol.mean, cell.gain_protocol.mean) == (2.5, 43, 2)
    assert (in_grid.gain_last.mean, in_grid.protocol, in_grid.reported) == (2, None, 43.33)
    assert teacher.gain_last is None
    assert teacher.reported == REPORTED["teacher"]
    text = table.markdown("Evidence")
    assert "| block kl 0.5 | 2 | 43.33 | 43.00 ± 1.41 | +2.50" in text
    assert "| block kl 0.5 (grid) | 2 | 43.33 |" in text


def test_other_images_are_not_set_beside_the_reports_figures():
    (line,) = Table([Result("teacher", "teacher", 0, 90.0, 90.0, None, "cpu", "digits")]).lines

    assert line.reported is None


def test_an_arm_is_named_by_what_its_student_learns_from():
    method = {"_target_": "vitkd.methods.attention.AttentionDistillation"}
    cell = {
        "method": method,
        "granularity": {"_target_": "vitkd.methods.maps.granularity.Encoder"},
        "loss": {"_target_": "vitkd.methods.maps.losses.MSE"},
        "alpha": 0.00015,
    }

    assert arm_of(cell) == "encoder mse 0.00015"
    assert arm_of(cell) in REPORTED
    assert arm_of(cell | {"alpha": 1.0}) == ALONE
    assert arm_of(cell | {"method": {"_target_": "vitkd.methods.none.NoDistillation"}}) == ALONE


def test_curves_are_kept_in_six_digits(tmp_path):
    (tmp_path / "long.csv").write_text(
        "step,train/loss,val/acc\n1234567,0.123456789,\n2234567,,0.5\n", "utf-8"
    )

    write_rounded(tmp_path / "long.csv", tmp_path / "short.csv")

    assert (tmp_path / "short.csv").read_text("utf-8") == (
        "step,train/loss,val/acc\n1234567,0.123457,\n2234567,,0.5\n"
    )


def test_the_program_is_called_with_the_checkouts_own_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")

    assert train_command("seed=1")[1:] == ["-m", "vitkd.train", "seed=1"]
    assert environment()["PYTHONPATH"].endswith(":/elsewhere")
    assert Path(environment()["PYTHONPATH"].split(":")[0], "vitkd").is_dir()


@pytest.mark.slow
def test_the_evidence_stops_in_time_and_resumes(tmp_path):
    arguments = ["--quick", "--outputs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    # The first call's end lies within the teachers' training, far from its beginning and its end.
    arguments += [
        "--epochs",
        "4000",
        "--grid",
        "granularity=head loss=kl alpha=0.5",
        "trainer.accelerator=cpu",
    ]

    first = evidence.main([*arguments, "--minutes", "0.7"])

    assert first == evidence.UNFINISHED
    assert {json.loads(p.read_text("utf-8"))["state"] for p in tmp_path.glob("runs/**/status.json")} == {
        "stopped"
    }
    driver = [sys.executable, "-m", "benchmarks.evidence", *arguments]
    with subprocess.Popen(driver, env=environment(), stdout=subprocess.PIPE, text=True) as driven:
        for line in driven.stdout:
            if ": epoch " in line:
                driven.send_signal(signal.SIGTERM)
                break
        rest = driven.stdout.read()
    assert driven.returncode == evidence.TERMINATED
    assert "4000/4000" not in rest
    logs = [path.read_text("utf-8") for path in tmp_path.glob("runs/teacher/**/run.log")]
    assert logs
    assert all("resuming" in log for log in logs)


@pytest.mark.slow
def test_the_evidence_runs_to_its_end_in_miniature(tmp_path, capsys):
    arguments = ["--quick", "--outputs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    arguments += ["--grid", "granularity=head loss=kl alpha=0.5", "trainer.accelerator=cpu"]

    assert evidence.main(arguments) == 0
    once = capsys.readouterr().out
    assert evidence.main(arguments) == 0

    (home,) = (tmp_path / "results").iterdir()
    table = json.loads((home / "table.json").read_text("utf-8"))
    assert {(line["stage"], line["arm"]) for line in table["arms"]} == {
        ("teacher", "teacher"),
        ("grid", "head kl 0.5"),
        *(("cells", arm) for arm in REPORTED if arm != "teacher"),
    }
    assert all(line["seeds"] == [0, 1] for line in table["arms"])
    assert {path.name for path in home.glob("runs/**/*.*") if path.is_file()} == {
        "metrics.json",
        "metrics.csv",
    }
    assert (home / "table.md").read_text("utf-8") in once
    assert "vitkd.train" not in capsys.readouterr().out
