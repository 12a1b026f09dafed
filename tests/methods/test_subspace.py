"""`method=subspace` teaches each slice of a representation once; what is learned adds up to the teacher."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.stacked.test_module import assert_trains_as_alone
from tests.train.stacked.test_module import batch as stacked_batch
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.base import DataFacts
from vitkd.methods.maps.granularity import Block
from vitkd.methods.maps.losses import KL
from vitkd.methods.subspace import SubspaceDistillation
from vitkd.methods.weighting import Constant as ConstantWeighting
from vitkd.models import Merged, MergedConfig, Model, Output, ResNetConfig, Taps
from vitkd.optim import AdamW, Constant
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule

FACTS = DataFacts(8, 5, lambda: torch.empty(0))
REPRESENTATION = Taps(features=("pre_logits",), logits=False)
EXACT = {"atol": 1e-12, "rtol": 0}


class Settings:
    granularity, loss = Block(), KL()


def batch(count: int = 3) -> Batch:
    images = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    return Batch(images, torch.randint(5, (count,)), torch.arange(count))


@pytest.fixture
def teacher(tiny):
    return tiny(embed_dim=24).build().double().eval()


@pytest.fixture
def students(tiny, teacher):
    """Four students of the teacher's quarters, as they begin."""
    models = [tiny(representation_size=6).build().double().eval() for _ in range(4)]
    for index, model in enumerate(models):
        SubspaceDistillation(index).set_first_weights(model, teacher)
    return models


def objective_of(index, student, teacher):
    return SubspaceDistillation(index).objective(student, teacher, Settings(), FACTS)


def merged(students, **settings) -> Merged:
    return Merged(MergedConfig(8, 3, 5, runs=[], **settings), students)


def test_slices_are_disjoint_and_cover_the_representation(students, teacher):
    entries = torch.arange(24)

    slices = [objective_of(i, model, teacher).slice_of(entries) for i, model in enumerate(students)]

    assert [len(each) for each in slices] == [6, 6, 6, 6]
    assert torch.equal(torch.cat(slices), entries)


@pytest.mark.parametrize("index", range(4))
def test_the_loss_and_its_gradient_are_those_of_the_mean_squared_error(index, students, teacher):
    objective, seen = objective_of(index, students[index], teacher), batch()
    ours = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    theirs = teacher(seen.image, objective.teacher_taps)
    assert theirs.logits is None

    terms = objective(seen, Output(features={"pre_logits": ours}), theirs)
    objective.transfer(terms).mean().backward()

    difference = ours.detach() - theirs.features["pre_logits"].detach()[:, 6 * index : 6 * index + 6]
    torch.testing.assert_close(objective.transfer(terms), (difference**2).sum(-1) / 6, **EXACT)
    torch.testing.assert_close(ours.grad, 2 * difference / (6 * 3), **EXACT)


def test_students_that_reproduce_their_slices_are_merged_to_the_teacher(students, teacher):
    images = batch().image
    whole = teacher(images, REPRESENTATION).features["pre_logits"].detach()
    for index, model in enumerate(students):
        own = whole[:, 6 * index : 6 * index + 6]
        model.representation.forward = lambda _, own=own: own

    output = merged(students)(images, Taps(features=("pre_logits",)))

    torch.testing.assert_close(output.features["pre_logits"], whole, **EXACT)
    torch.testing.assert_close(output.logits, teacher(images).logits, **EXACT)


def test_merged_logits_are_one_linear_layer_of_all_representations(students, teacher):
    images = batch().image

    output = merged(students)(images, Taps(features=("pre_logits",)))

    side_by_side = torch.cat([model(images, REPRESENTATION).features["pre_logits"] for model in students], -1)
    torch.testing.assert_close(output.logits, teacher.head(side_by_side), **EXACT)


def test_one_student_may_learn_all_of_it(tiny, teacher):
    student = tiny(representation_size=24).build().double()

    SubspaceDistillation().set_first_weights(student, teacher)

    assert torch.equal(student.head.weight, teacher.head.weight)
    assert torch.equal(student.head.bias, teacher.head.bias)


def test_a_residual_network_may_teach(tiny):
    student, teacher = tiny(representation_size=128), ResNetConfig(8, 3, 5, stem="small")
    method = SubspaceDistillation(3)

    method.check(student, teacher, Settings())
    models = student.build().double().eval(), teacher.build().double().eval()
    method.set_first_weights(*models)

    weight = models[1].network.fc.weight
    assert torch.equal(models[0].head.weight, weight[:, 384:])


@pytest.mark.parametrize(
    ("index", "size", "line"),
    [
        (0, 7, "student.representation_size=7: .* 24 .* choose one of 1, 2, 3, 4, 6, 8, 12, 24"),
        (0, 48, "student.representation_size=48: does not divide"),
        (4, 6, "method.slice=4: .* has 4 slices of student.representation_size=6, counted from 0"),
    ],
)
def test_what_is_no_slice_is_refused(index, size, line, tiny):
    with pytest.raises(ConfigError, match=line):
        SubspaceDistillation(index).check(tiny(representation_size=size), tiny(embed_dim=24), Settings())


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_two_heads_are_no_last_layer(owner, tiny):
    models = {"student": tiny(), "teacher": tiny()} | {owner: tiny(distillation_token=True)}

    with pytest.raises(ConfigError, match=f"{owner}=.*needs a single linear layer"):
        SubspaceDistillation().check(models["student"], models["teacher"], Settings())


def test_a_negative_slice_is_refused():
    with pytest.raises(ConfigError, match="slice=-1: must be at least 0"):
        SubspaceDistillation(-1)


def module_of(index: int, student: Model, teacher: Model, alpha: float) -> DistillModule:
    plan: Any = SimpleNamespace(
        granularity=Block(), loss=KL(), alpha=alpha, optimizer=AdamW(), schedule=Constant(),
        label_smoothing=0.0, method=SubspaceDistillation(index), weighting=ConstantWeighting(),
    )  # fmt: skip
    return build_module(plan, student, teacher, FACTS).train()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_students_of_all_slices_train_as_one_stack(alpha, tiny, teacher):
    students = [tiny(representation_size=6).build().double() for _ in range(4)]
    modules = [module_of(index, student, teacher, alpha) for index, student in enumerate(students)]

    assert_trains_as_alone(modules, [0] * 4, stacked_batch())


def test_without_labels_and_decay_a_head_stays_the_teachers_last_layer(tiny, teacher):
    student = tiny(representation_size=6).build().double()
    module = module_of(2, student, teacher, alpha=0.0)
    optimizer = AdamW(lr=0.1, weight_decay=0.0).build(student.parameters())
    before = student.representation.weight.clone()

    for _ in range(3):
        optimizer.zero_grad()
        module.losses(batch()).total.backward()
        optimizer.step()

    assert torch.equal(student.head.weight, teacher.head.weight[:, 12:18])
    assert torch.equal(student.head.bias, teacher.head.bias / 4)
    assert not torch.equal(student.representation.weight, before)


def test_at_alpha_1_the_student_begins_as_it_does_alone(tiny, teacher):
    student = tiny(representation_size=6).build().double()
    before = student.head.weight.clone()

    module_of(0, student, teacher, alpha=1.0)

    assert torch.equal(student.head.weight, before)
