"""`debug=…` finds mistakes, and leaves nothing that counts as a result."""

import json
from pathlib import Path

import hydra
import pytest
import torch

from vitkd.config.run import CONF_DIR, parse
from vitkd.data import ImageDataModule
from vitkd.report.notes import remarks_on
from vitkd.report.runs import find_runs
from vitkd.train.debugging import has_overfit

SMALL = ["trainer=cpu", "student.depth=1", "teacher.depth=1", "name=run"]


def composed(*overrides: str):
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return parse(hydra.compose("train", [*overrides]))


@pytest.fixture(scope="module")
def outputs(command, tmp_path_factory) -> Path:
    """Where `debug=fast` has run twice, the second time with resume=auto."""
    outputs = tmp_path_factory.mktemp("outputs")
    for resume in ("null", "auto"):
        ended = command("train", "debug=fast", *SMALL, f"paths.outputs={outputs}", f"resume={resume}")
        assert ended.code == 0, ended
    return outputs


def test_everything_lies_in_a_folder_of_its_own(outputs):
    assert [path.name for path in outputs.iterdir() if path.is_dir()] == ["debug"]
    assert (outputs / "debug" / "digits" / "run" / "metrics.json").exists()


def test_nothing_is_resumed_and_no_checkpoint_kept(outputs):
    runs = sorted((outputs / "debug" / "digits").iterdir())

    assert [run.name for run in runs] == ["run", "run-2"]
    assert not [*(outputs / "debug").rglob("*.ckpt")]


def test_the_report_leaves_it_out_and_says_so(outputs):
    runs = find_runs([outputs])

    assert {run.state for run in runs} == {"debug"}
    assert len(runs) == 3  # with the teacher
    lines = remarks_on(runs, [outputs])
    assert len(lines) == 3
    assert all("debug=fast is no result" in line and "left out" in line for line in lines)


def test_its_teacher_is_no_other_runs_teacher(outputs, command):
    """The store of teachers is searched for one, and the half-trained one is not in it."""
    brief = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "teacher.max_epochs=1"]
    brief += ["teacher.trainer.limit_train_batches=3", "teacher.trainer.limit_val_batches=3"]

    ended = command("train", *SMALL, *brief, f"paths.outputs={outputs}")

    assert "training it first" in ended.out, ended
    assert len([*(outputs / "teachers" / "digits").glob("*[0-9a-f]")]) == 1


@pytest.mark.parametrize(
    "models", [["student=report", "teacher=report"], ["student=mnist", "teacher=resnet"]]
)
def test_overfitting_leaves_nothing_to_chance(models):
    mixed = ["dataset.mix.mixup_alpha=1", "dataset.passes=2", "dataset.repeats=2"]
    config = composed("debug=overfit", "dataset=cifar10", "method=logit", *mixed, *models)

    assert not config.dataset.augment.is_random
    assert not config.dataset.mix.is_on
    assert config.dataset.passes == config.dataset.repeats == 1
    assert not config.student.drops
    assert not config.teacher.model.drops
    assert config.label_smoothing == 0


@pytest.mark.parametrize("chosen", ["method.", "method=together method.attention."])
def test_overfitting_leaves_no_branch_out(chosen):
    *method, prefix = chosen.split(" ")
    rate = ["student.drop_path_rate=0.1", "teacher.drop_path_rate=0.1", "student.depth=4"]

    config = composed("debug=overfit", *method, f"{prefix}share_drop_path=true", *rate)

    assert not config.student.drops
    assert not config.teacher.model.drops
    assert not getattr(config.method, "methods", {"attention": config.method})["attention"].share_drop_path


def test_overfitting_shows_one_batch_over_and_over():
    dataset = composed("debug=overfit").dataset
    data = ImageDataModule(dataset, "nowhere", seed=0, one_batch=True)
    every = ImageDataModule(dataset, "nowhere", seed=0)

    batches = [batch.index for batch in data.loader("train")]

    assert len(batches) == 20
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    assert len(set(batches[0].tolist())) == 16
    labels = next(iter(data.loader("train"))).label
    assert len(labels.unique()) > 4, "they are of many classes"
    assert {*batches[0].tolist()} <= {*every.fixed_views("train").sampler.index.tolist()}
    assert data.counts["val"] == every.counts["val"]


@pytest.mark.parametrize(
    ("last", "learns_labels", "verdict"),
    [
        ({"class": 0.04, "transfer": 0.9}, True, True),
        ({"class": 0.06, "transfer": 0.0}, True, False),
        ({"class": 2.0, "transfer": 0.09}, False, True),
        ({"class": 0.0, "transfer": 0.11}, False, False),
        ({"class": float("nan"), "transfer": 0.0}, True, False),
        ({"class": 0.01}, True, True),
    ],
)
def test_the_loss_that_is_learned_by_is_judged(last, learns_labels, verdict):
    assert has_overfit({"class": 2.3, "transfer": 1.0}, last, learns_labels) == verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "verdict"),
    [("alpha=0.5", "succeeded"), ("alpha=0", "succeeded"), ("optimizer.lr=1e-7", "did not succeed")],
)
def test_overfitting_says_whether_it_succeeded(setting, verdict, command, tmp_path):
    arguments = ["debug=overfit", "name=run", "trainer=cpu", f"paths.outputs={tmp_path}", setting]
    longer = ["trainer.max_epochs=40"] if setting == "alpha=0" else []

    ended = command("train", *arguments, *longer)

    assert ended.code == 0, ended
    (line,) = [line for line in ended.out.splitlines() if "overfit: " in line]
    assert verdict in line
    assert "16 images" in line


@pytest.mark.slow
def test_a_profile_is_a_table_and_a_trace(command, tmp_path):
    ended = command("train", "debug=profile", *SMALL, f"paths.outputs={tmp_path}")

    assert ended.code == 0, ended
    assert "aten::" in ended.out
    trace = json.loads((tmp_path / "debug" / "digits" / "run" / "trace.json").read_text())
    assert any("aten::addmm" in event.get("name", "") for event in trace["traceEvents"])
    steps = {event["name"] for event in trace["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert len(steps) == 10


@pytest.mark.slow
def test_a_debug_run_is_no_part_of_a_stack(command, tmp_path):
    sweep = ["-m", "hydra/launcher=stacked", "seed=0,1", "debug=fast", "method=none"]

    ended = command("train", *sweep, *SMALL[:2], f"paths.outputs={tmp_path}")

    assert ended.code == 0, ended
    assert ended.out.count("trains by itself: debug=fast") == 2
    assert len([*(tmp_path / "debug" / "digits").iterdir()]) == 2


def test_a_misspelt_option_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command("train", "debug=overfitt")

    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "did you mean overfit?" in line
