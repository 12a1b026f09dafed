"""From settings to the module that trains, or to one line that says why not."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation, record_both
from vitkd.methods.base import DataFacts
from vitkd.methods.dkd import DKD
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Block, BlockPair, Encoder, Head
from vitkd.methods.maps.losses import KL, MSE
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.none import NoDistillation
from vitkd.methods.token import TokenDistillation
from vitkd.methods.weighting import Constant as ConstantWeighting
from vitkd.models import ResNetConfig, Taps
from vitkd.optim import AdamW, Constant
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule


def plan(**changes: object) -> SimpleNamespace:
    settings = {
        "label_smoothing": 0.0,
        "granularity": Block(),
        "weighting": ConstantWeighting(),
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


def facts(calibration: Callable[[], torch.Tensor] = unasked) -> DataFacts:
    """Of a data set with as many classes as the small models."""
    return DataFacts(num_images=4, num_classes=5, calibration=calibration)


def test_no_distillation_trains_the_student_alone(tiny):
    student = tiny().build()

    module = build_module(plan(method=NoDistillation()), student, None, facts())

    assert type(module) is DistillModule
    assert module.model is student
    assert module.objective is None
    assert not module.distils
    assert module.alpha == 1
    assert not NoDistillation.needs_teacher


def test_no_distillation_has_no_use_for_a_teacher_that_is_there(tiny):
    student, teacher = tiny().build(), tiny().build()

    module = build_module(plan(method=NoDistillation()), student, teacher, facts())

    assert NoDistillation().objective(student, teacher, plan(), facts()) is None
    assert module.teacher_taps("train") is module.teacher_taps("val") is None


def test_attention_distillation_builds_what_the_plan_says(tiny):
    student, teacher = tiny().build(), tiny(depth=6, num_heads=4).build()
    settings = plan(granularity=Encoder(head_map="group_mean"), loss=KL(temperature=2.0), alpha=0.25)

    settings.method = AttentionDistillation()
    module = build_module(settings, student, teacher, facts())

    assert isinstance(module, DistillModule)
    assert (module.model, module.teacher, module.alpha) == (student, teacher, 0.25)
    assert module.weighting is settings.weighting
    assert isinstance(module.objective, AttentionObjective)
    assert module.objective.loss == KL(temperature=2.0)
    assert module.objective.pairs == tuple(
        BlockPair(i, t, (0, 1), ((0, 1), (2, 3))) for i, t in ((0, 1), (1, 3), (2, 5))
    )
    assert [alignment.resize for alignment in module.objective.alignments] == [None] * 3
    assert module.objective.student_taps == Taps(scores=(0, 1, 2))
    assert module.objective.teacher_taps == Taps(scores=(1, 3, 5), logits=False)


def test_hungarian_is_settled_on_the_calibration_images(tiny):
    """A teacher that is the student with two heads swapped."""
    student, teacher = tiny(num_heads=3).build(), tiny(num_heads=3).build()
    teacher.load_state_dict(student.state_dict())
    qkv = teacher.blocks[2].attention.qkv.weight.data.unflatten(0, (3, 3, 4))
    qkv.copy_(qkv[:, [0, 2, 1]].clone())

    settings = plan(granularity=Block(head_map="hungarian"))
    objective = AttentionDistillation().objective(student, teacher, settings, facts(images))

    assert objective.pairs == (BlockPair(2, 2, (0, 1, 2), ((0,), (2,), (1,))),)


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

    objective = method.objective(student, teacher, settings, facts(images))

    batch = Batch(images(), torch.zeros(4).long(), torch.arange(4))
    outputs = student(batch.image, objective.student_taps), teacher(batch.image, objective.teacher_taps)
    values = objective(batch, *outputs)["map_loss"]
    assert values.shape == (4, 2)
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
        AttentionDistillation().check(**models, settings=plan())


@pytest.mark.parametrize("method", [NoDistillation(), LogitDistillation()])
def test_other_methods_take_any_model(method, tiny):
    for student, teacher in product((tiny(), tiny(distillation_token=True), ResNetConfig(8, 3, 5)), repeat=2):
        method.check(student, teacher, plan())


EVERY_OBJECTIVE = pytest.mark.parametrize(
    ("method", "terms"),
    [
        (AttentionDistillation(), {"map_loss": 6}),
        (AttentionDistillation(control="shuffled"), {"map_loss": 6}),
        (LogitDistillation(), {"logit_loss": 1}),
        (LogitDistillation(standardize=True), {"logit_loss": 1}),
        (DKD(), {"target_loss": 1, "non_target_loss": 1}),
        (TokenDistillation(), {"token_loss": 1}),
        (TokenDistillation("soft", attention_weight=0.5), {"token_loss": 1, "map_loss": 6}),
    ],
    ids=repr,
)


@EVERY_OBJECTIVE
@pytest.mark.parametrize("students", [(), (3,)], ids=["one", "stacked"])
def test_an_objective_has_a_value_for_each_image(method, terms, students, tiny):
    """From exactly what its taps ask for; a teacher's tensors lack the stack's axis."""
    student, teacher = tiny(distillation_token=True).build(), tiny(depth=6).build().requires_grad_(False)
    for parameter in student.parameters() if students else ():
        parameter.data = torch.stack([(1 + s) * parameter.data for s in range(*students)])
    objective = method.objective(student, teacher, plan(granularity=Encoder(), loss=KL()), facts())
    batch = Batch(images(), torch.tensor([3, 0, 4, 1]), torch.arange(4))
    outputs = student(batch.image, objective.student_taps), teacher(batch.image, objective.teacher_taps)

    values = objective(batch, *outputs)
    losses, curves = objective.transfer(values), objective.curve_values(values)

    assert {name: value.shape for name, value in values.items()} == {
        name: (*students, 4, count) for name, count in terms.items()
    }
    assert losses.shape == (*students, 4)
    assert losses.requires_grad
    assert curves.shape == (*students, sum(terms.values()))
    assert len(objective.curves) in (0, sum(terms.values()))
    # A lone image has no neighbour whose maps could take its own's place.
    for i in range(4) if objective.min_images == 1 else ():
        alone = [output.map(lambda tensor, i=i: of_image(tensor, i, students)) for output in outputs]
        lone_batch = batch.map(lambda part, i=i: part[i : i + 1])
        own = objective.transfer(objective(lone_batch, *alone))
        torch.testing.assert_close(losses[..., i : i + 1], own)


def of_image(tensor: torch.Tensor, image: int, students: tuple[int, ...]) -> torch.Tensor:
    """What belongs to one image, of a student of a stack or of a teacher [B, …]."""
    is_stacked = bool(students) and tensor.shape[: len(students)] == students
    return tensor.narrow(1 if is_stacked else 0, image, 1)


def test_an_unknown_resize_is_refused():
    with pytest.raises(ConfigError, match=r"^resize=nearest: choose bilinear or null$"):
        AttentionDistillation(resize="nearest")
