"""The benchmarks of stacks run and count right."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops, grid, stack, subject
from benchmarks.command import environment, train_command
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


def test_the_program_is_called_with_the_checkouts_own_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")

    assert train_command("seed=1")[1:] == ["-m", "vitkd.train", "seed=1"]
    assert environment()["PYTHONPATH"].endswith(":/elsewhere")
    assert Path(environment()["PYTHONPATH"].split(":")[0], "vitkd").is_dir()
