"""The main job on digits: what a run leaves, what repeats bit for bit, and where its teacher comes from."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs.foreign import pipe, replace
from vitkd.config.run import parse, teacher_run
from vitkd.models import digest, load_model
from vitkd.runs.checkpoints import load_from_checkpoint
from vitkd.runs.folder import RunFolder
from vitkd.runs.seeding import WEIGHTS, seed_generators
from vitkd.train.callbacks import TeacherCaching

TINY = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "teacher.trainer.limit_train_batches=2",
    "+trainer.limit_val_batches=1",
    "log_every_n_steps=1",
    "pictures_every_n_epochs=0",
]
FIGURES = [
    *(
        "test/acc_last",
        "test/acc_best",
        "val/acc_best",
        "val/acc_last",
        "test/loss",
        "test/teacher_agreement",
    ),
    *("teacher/test_acc", "student/parameters", "teacher/parameters", "wall_seconds", "images_per_second"),
    *("epochs", "seed"),
]
PNG = b"\x89PNG\r\n\x1a\n"


class Outputs:
    """A folder of runs and the command that adds to it."""

    def __init__(self, path: Path, command: Any) -> None:
        self.path, self.command = path, command

    def train(self, *arguments: str) -> Any:
        """A tiny run, which must end well."""
        ended = self.command("train", *TINY, f"paths.outputs={self.path}", *arguments)
        assert ended.code == 0, ended.err
        return ended

    def run(self, name: str, *arguments: str) -> Path:
        """The folder of a tiny run of that name."""
        self.train(f"name={name}", *arguments)
        return self.path / "digits" / name

    @property
    def teachers(self) -> list[Path]:
        return [path for path in (self.path / "teachers" / "digits").iterdir() if path.is_dir()]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command) -> Outputs:
    """One teacher and the runs that share it."""
    return Outputs(tmp_path_factory.mktemp("shared") / "outputs", command)


@pytest.fixture(scope="module")
def run(outputs) -> Path:
    """A distilled student of two epochs, with pictures."""
    epochs = ["trainer.max_epochs=2", "teacher.max_epochs=1", "pictures_every_n_epochs=1"]
    return outputs.run("first", "granularity=block", "loss=kl", "alpha=0.5", *epochs)


@pytest.fixture
def fresh(tmp_path, command) -> Outputs:
    """Outputs without a teacher."""
    return Outputs(tmp_path / "outputs", command)


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def status_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def student_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k not in ("wall_seconds", "images_per_second")}


class TestRunFolder:
    def test_status_is_done(self, run):
        assert status_of(run)["state"] == "done"

    def test_metrics_are_flat_and_whole(self, run):
        metrics = metrics_of(run)

        assert {*FIGURES} <= metrics.keys()
        assert not [name for name, value in metrics.items() if isinstance(value, dict | list)]
        assert all(math.isfinite(metrics[name]) for name in FIGURES)
        assert (metrics["epochs"], metrics["seed"], metrics["steps"]) == (2, 0, 4)
        assert metrics["student/parameters"] == sum(weight.numel() for weight in student_of(run).values())
        assert metrics["images_per_second"] > 0
        assert {"versions/torch", "versions/lightning", "hardware/device"} <= metrics.keys()
        assert metrics["precision/trainer"] == "32-true"
        assert metrics["precision/float32_matmul"] == "highest"

    def test_config_is_resolved(self, run):
        text = (run / "config.yaml").read_text()
        config = yaml.safe_load(text)

        assert "${" not in text
        assert (config["alpha"], config["student"]["image_size"]) == (0.5, 8)
        assert config["loss"]["_target_"] == "vitkd.methods.maps.losses.KL"

    def test_csv_holds_both_curves(self, run):
        with (run / "metrics.csv").open() as file:
            rows = [*csv.DictReader(file)]
        train = [float(row["train/total_loss"]) for row in rows if row["train/total_loss"]]
        val = [float(row["val/acc"]) for row in rows if row["val/acc"]]

        assert (len(train), len(val)) == (4, 2)
        assert val[-1] == pytest.approx(metrics_of(run)["val/acc_last"])

    def test_checkpoints_are_plain_and_without_the_teacher(self, run):
        for name in ("last", "best"):
            content = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)

            assert content["state_dict"]
            assert not [key for key in content["state_dict"] if "teacher" in key]
            assert content["model"]["config"] == "ViTConfig"

    def test_the_student_is_the_best_checkpoint(self, run):
        images = torch.randn(5, 1, 8, 8)
        student, (best, epoch) = (
            load_model(run / "student.safetensors"),
            load_from_checkpoint(run / "checkpoints" / "best.ckpt"),
        )

        assert torch.equal(student(images).logits, best(images).logits)
        assert epoch == metrics_of(run)["best_epoch"]

    def test_its_details_follow_from_its_predictions(self, run):
        details, arrays = (
            json.loads((run / "test_details.json").read_text()),
            np.load(run / "test_predictions.npz"),
        )
        labels = arrays["labels"]

        assert details["class_names"] == [*"0123456789"]
        assert details["class_images"] == np.bincount(labels).tolist()
        for epoch in ("last", "best"):
            right = arrays[epoch] == labels
            assert details[epoch]["class_accuracy"] == [right[labels == c].mean() for c in range(10)]
            bins = details[epoch]["confidence_bins"]
            hits = [n * a for n, a in zip(bins["images"], bins["accuracy"], strict=True) if n]
            assert sum(hits) == pytest.approx(right.sum())
            assert metrics_of(run)[f"test/acc_{epoch}"] == right.mean()

    def test_log_tells_of_every_epoch_and_of_the_teacher_first(self, run):
        log = (run / "run.log").read_text()

        assert log.index("teacher: ") < log.index(" student: epoch 1/2 ") < log.index(" student: epoch 2/2 ")

    def test_picture_is_a_png(self, run):
        assert (run / "attention.png").read_bytes().startswith(PNG)

    def test_pairs_tell_who_learned_from_whom(self, run):
        (pair,) = json.loads((run / "pairs.json").read_text())

        assert (pair["student_block"], pair["teacher_block"]) == (1, 3)
        assert pair["teacher_heads"] == [[0], [1], [2], [3]]

    def test_no_half_written_file_is_left(self, run):
        assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]

    def test_the_teachers_folder_is_a_run_folder(self, run, outputs):
        for teacher in outputs.teachers:
            assert status_of(teacher)["state"] == "done"
            assert metrics_of(teacher)["teacher/test_acc"] is None
            assert " teacher: epoch 1/1 " in (teacher / "run.log").read_text()
            assert load_model(teacher / "student.safetensors").config.depth == 4


@pytest.fixture(scope="module")
def events(run) -> EventAccumulator:
    """What TensorBoard shows of the run."""
    return EventAccumulator(str(run)).Reload()


class TestTensorBoard:
    @pytest.mark.parametrize(
        "tag",
        [f"{s}/{n}" for s in ("train", "val") for n in ("class_loss", "transfer_loss", "total_loss", "acc")]
        + [f"{split}/map_loss/1.{head}" for split in ("train", "val") for head in range(4)]
        + [f"train/{name}" for name in ("lr", "images_per_second", "gradient_ratio")]
        + ["train/gradient_norm_class", "train/gradient_norm_transfer", "val/teacher_agreement"],
    )
    def test_curve(self, tag, events):
        points = events.Scalars(tag)

        assert len(points) == (4 if tag.startswith("train") else 2)
        assert all(math.isfinite(point.value) for point in points)

    def test_total_is_the_weighted_sum(self, events):
        class_loss, transfer, total = (
            [point.value for point in events.Scalars(f"train/{name}_loss")]
            for name in ("class", "transfer", "total")
        )

        assert total == pytest.approx([0.5 * a + 0.5 * b for a, b in zip(class_loss, transfer, strict=True)])

    def test_transfer_is_the_mean_over_maps(self, events):
        maps = [[p.value for p in events.Scalars(f"train/map_loss/1.{head}")] for head in range(4)]
        transfer = [point.value for point in events.Scalars("train/transfer_loss")]

        assert transfer == pytest.approx([sum(step) / 4 for step in zip(*maps, strict=True)])

    def test_pictures(self, events):
        tag, confusion = sorted(events.Tags()["images"])

        pictures = events.Images(tag)

        assert (tag.partition("/")[0], confusion) == ("attention", "test/confusion")
        assert (len(pictures), len(events.Images(confusion))) == (2, 1)
        assert all(picture.encoded_image_string.startswith(PNG) for picture in pictures)

    def test_hyperparameters_and_layout(self, events):
        plugins = events.summary_metadata.values()
        names = {metadata.plugin_data.plugin_name for metadata in plugins}

        assert {"hparams", "custom_scalars"} <= names
        assert events.Scalars("test/acc_last")[0].value == pytest.approx(0.1, abs=0.1)

    def test_what_is_measured_at_the_end(self, events, run):
        measured = {n: v for n, v in metrics_of(run).items() if n.startswith("test/")}

        assert {"test/acc_top5", "test/f1_macro", "test/ece_best"} <= measured.keys()
        for name, value in measured.items():
            assert [each.value for each in events.Scalars(name)] == pytest.approx([value])

    def test_without_pictures_nothing_is_drawn(self, outputs):
        folder = outputs.run("without_pictures", "method=none")

        assert EventAccumulator(str(folder)).Reload().Tags()["images"] == []
        assert (folder / "test_details.json").exists()


class TestTeacher:
    def test_is_trained_once_and_never_touched(self, run, outputs):
        (teacher,) = outputs.teachers
        before = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}

        ended = outputs.train("teacher.max_epochs=1", "seed=3", "alpha=0.1", "optimizer.lr=0.01", "loss=mse")

        assert "reusing" in ended.out
        assert outputs.teachers == [teacher]
        assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == before

    def test_another_setting_of_it_trains_another(self, run, outputs):
        before = len(outputs.teachers)

        ended = outputs.train("teacher.max_epochs=1", "teacher.seed=1")

        assert "training it first" in ended.out
        assert len(outputs.teachers) == before + 1

    def test_one_that_fails_never_passes_for_a_teacher(self, fresh, monkeypatch):
        def fail(*_: Any) -> None:
            raise RuntimeError("the disk is on fire")

        with monkeypatch.context() as patch:
            patch.setattr("vitkd.train.student.measure_both", fail)
            ended = fresh.command("train", *TINY, f"paths.outputs={fresh.path}")
        assert ended.code != 0
        (unfinished,) = fresh.teachers
        assert status_of(unfinished)["state"] == "failed"
        assert "the disk is on fire" in status_of(unfinished)["error"]

        assert "training it first" in fresh.train().out
        (finished,) = (path for path in fresh.teachers if path.suffix == "")
        assert status_of(finished)["state"] == "done"

    def test_of_an_earlier_run_can_be_named(self, run, outputs):
        alone = outputs.run("as_teacher", "method=none", "student=small")
        before = len(outputs.teachers)

        ended = outputs.train(f"teacher.checkpoint={alone}", "name=from_checkpoint")

        assert "training it first" not in ended.out
        assert len(outputs.teachers) == before
        metrics = metrics_of(outputs.path / "digits" / "from_checkpoint")
        assert metrics["teacher/test_acc"] == metrics_of(alone)["test/acc_best"]

    @pytest.mark.slow
    def test_two_processes_at_once_train_it_once(self, tmp_path):
        line = [sys.executable, "-m", "vitkd.train", *TINY, f"paths.outputs={tmp_path / 'outputs'}"]
        runs = [
            subprocess.Popen(
                [*line, f"seed={seed}"],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for seed in range(2)
        ]
        outputs = [run.communicate(timeout=300)[0] for run in runs]

        assert [run.returncode for run in runs] == [0, 0], outputs
        assert sorted("training it first" in text for text in outputs) == [False, True]
        assert len([p for p in (tmp_path / "outputs" / "teachers" / "digits").iterdir() if p.is_dir()]) == 1
        assert len([*(tmp_path / "outputs" / "digits").iterdir()]) == 2


class TestRepetition:
    def test_the_same_command_gives_another_folder_and_the_same_student(self, run, outputs):
        outputs.train("teacher.max_epochs=1", "seed=5", "student.dropout=0.1")
        outputs.train("teacher.max_epochs=1", "seed=5", "student.dropout=0.1")
        first, second = sorted(path for path in (outputs.path / "digits").iterdir() if "seed-5" in path.name)

        assert second.name == f"{first.name}-2"
        assert are_equal(student_of(first), student_of(second))
        assert timeless(metrics_of(first)) == timeless(metrics_of(second))

    def test_another_seed_gives_another_student(self, run, outputs):
        first, second = (
            outputs.run(f"seeded{seed}", "teacher.max_epochs=1", f"seed={seed}") for seed in (0, 6)
        )

        assert not are_equal(student_of(first), student_of(second))

    def test_a_stored_teacher_gives_the_student_that_a_new_one_gives(self, fresh):
        first, second = fresh.run("with_new_teacher"), fresh.run("with_stored_teacher")

        assert are_equal(student_of(first), student_of(second))

    @pytest.mark.parametrize("granularity", ["block", "encoder"])
    def test_alpha_one_is_the_student_alone(self, granularity, run, outputs):
        settings = ["student.dropout=0.1", "student.emb_dropout=0.1", "seed=7", "trainer.max_epochs=2"]
        alone = outputs.run(f"alone_{granularity}", "method=none", *settings)
        ones = [f"granularity={granularity}", "alpha=1", "teacher.max_epochs=1", *settings]

        assert are_equal(student_of(alone), student_of(outputs.run(f"alpha1_{granularity}", *ones)))


class TestControls:
    def test_an_untrained_teacher_is_what_training_would_begin_with(self, fresh):
        folder = fresh.run("untrained", "teacher.trained=false", "teacher.seed=4")
        config = parse(OmegaConf.create(RunFolder(folder).read_config()))
        own = teacher_run(config)
        seed_generators(own.seed, WEIGHTS, own.student)

        assert not (fresh.path / "teachers").exists()
        assert metrics_of(folder)["teacher/weights"] == digest(own.student.build())

    @pytest.mark.parametrize("control", ["shuffled", "uniform"])
    def test_other_maps_give_another_student(self, control, run, outputs):
        settings = ["teacher.max_epochs=1", f"method.control={control}"]

        assert not are_equal(student_of(run), student_of(outputs.run(f"of_{control}_maps", *settings)))

    def test_logits_are_learned_without_maps(self, run, outputs):
        drawn = "pictures_every_n_epochs=9"
        folder = outputs.run("logits", "teacher.max_epochs=1", "method=logit", drawn)

        assert not are_equal(student_of(run), student_of(folder))
        assert not (folder / "pairs.json").exists()
        assert (folder / "attention.png").exists()
        with (folder / "metrics.csv").open() as file:
            assert {"val/transfer_loss", "val/teacher_agreement"} <= set(next(csv.reader(file)))

    def test_logits_asked_once_give_the_student_of_logits_asked_each_time(self, outputs):
        settings = ["teacher.max_epochs=1", "method=logit", "trainer.max_epochs=2"]

        once = outputs.run("logits_once", *settings)
        each_time = outputs.run("logits_each_time", *settings, "teacher.cache=off")

        assert are_equal(student_of(once), student_of(each_time))


class TestVariants:
    def test_the_student_alone_needs_no_teacher(self, fresh):
        folder = fresh.run("alone", "method=none")
        metrics = metrics_of(folder)

        assert not (fresh.path / "teachers").exists()
        assert metrics["teacher/test_acc"] is metrics["teacher/parameters"] is None
        assert "test/teacher_agreement" not in metrics
        assert not (folder / "attention.png").exists()

    @pytest.mark.parametrize(
        "settings",
        [
            ["trainer.precision=bf16-true"],
            ["trainer.precision=64-true"],
            ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0"],
            ["trainer.deterministic=true", "trainer.accumulate_grad_batches=2"],
        ],
    )
    def test_what_lightning_offers_passes_through(self, settings, fresh):
        folder = fresh.run("offered", "teacher.max_epochs=1", *settings)

        assert status_of(folder)["state"] == "done"
        assert all(tensor.dtype == torch.float32 for tensor in load_model(folder).state_dict().values())

    def test_the_precision_of_matrix_products_is_set_recorded_and_put_back(self, outputs):
        before = torch.get_float32_matmul_precision()

        folder = outputs.run("high", "method=none", "matmul_precision=high")

        assert metrics_of(folder)["precision/float32_matmul"] == "high"
        assert torch.get_float32_matmul_precision() == before == "highest"

    def test_a_teacher_asked_once_gives_the_student_of_one_asked_each_time(self, outputs, monkeypatch):
        fills, fill = [], TeacherCaching._fill
        monkeypatch.setattr(TeacherCaching, "_fill", lambda *given: fills.append(given[3]) or fill(*given))
        long = ["trainer.max_epochs=3", "trainer.limit_train_batches=10", "teacher.max_epochs=1"]

        auto = outputs.run("auto", *long)
        asked_once, fills[:] = [*fills], []
        off = outputs.run("off", *long, "teacher.cache=off")

        assert asked_once == ["train", "val"]
        assert not fills
        for name, weight in student_of(off).items():
            torch.testing.assert_close(student_of(auto)[name], weight, rtol=1e-4, atol=1e-5)
        ours, theirs = metrics_of(auto), metrics_of(off)
        assert ours["val/acc_last"] == theirs["val/acc_last"]

    def test_an_epoch_without_validation_does_not_borrow_anothers(self, fresh):
        every_second = ["trainer.max_epochs=3", "trainer.check_val_every_n_epoch=2"]
        folder = fresh.run("seldom", "method=none", *every_second)

        metrics = metrics_of(folder)
        assert metrics["val/acc_last"] is None
        assert metrics["best_epoch"] == 2

    @pytest.mark.parametrize("unvalidated", ["trainer.limit_val_batches=0", "dataset.val_fraction=0"])
    def test_where_no_epoch_was_validated_none_is_the_best(self, unvalidated, fresh):
        ended = fresh.train("method=none", unvalidated)

        assert (ended.code, ended.err) == (0, "")
        assert "student, last epoch (1)" in ended.out
        assert "best-on-val" not in ended.out

    def test_students_of_a_few_images_share_the_teacher_of_all(self, fresh):
        settings = ["dataset.batch_size=16", "pictures_every_n_epochs=0"]
        folders = [
            fresh.run(f"run{share}", *settings, f"dataset.train_fraction={share}") for share in (0.1, 0.2, 1)
        ]

        inputs = [json.loads((folder / "inputs.json").read_text()) for folder in folders]
        assert [each["images/train"] for each in inputs] == [129, 259, 1295]
        assert {(each["images/val"], each["images/test"]) for each in inputs} == {(143, 359)}
        assert len({each["teacher/fingerprint"] for each in inputs}) == len(fresh.teachers) == 1
        assert json.loads((fresh.teachers[0] / "inputs.json").read_text())["images/train"] == 1295

    def test_a_setting_without_effect_earns_a_warning(self, fresh):
        unread = ("alpha=0.3", "granularity.head_map=hungarian", "dataset.augment.random_erasing.p=0.1")
        ended = fresh.train("method=none", *unread, "seed=1")

        warnings = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
        assert warnings == [
            "warning: teacher.trainer.limit_train_batches has no effect with method=none",
            "warning: alpha has no effect with method=none",
            "warning: granularity.head_map has no effect with method=none",
            "warning: dataset.augment.random_erasing.p has no effect without random_erasing in"
            " dataset.augment.then",
        ]

    def test_heads_matched_by_their_maps_are_recorded(self, run, outputs):
        folder = outputs.run(
            "matched", "granularity=encoder", "granularity.head_map=hungarian", "teacher.max_epochs=1"
        )
        pairs = json.loads((folder / "pairs.json").read_text())

        assert [pair["student_block"] for pair in pairs] == [0, 1]
        for pair in pairs:
            assert sorted(pair["teacher_heads"]) == [[0], [1], [2], [3]]
        assert not (folder / "attention.png").exists(), "pictures_every_n_epochs=0 draws none"

    @pytest.mark.parametrize("loss", ["kl", "mse"])
    def test_token_grids_may_differ_where_maps_are_resized(self, loss, fresh):
        resized = ["teacher.patch_size=4", "method.resize=bilinear", "pictures_every_n_epochs=9"]
        folder = fresh.run("resized", *resized, f"loss={loss}")

        assert math.isfinite(metrics_of(folder)["test/loss"])
        assert (folder / "attention.png").read_bytes().startswith(PNG)

    def test_training_without_validation_ends_well(self, fresh):
        metrics = metrics_of(fresh.run("unvalidated", "method=none", "dataset.val_fraction=0"))

        assert metrics["val/acc_last"] is metrics["val/acc_best"] is None
        assert metrics["test/acc_best"] == metrics["test/acc_last"]

    def test_a_multirun_is_a_folder_a_job(self, run, outputs):
        before = {*(outputs.path / "digits").iterdir()}

        jobs = [f"paths.outputs={outputs.path}", "teacher.max_epochs=1", "seed=20,21", "granularity=head"]
        ended = outputs.command("train", "-m", *TINY, *jobs)

        assert ended.code == 0, ended.err
        new = {*(outputs.path / "digits").iterdir()} - before
        assert sorted(metrics_of(folder)["seed"] for folder in new) == [20, 21]
        assert ended.err == ""

    @pytest.mark.parametrize(
        ("error", "state"),
        [(RuntimeError("out of luck"), "failed"), (KeyboardInterrupt(), "stopped")],
        ids=["an error", "Ctrl-C"],
    )
    def test_a_run_that_breaks_off_says_so(self, error, state, fresh, monkeypatch):
        def break_off(*_: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("vitkd.train.module.DistillModule.training_step", break_off)
            arguments = [*TINY, f"paths.outputs={fresh.path}", "method=none", "name=broken"]
            ended = fresh.command("train", *arguments)

        status = status_of(fresh.path / "digits" / "broken")
        assert ended.code != 0
        assert status["state"] == state
        if state == "failed":
            assert status["error"] == "RuntimeError: out of luck"
        assert not (fresh.path / "digits" / "broken" / "metrics.json").exists()

    @pytest.mark.parametrize("metrics", ["", "{}", None], ids=["empty", "no metrics", "lost"])
    def test_a_run_whose_metrics_are_lost_measures_them_again(self, metrics, run, fresh, monkeypatch):
        """It is done by its status, and its curves are damaged, too."""
        shutil.copytree(run.parent.parent, fresh.path)
        copy = fresh.path / "digits" / "first"
        (copy / "metrics.json").unlink()
        if metrics is not None:
            (copy / "metrics.json").write_text(metrics)
        (copy / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes() + b'\xff,"\n')

        def train(*_: Any) -> None:
            raise AssertionError("there is nothing left to train")

        monkeypatch.setattr("vitkd.train.module.DistillModule.training_step", train)
        settings = ["granularity=block", "loss=kl", "alpha=0.5"]
        settings += ["trainer.max_epochs=2", "teacher.max_epochs=1"]
        ended = fresh.train("name=first", "resume=auto", "pictures_every_n_epochs=1", *settings)

        assert timeless(metrics_of(copy)) == timeless(metrics_of(run))
        assert (copy / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
        assert "metrics.csv.damaged" in ended.out
        assert not (fresh.path / "digits" / "first-2").exists()


class TestEvaluate:
    def figures(self, out: str) -> dict[str, tuple[str, ...]]:
        rows = (line.split() for line in out.splitlines())
        return {row[0]: tuple(row[1:]) for row in rows if row and row[0].startswith("test/")}

    def test_reproduces_every_figure_to_the_last_digit(self, run, command):
        figures = self.figures(command("evaluate", f"run={run}").out)

        reported = {name: value for name, value in metrics_of(run).items() if name.startswith("test/")}
        assert figures == {name: (repr(value), repr(value), "equal") for name, value in reported.items()}

    def test_needs_the_run_folder_alone(self, run, command, tmp_path, monkeypatch):
        shutil.copytree(run, tmp_path / "moved")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")

        ended = command("evaluate", "run=../moved")

        assert ended.code == 0, ended.err
        assert {row[-1] for row in self.figures(ended.out).values()} == {"equal"}
        assert not [*(tmp_path / "elsewhere").iterdir()]

    def test_leaves_the_run_as_it_was(self, run, command):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

        command("evaluate", f"run={run}")

        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def test_says_so_where_a_figure_differs(self, run, command, tmp_path):
        shutil.copytree(run, tmp_path / "changed")
        metrics = metrics_of(run)
        (tmp_path / "changed" / "metrics.json").write_text(json.dumps(metrics | {"test/acc_best": 0.123}))

        ended = command("evaluate", f"run={tmp_path / 'changed'}")

        assert ended.code == 1
        figures = self.figures(ended.out)
        assert figures["test/acc_best"] == (repr(metrics["test/acc_best"]), "0.123", "differs")

    def test_shows_the_hardest_classes(self, run, command):
        *_, table = command("evaluate", f"run={run}").out.partition("hardest classes")
        arrays = np.load(run / "test_predictions.npz")
        right = arrays["last"] == arrays["labels"]
        accuracies = sorted(right[arrays["labels"] == c].mean() for c in range(10))

        rows = [line.split() for line in table.splitlines()[1:]]

        assert [row[2] for row in rows] == [f"{accuracy:.2%}" for accuracy in accuracies[:5]]

    @pytest.mark.parametrize("name", ["test_predictions.npz", "metrics.json", "student.safetensors"])
    def test_a_damaged_file_is_one_line(self, name, run, command, tmp_path):
        shutil.copytree(run, tmp_path / "damaged")
        damaged = tmp_path / "damaged" / name
        if name.endswith("npz"):
            np.savez(damaged, teacher=np.zeros(3, np.int32))
        else:
            replace(damaged, pipe)

        ended = command("evaluate", f"run={tmp_path / 'damaged'}")

        assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
        assert name in ended.err

    def test_a_run_of_another_machine(self, run, command, tmp_path):
        """Trained on eight GPUs, measured on what is there."""
        shutil.copytree(run, tmp_path / "copied")
        file = tmp_path / "copied" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        config["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "ddp"}
        file.write_text(yaml.safe_dump(config))

        ended = command("evaluate", f"run={tmp_path / 'copied'}", "accelerator=cpu")

        assert ended.code == 0, ended.err
        assert {row[-1] for row in self.figures(ended.out).values()} == {"equal"}


@pytest.mark.slow
def test_a_real_process_does_the_same(run, process, tmp_path):
    """Relative folders, Python's own warnings, and nothing but outputs left in the working folder."""
    arguments = ["granularity=block", "loss=kl", "alpha=0.5", "seed=0", "name=first"]
    trained = process("train", *TINY, *arguments, cwd=tmp_path)
    folder = tmp_path / "outputs" / "digits" / "first"

    assert trained.code == 0, trained.err
    assert trained.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    measured = process("evaluate", f"run={os.path.relpath(folder, tmp_path)}", cwd=tmp_path)
    assert measured.out.count("equal") == 12
