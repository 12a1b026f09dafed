"""A run loaded from its folder again: which weights, and where its teacher is found."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from vitkd.errors import ConfigError
from vitkd.models import ViTConfig, digest, load_model, save_model
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.load import load_run

TINY = [
    "trainer.limit_train_batches=2",
    "teacher.trainer.limit_train_batches=2",
    "+trainer.limit_val_batches=1",
    "pictures_every_n_epochs=0",
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command) -> Path:
    """Three runs, and the one teacher that was trained for them."""
    path = tmp_path_factory.mktemp("finished_runs") / "outputs"

    def train(name, *arguments):
        teacher = ["teacher.max_epochs=1", f"paths.outputs={path}"]
        ended = command("train", *TINY, *teacher, f"name={name}", *arguments)
        assert ended.code == 0, ended.err

    # Validated after the second epoch alone, which so is the best, and not the last.
    train("first", "trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2", "optimizer.lr=0.01")
    train("alone", "trainer.max_epochs=1", "method=none")
    train("untrained", "trainer.max_epochs=1", "teacher.trained=false", "teacher.seed=4")
    return path


@pytest.fixture
def run(outputs) -> Path:
    return outputs / "digits" / "first"


@pytest.fixture
def copy(outputs, tmp_path) -> Path:
    """All outputs elsewhere, to be changed."""
    return Path(shutil.copytree(outputs, tmp_path / "moved" / "results"))


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the log has warned of; a command before may have kept it to itself."""
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def metrics_of(run: Path):
    return json.loads((run / "metrics.json").read_text())


def are_equal(model, weights) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


class TestStudent:
    def test_of_the_best_epoch_is_the_one_that_the_run_kept(self, run):
        found = load_run(run, "best")

        assert are_equal(found.student, load_file(run / "student.safetensors"))
        assert found.epoch == "best"
        assert not found.student.training

    def test_of_the_last_epoch_is_another(self, run):
        best, last = load_run(run, "best"), load_run(run, "last")

        assert metrics_of(run)["best_epoch"] == 2
        assert load_from_checkpoint(run / "checkpoints" / "last.ckpt")[1] == 3
        assert digest(last.student) == digest(load_from_checkpoint(run / "checkpoints" / "last.ckpt")[0])
        assert digest(last.student) != digest(best.student)

    def test_of_a_unfinished_run_is_that_of_its_checkpoint(self, copy):
        run = copy / "digits" / "first"
        finished = load_run(run, "best")
        for name in ("student.safetensors", "metrics.json", "test_predictions.npz"):
            (run / name).unlink()
        (run / "status.json").write_text('{"state": "running"}')

        found = load_run(run, "best")

        assert digest(found.student) == digest(finished.student)
        assert digest(found.teacher) == digest(finished.teacher)

    def test_without_a_checkpoint_says_what_state_the_run_is_in(self, copy):
        run = copy / "digits" / "first"
        (run / "student.safetensors").unlink()
        shutil.rmtree(run / "checkpoints")
        (run / "status.json").write_text('{"state": "failed"}')

        for epoch in ("best", "last"):
            with pytest.raises(ConfigError, match=f"has no checkpoint of the {epoch} epoch .it is failed."):
                load_run(run, epoch)

    def test_of_no_run(self, tmp_path):
        with pytest.raises(ConfigError, match="not a run folder"):
            load_run(tmp_path, "best")


class TestPairs:
    def test_are_those_that_the_run_wrote(self, run):
        found = load_run(run, "best")

        assert found.pairs == json.loads((run / "pairs.json").read_text())
        assert len(found.pairs[0]["student_heads"]) == found.student.config.num_heads

    def test_there_are_none_without_distilled_maps(self, outputs):
        assert load_run(outputs / "digits" / "alone", "best").pairs == []

    def test_there_are_none_where_all_the_weight_is_on_labels(self, copy):
        run = copy / "digits" / "first"
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"alpha": 1.0}))

        assert not load_run(run, "best").pairs
        assert load_run(run, "best").is_alone

    def test_there_are_some_where_the_weight_leaves_the_labels_later(self, copy):
        run = copy / "digits" / "first"
        config = yaml.safe_load((run / "config.yaml").read_text())
        weighting = {"_target_": "vitkd.methods.weighting.Linear", "end": 0.5}
        changed = config | {"alpha": 1.0, "weighting": weighting}
        (run / "config.yaml").write_text(yaml.safe_dump(changed))

        assert load_run(run, "best").pairs
        assert not load_run(run, "best").is_alone

    def test_who_learned_alone(self, outputs):
        alone = {
            name: load_run(outputs / "digits" / name, "best").is_alone
            for name in ("first", "alone", "untrained")
        }

        assert alone == {"first": False, "alone": True, "untrained": False}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("student_block", value) for value in (-1, 9, True, "0", None, [0])),
            *(("teacher_block", value) for value in (-1, 9, 0.0)),
            *(("student_heads", value) for value in ([], [0, 1], [9, 0, 1, 2], [-1, 0, 1, 2], 7, "0123")),
            *(("teacher_heads", value) for value in ([], [[]] * 4, [[9]] * 4, [0] * 4, [["0"]] * 4)),
            *(("weights", value) for value in (7, [[1.0]], [[1.0, 1.0]] * 4, [["1"]] * 4, [[math.nan]] * 4)),
        ],
    )
    def test_of_maps_that_there_are_not_are_one_line(self, key, value, copy):
        run = copy / "digits" / "first"
        pairs = json.loads((run / "pairs.json").read_text())
        (run / "pairs.json").write_text(json.dumps([pairs[0] | {key: value}, *pairs[1:]]))

        with pytest.raises(ConfigError, match=r"pairs\.json: cannot be read") as error:
            load_run(run, "best")
        assert "\n" not in str(error.value)

    def test_that_another_teacher_has_not_are_left_out(self, copy, tmp_path, warnings):
        run = copy / "digits" / "first"
        save_model(
            ViTConfig(8, 1, 10, patch_size=2, depth=1, num_heads=1).build(), tmp_path / "other.safetensors"
        )

        found = load_run(run, "best", teacher=str(tmp_path / "other.safetensors"))

        assert not found.pairs
        (warning,) = warnings()
        assert "pairs.json" in warning

    @pytest.mark.parametrize("content", ["[{", "7", '[{"student_block": 1}]', "[3]"])
    def test_that_cannot_be_read_are_one_line(self, content, copy):
        (copy / "digits" / "first" / "pairs.json").write_text(content)

        with pytest.raises(ConfigError, match=r"pairs\.json: cannot be read") as error:
            load_run(copy / "digits" / "first", "best")
        assert "\n" not in str(error.value)


class TestTeacher:
    def test_is_the_one_that_the_run_learned_from(self, run, warnings):
        found = load_run(run, "best")

        assert digest(found.teacher) == metrics_of(run)["teacher/weights"]
        assert not found.teacher.training
        assert not warnings()

    def test_is_found_from_any_folder(self, run, tmp_path, monkeypatch):
        monkeypatch.chdir(run.parent)
        relative = load_run(Path("first"), "best")
        monkeypatch.chdir(tmp_path)

        elsewhere = load_run(run, "best")

        assert digest(relative.teacher) == digest(elsewhere.teacher) == metrics_of(run)["teacher/weights"]

    def test_is_found_where_the_outputs_have_moved(self, copy, outputs, tmp_path, monkeypatch):
        run = copy / "digits" / "first"
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert str(config["paths"]["outputs"]) not in str(run)
        # Neither is it looked for where it was.
        monkeypatch.chdir(tmp_path)
        expected = digest(load_run(outputs / "digits" / "first", "best").teacher)
        hidden = outputs.rename(outputs.with_name("hidden"))
        try:
            assert digest(load_run(run, "best").teacher) == expected
        finally:
            hidden.rename(outputs)

    def test_is_none_without_a_method(self, outputs):
        assert load_run(outputs / "digits" / "alone", "best").teacher is None

    def test_of_a_student_alone_can_be_given(self, outputs, run):
        found = load_run(outputs / "digits" / "alone", "best", teacher=str(run))

        assert are_equal(found.teacher, load_file(run / "student.safetensors"))

    def test_that_is_given_goes_first(self, outputs, run):
        other = outputs / "digits" / "alone" / "student.safetensors"

        assert are_equal(load_run(run, "best", teacher=str(other)).teacher, load_file(other))

    def test_that_is_given_and_not_there(self, run):
        with pytest.raises(ConfigError, match=r"nowhere\.ckpt: there is no such file"):
            load_run(run, "best", teacher="nowhere.ckpt")

    @pytest.mark.parametrize(("name", "value"), [("num_classes", 7), ("image_size", 16), ("channels", 3)])
    def test_that_is_given_and_of_other_data(self, name, value, run, tmp_path):
        shape = {"image_size": 8, "channels": 1, "num_classes": 10, "patch_size": 2, "depth": 1}
        save_model(ViTConfig(**shape | {name: value}).build(), tmp_path / "other.safetensors")

        with pytest.raises(ConfigError, match=f"{name}={value}"):
            load_run(run, "best", teacher=str(tmp_path / "other.safetensors"))

    def test_that_was_not_trained_is_built_again(self, outputs):
        run = outputs / "digits" / "untrained"

        assert digest(load_run(run, "best").teacher) == metrics_of(run)["teacher/weights"]

    def test_that_was_not_trained_takes_no_random_numbers_from_others(self, outputs):
        torch.manual_seed(3)
        expected = torch.rand(3)
        torch.manual_seed(3)

        load_run(outputs / "digits" / "untrained", "best")

        assert torch.equal(torch.rand(3), expected)

    def test_that_is_gone(self, copy, tmp_path):
        shutil.rmtree(copy / "teachers")
        run = copy / "digits" / "first"

        with pytest.raises(ConfigError) as error:
            load_run(run, "best")

        line = str(error.value)
        assert line.startswith(f"run={run}: its teacher (teachers/digits/")
        assert line.endswith("is missing; set teacher.checkpoint=PATH")
        assert "\n" not in line
        assert load_run(run, "best", teacher=str(copy / "digits" / "alone")).teacher is not None

    def test_with_other_weights_than_were_learned_from_earns_a_warning(self, copy, warnings):
        (teacher,) = (copy / "teachers" / "digits").glob("*/student.safetensors")
        model = load_model(teacher)
        with torch.no_grad():
            model.head.bias += 1
        save_model(model, teacher)
        run = copy / "digits" / "first"

        found = load_run(run, "best")

        assert digest(found.teacher) == digest(model)
        assert warnings() == [
            f"warning: {run} was trained with a teacher of other weights than the one found"
        ]


class TestData:
    def test_lies_where_it_lay_or_where_one_says(self, run, tmp_path):
        config = yaml.safe_load((run / "config.yaml").read_text())

        assert load_run(run, "best").config.paths.data == config["paths"]["data"]
        assert load_run(run, "best", data=str(tmp_path)).config.paths.data == str(tmp_path)
