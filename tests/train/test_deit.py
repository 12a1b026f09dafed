"""Distillation tokens, shifted patches, locality attention and convolutional models, by whole commands."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import crashes
from tests.crashes import Strike
from tests.train.test_resume import assert_nothing_happened, run_of
from vitkd.models import ResNet, ViT, load_model
from vitkd.runs.checkpoints import read_checkpoint

TINY = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=2",
        "teacher.trainer.limit_train_batches=2",
        "+trainer.limit_val_batches=1",
    ),
    *("teacher.max_epochs=1", "log_every_n_steps=1", "pictures_every_n_epochs=0", "dataset.batch_size=32"),
]
PNG = b"\x89PNG\r\n\x1a\n"
HEADS = [
    f"test/acc_{epoch}_{token}_token" for epoch in ("last", "best") for token in ("class", "distillation")
]


class Outputs:
    """A folder of runs and the command that adds to it."""

    def __init__(self, path: Path, command: Any) -> None:
        self.path, self.command = path, command

    def run(self, name: str, *arguments: str) -> tuple[Path, str]:
        """The folder of a tiny run of that name, which must end well, and what was said."""
        ended = self.command("train", *TINY, f"paths.outputs={self.path}", f"name={name}", *arguments)
        assert ended.code == 0, ended.err
        assert ended.err == ""
        return self.path / "digits" / name, ended.out


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, command) -> Outputs:
    return Outputs(tmp_path_factory.mktemp("deit") / "outputs", command)


@pytest.fixture(scope="module")
def taught(outputs) -> tuple[Path, str]:
    """A student of a convolutional teacher, and what was said."""
    return outputs.run("taught", "method=token", "teacher=resnet", "teacher.stem=small")


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def measured_again(command: Any, folder: Path) -> dict[str, str]:
    """The verdict on every figure."""
    ended = command("evaluate", f"run={folder}")
    assert ended.code == 0, ended.out
    rows = (line.split() for line in ended.out.splitlines())
    return {row[0]: row[-1] for row in rows if row and row[0].startswith("test/")}


class TestTaughtByAConvolutionalTeacher:
    def test_has_each_heads_figures(self, taught):
        metrics = metrics_of(taught[0])

        assert {*HEADS, "test/acc_last", "test/acc_best", "test/teacher_agreement"} <= metrics.keys()
        assert metrics["teacher/parameters"] == 11_172_810, "ResNet-18 of 1 channel and 10 classes"
        assert isinstance(load_model(taught[0]), ViT)

    def test_has_them_in_the_closing_table(self, taught):
        folder, said = taught
        rows = [line.strip() for line in said.splitlines() if re.match(r"student, |  its ", line)]

        found = [
            (re.split(r" {2,}", row)[0], row.split("%")[-2].split()[-1] + "%") for row in rows if "its" in row
        ]
        metrics = metrics_of(folder)
        assert [name for name, _ in found] == 2 * ["its class token alone", "its distillation token alone"]
        assert [share for _, share in found] == [f"{metrics[name]:.2%}" for name in HEADS]
        assert rows[0].startswith("student, last")
        assert rows[3].startswith("student, best-on-val")

    def test_tells_both_models(self, taught):
        assert "teacher: resnet18, stem for small images\n" in taught[1]
        assert "4×4 patches + CLS + distillation token\n" in taught[1]

    def test_has_no_maps_to_show_or_pair(self, taught):
        assert not (taught[0] / "attention.png").exists()
        assert not (taught[0] / "pairs.json").exists()

    def test_has_a_curve_for_each_head(self, taught):
        header = (taught[0] / "metrics.csv").read_text().splitlines()[0].split(",")

        assert {"train/transfer_loss", "val/teacher_agreement"} <= {*header}
        for name in ("acc", "acc_class_token", "acc_distillation_token"):
            assert {f"train/{name}", f"val/{name}"} <= {*header}

    def test_is_measured_again_to_the_last_digit(self, taught, command):
        verdicts = measured_again(command, taught[0])

        assert {*HEADS} < verdicts.keys()
        assert {*verdicts.values()} == {"equal"}

    def test_its_teacher_is_a_run_of_its_own(self, taught, outputs):
        (teacher,) = (path for path in outputs.path.glob("teachers/digits/*") if path.is_dir())
        assert isinstance(load_model(teacher), ResNet)
        assert metrics_of(teacher)["test/acc_best"] == metrics_of(taught[0])["teacher/test_acc"]

    @pytest.mark.slow
    def test_its_teacher_is_taken_again(self, taught, outputs):
        _, said = outputs.run(
            "soft", "method=token", "method.targets=soft", "teacher=resnet", "teacher.stem=small", "seed=1"
        )

        assert "reusing" in said


class TestOtherArchitectures:
    def test_both_a_token_and_maps_are_learned(self, outputs):
        folder, said = outputs.run(
            "both",
            "method=token",
            "method.attention_weight=0.5",
            "granularity=encoder",
            "pictures_every_n_epochs=9",
        )

        assert (folder / "attention.png").read_bytes().startswith(PNG)
        pairs = json.loads((folder / "pairs.json").read_text())
        assert [(pair["student_block"], pair["teacher_block"]) for pair in pairs] == [(0, 1), (1, 3)]
        header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
        assert {"val/token_loss", "val/map_loss/0.0", "val/map_loss/1.3"} <= {*header}
        assert "no effect" not in said

    def test_the_reports_first_improvement(self, outputs, command):
        folder, said = outputs.run(
            "spt_lsa", "student.tokenizer=spt", "student.attention=lsa", "pictures_every_n_epochs=9"
        )

        assert (folder / "attention.png").read_bytes().startswith(PNG)
        assert "4×4 shifted patches + CLS, locality attention\n" in said
        assert {*measured_again(command, folder).values()} == {"equal"}
        assert "tokenizer.norm.weight" in load_file(folder / "student.safetensors")

    @pytest.mark.slow
    def test_a_convolutional_student_alone(self, outputs, command):
        folder, _ = outputs.run("convolutional", "method=none", "student=resnet", "student.stem=small")

        assert isinstance(load_model(folder), ResNet)
        assert not [name for name in metrics_of(folder) if name.endswith("_token")]
        assert {*measured_again(command, folder).values()} == {"equal"}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "settings",
        [
            ["student.distillation_token=true", "teacher.attention=lsa"],
            ["teacher.distillation_token=true", "student.attention=lsa", "granularity.head_map=hungarian"],
            ["method=none", "student.distillation_token=true", "ema_decay=0.9"],
            ["method=logit", "student.distillation_token=true", "trainer.precision=bf16-mixed"],
            ["method=token", "method.targets=soft", "trainer.precision=bf16-true"],
            ["method=token", "method.targets=soft", "trainer.precision=64-true", "ema_decay=0.9"],
            ["teacher.patch_size=4", "method.resize=bilinear", "student.distillation_token=true"],
            [
                "student.patch_size=1",
                "student.distillation_token=true",
                "dataset.batch_size=8",
                "method=token",
            ],
        ],
        ids=" ".join,
    )
    def test_whatever_is_combined_ends_well(self, settings, outputs, command):
        name = "-".join(setting.rpartition("=")[2] for setting in settings)

        folder, _ = outputs.run(name, *settings)

        assert {*measured_again(command, folder).values()} == {"equal"}
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert ("test/acc_last_class_token" in metrics_of(folder)) == config["student"]["distillation_token"]

    @pytest.mark.slow
    def test_alpha_1_is_the_student_alone(self, outputs):
        """Both heads learn labels, whatever the method."""
        student = ["student.distillation_token=true", "student.dropout=0.1", "trainer.max_epochs=2", "seed=7"]

        alone, _ = outputs.run("alone", "method=none", *student)
        beside, _ = outputs.run("alpha1", "method=token", "method.attention_weight=1", "alpha=1", *student)

        ours, theirs = (load_file(folder / "student.safetensors") for folder in (beside, alone))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestWarnings:
    @pytest.mark.parametrize(
        ("line", "ignored"),
        [
            ("method=token granularity=head", ["granularity"]),
            ("method=token granularity=head method.attention_weight=1", []),
            ("granularity=head method=logit", ["granularity"]),
            ("method=token method.temperature=2", ["method.temperature"]),
            ("method=token method.temperature=2 method.targets=soft", []),
        ],
    )
    def test_a_setting_that_the_method_ignores_earns_one(self, line, ignored, command):
        """Before anything is read or trained."""
        ended = command("train", *line.split(), "teacher.checkpoint=nowhere.ckpt")

        method = re.findall(r"method=(\w+)", line)[0]
        warnings = [row for row in ended.out.splitlines() if row.startswith("warning: ")]
        assert warnings == [
            f"warning: {key} has no effect with "
            f"{'the other settings of ' if key.startswith('method.') else ''}method={method}"
            for key in ignored
        ]
        assert "nowhere.ckpt" in ended.err


TO_BE_KILLED = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=2",
        "+trainer.limit_train_batches=6",
        "teacher.trainer.limit_train_batches=6",
        "teacher.max_epochs=2",
    ),
    *("+trainer.limit_val_batches=1", "student.depth=1", "student.dropout=0.1", "student.attention=lsa"),
    *("student.tokenizer=spt", "log_every_n_steps=4", "pictures_every_n_epochs=0", "name=run"),
    *("method=token", "teacher=resnet", "dataset.batch_size=32", "resume=auto"),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A folder whose run and teacher were never interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    ended = crashes.run(TO_BE_KILLED, folder)
    assert ended.code == 0, ended
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nth", "saved"),
    # The teacher takes the first 12 steps.
    [(4, 3), (9, 8), (12 + 9, 8)],
    ids=["teacher", "its 2nd epoch", "student"],
)
def test_a_convolutional_teacher_and_its_student_killed_and_resumed(nth, saved, reference, tmp_path):
    """As if nothing had happened, bit for bit; batch normalisation's statistics, too."""
    strike = Strike("vitkd.train.module:DistillModule.training_step", nth)

    struck = crashes.run([*TO_BE_KILLED, "checkpoint_minutes=0"], tmp_path, strike)
    resumed = crashes.run([*TO_BE_KILLED, "checkpoint_minutes=0"], tmp_path)

    assert (struck.code, resumed.code) == (-signal.SIGKILL, 0), resumed
    assert f"after step {saved}" in resumed.out
    (mine,), (theirs,) = (folder.glob("outputs/teachers/*/*/") for folder in (tmp_path, reference))
    assert_nothing_happened(mine, theirs)
    assert_nothing_happened(run_of(tmp_path), run_of(reference))
    steps = read_checkpoint(mine / "checkpoints" / "last.ckpt")["state_dict"][
        "model.network.bn1.num_batches_tracked"
    ]
    assert steps.item() == 12
