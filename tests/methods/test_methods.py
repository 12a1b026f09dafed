"""From a plan to the module that trains, or to one line that says why not."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation, record_both
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Block, Encoder, Head
from vitkd.methods.maps.losses import KL, MSE
from vitkd.methods.maps.pairing import BlockPair
from vitkd.methods.none import NoDistillation
from vitkd.models import ResNetConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.module import ClassifyModule, DistillModule


def plan(**changes: object) -> SimpleNamespace:
    settings = {
        "label_smoothing": 0.0,
        "granularity": Block(),
        "loss": MSE(),
        "alpha": 0.5,
        "optimizer": AdamW(),
        "schedule": Constant(),
    }
    return SimpleNamespace(**settings | changes)


def images(size: int = 8) -> torch.Tensor:
    return torch.randn(4, 3, size, size)


def unasked() -> torch.Tensor:
    raise AssertionError("no method but hungarian needs calibration images")


def test_no_distillation_trains_the_student_alone(tiny):
    student = tiny().build()

    module = NoDistillation().module(student, None, plan(), unasked)

    assert type(module) is ClassifyModule
    assert module.model is student
    assert not NoDistillation.needs_teacher


def test_attention_distillation_builds_what_the_plan_says(tiny):
    student, teacher = tiny().build(), tiny(depth=6, num_heads=4).build()
    settings = plan(granularity=Encoder(head_map="group_mean"), loss=KL(temperature=2.0), alpha=0.25)

    module = AttentionDistillation().module(student, teacher, settings, unasked)

    assert isinstance(module, DistillModule)
    assert (module.model, module.teacher, module.alpha) == (student, teacher, 0.25)
    assert module.transfer.loss == KL(temperature=2.0)
    assert module.transfer.pairs == tuple(
        BlockPair(i, t, (0, 1), ((0, 1), (2, 3))) for i, t in ((0, 1), (1, 3), (2, 5))
    )
    assert module.transfer.resize is None


def test_hungarian_is_settled_on_the_calibration_images(tiny):
    """A teacher that is the student with two heads swapped."""
    student, teacher = tiny(num_heads=3).build(), tiny(num_heads=3).build()
    teacher.load_state_dict(student.state_dict())
    qkv = teacher.blocks[2].attention.qkv.weight.data.unflatten(0, (3, 3, 4))
    qkv.copy_(qkv[:, [0, 2, 1]].clone())

    module = AttentionDistillation().module(
        student, teacher, plan(granularity=Block(head_map="hungarian")), images
    )

    assert module.transfer.pairs == (BlockPair(2, 2, (0, 1, 2), ((0,), (2,), (1,))),)


def test_calibration_draws_no_random_numbers_and_leaves_modes_alone(tiny):
    student, teacher = (tiny(dropout=0.5, emb_dropout=0.5).build() for _ in range(2))
    pairs, calibration = [BlockPair(0, 2, (0,), ((0,),))], images()
    before = torch.get_rng_state()

    first = record_both(student, teacher, pairs, calibration)
    second = record_both(student, teacher, pairs, calibration)

    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][2], second[1][2])


def test_unequal_grids_are_refused_naming_both(tiny):
    student, teacher = tiny(patch_size=4), tiny(patch_size=2)

    with pytest.raises(ConfigError, match=r"^[^\n]*2×2[^\n]*4×4[^\n]*method\.resize=bilinear[^\n]*$"):
        AttentionDistillation().check(student, teacher, plan())


@pytest.mark.parametrize(("student_patch", "teacher_patch"), [(4, 2), (2, 4)])
@pytest.mark.parametrize("head_map", ["index", "hungarian"])
def test_unequal_grids_can_be_resized(tiny, student_patch, teacher_patch, head_map):
    student, teacher = tiny(patch_size=student_patch).build(), tiny(patch_size=teacher_patch).build()
    method, settings = (
        AttentionDistillation(resize="bilinear"),
        plan(granularity=Block(head_map=head_map), loss=KL()),
    )
    method.check(student.config, teacher.config, settings)

    transfer = method.module(student, teacher, settings, images).transfer

    batch = images()
    values = transfer(
        student.scores(batch, transfer.student_blocks), teacher.scores(batch, transfer.teacher_blocks)
    )
    assert values.shape == (2,)
    assert (values > 0).all()


@pytest.mark.parametrize(
    ("student", "granularity", "words"),
    [
        ({"num_heads": 4}, Block(), "student.num_heads=4"),
        ({}, Head(blocks=[7]), "the student has no block 7"),
        ({}, Head(heads=[[0, 9]]), "the teacher has no head 9"),
    ],
)
def test_what_granularity_refuses_is_found_before_anything_is_built(tiny, student, granularity, words):
    with pytest.raises(ConfigError, match=words):
        AttentionDistillation().check(tiny(**student), tiny(num_heads=2), plan(granularity=granularity))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_attention_distillation_needs_two_models_with_maps(whose, tiny):
    models = {"student": tiny(), "teacher": tiny()} | {whose: ResNetConfig(8, 3, 5, stem="small")}

    with pytest.raises(
        ConfigError, match=rf"^{whose}=resnet18[^\n]*no attention maps[^\n]*method=logit[^\n]*$"
    ):
        AttentionDistillation().check(**models, plan=plan())


@pytest.mark.parametrize("method", [NoDistillation(), LogitDistillation()])
def test_other_methods_take_any_model(method, tiny):
    for student, teacher in product((tiny(), tiny(distillation_token=True), ResNetConfig(8, 3, 5)), repeat=2):
        method.check(student, teacher, plan())


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match=r"^resize=nearest: choose bilinear or null$"):
        AttentionDistillation(resize="nearest")
