"""Your photos, a teacher from a file of timm's, a small student: the README's first example, in small."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.photos import noise_photos
from vitkd.models import Taps, load_model

TEACHER, STUDENT = "test_vit", "test_vit2"
BRIEF = [
    *("trainer=cpu", "trainer.max_epochs=1", "teacher.max_epochs=1", "dataset.batch_size=8", "name=photos"),
    *("dataset=image_folder", "dataset.image_size=64", "student.img_size=64", "teacher.img_size=64"),
    *("teacher=timm", f"teacher.name={TEACHER}", "student=timm", f"student.name={STUDENT}"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with photos of two classes and a file of weights of 1,000 classes, as timm saves it."""
    folder = tmp_path_factory.mktemp("timm")
    (folder / "photos").mkdir()
    noise_photos(folder / "photos", of_each_class=20, size=64)
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER).state_dict(), folder / "teacher.safetensors")
    return folder


@pytest.fixture(scope="module")
def train(command, place) -> Any:
    def run(*arguments: str, code: int = 0) -> str:
        given = [f"dataset.root={place / 'photos'}", f"paths.outputs={place / 'outputs'}"]
        ended = command(
            "train", *BRIEF, *given, f"teacher.weights={place / 'teacher.safetensors'}", *arguments
        )
        assert ended.code == code, ended.err
        return ended.out + ended.err

    return run


@pytest.fixture(scope="module")
def first(train, place) -> tuple[Path, str]:
    """The run folder, and what its command printed."""
    printed = train()
    return place / "outputs" / "image_folder" / "photos", printed


@pytest.mark.slow
class TestPhotos:
    def test_the_teacher_is_fine_tuned_with_a_new_head_and_a_line_says_so(self, first, place):
        _, printed = first
        (teacher,) = (place / "outputs" / "teachers" / "image_folder").glob("*/student.safetensors")

        assert f"{TEACHER}: its head of 1000 classes is replaced by a new one of 2" in printed
        assert load_model(teacher).config.num_classes == 2

    def test_the_student_is_read_without_anything_else(self, first):
        student = load_model(first[0])

        output = student(torch.randn(2, 3, 64, 64), Taps(scores=(0,)))

        assert output.logits.shape == (2, 2)
        assert output.scores[0].shape == (2, student.attention[0].heads, *[student.attention[0].tokens] * 2)

    def test_it_is_measured_again_and_explained(self, first, command):
        for name in ("evaluate", "explain"):
            ended = command(name, f"run={first[0]}", *(["images=2"] if name == "explain" else []))
            assert ended.code == 0, ended.err
        assert (first[0] / "explain" / "index.html").is_file()

    def test_the_same_command_finds_its_teacher_wherever_the_file_lies(self, first, train, place):
        moved = place / "elsewhere.safetensors"
        moved.write_bytes((place / "teacher.safetensors").read_bytes())

        assert "teacher: reusing" in train(f"teacher.weights={moved}", "alpha=0.3", "name=moved")

    def test_another_file_at_its_place_makes_another_teacher(self, first, train, place):
        torch.manual_seed(1)
        other = place / "other.safetensors"
        save_file(timm.create_model(TEACHER).state_dict(), other)

        assert "training it first" in train(f"teacher.weights={other}", "name=other")

    def test_as_it_is_a_teacher_needs_a_head_that_fits(self, train, place):
        assert "set trained=true" in train("teacher.trained=false", "name=untrained", code=2)
        save_file(timm.create_model(TEACHER, num_classes=2).state_dict(), place / "tuned.safetensors")

        printed = train(
            "teacher.trained=false", f"teacher.weights={place / 'tuned.safetensors'}", "name=tuned"
        )

        assert "teacher: not trained, weights of" in printed
        metrics = json.loads((place / "outputs" / "image_folder" / "tuned" / "metrics.json").read_text())
        network = timm.create_model(TEACHER, num_classes=2, img_size=64)
        assert metrics["teacher/parameters"] == sum(p.numel() for p in network.parameters())


def test_a_stack_leaves_it_to_a_run_of_its_own(command, tmp_path):
    tiny = [
        "student.img_size=8",
        "student.patch_size=4",
        "student.embed_dim=8",
        "student.depth=1",
        "student.num_heads=2",
    ]
    brief = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "method=none"]

    ended = command(
        "train",
        "-m",
        "hydra/launcher=stacked",
        "student=timm",
        *tiny,
        *brief,
        "seed=0,1",
        f"paths.outputs={tmp_path}",
    )

    assert ended.code == 0, ended.err
    reason = "only vitkd's own ViTs can be stacked"
    assert ended.err.count(reason) + ended.out.count(reason) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "student",
    [
        ["student.name=deit_tiny_distilled_patch16_224", "method=token", "method.attention_weight=0.5"],
        ["student.name=vit_base_patch16_siglip_224", "granularity=encoder"],
        ["student.name=vit_small_patch16_dinov3", "method=relation"],
        ["student.name=vit_tiny_patch16_224", "teacher=timm", "teacher.name=resnet10t", "method=logit"],
    ],
)
def test_every_form_is_trained_drawn_and_explained(student, command, tmp_path):
    sizes = [
        f"student.{size}" for size in ("img_size=8", "patch_size=2", "embed_dim=16", "depth=2", "num_heads=2")
    ]
    brief = ["trainer=cpu", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "teacher.trained=false"]

    ended = command(
        "train", "student=timm", *student, *sizes, *brief, "name=run", f"paths.outputs={tmp_path}"
    )
    assert ended.code == 0, ended.err

    run = tmp_path / "digits" / "run"
    assert (run / "attention.png").is_file() or "method=logit" in student
    ended = command(
        "explain", f"run={run}", "images=2", "faithfulness_images=0", "methods=[attention,relevance]"
    )
    assert ended.code == 0, ended.err
