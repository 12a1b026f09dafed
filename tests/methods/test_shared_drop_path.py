"""A teacher under its student's stochastic depth leaves out the branches that the student leaves out."""

import pytest
import torch

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Encoder
from vitkd.methods.maps.losses import MSE
from vitkd.methods.together import Together
from vitkd.models import Model, ResNetConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule

SETTINGS = plan(granularity=Encoder(), loss=MSE())
SHARED = AttentionDistillation(share_drop_path=True)
BATCH = Batch(torch.randn(30, 3, 8, 8).double(), torch.arange(30) % 5, torch.arange(30))


@pytest.fixture
def models(tiny) -> tuple[Model, Model]:
    """A student and its teacher, with equal weights."""
    student = tiny(drop_path_rate=0.6).build().double()
    teacher = tiny(drop_path_rate=0.1).build().double()
    teacher.load_state_dict(student.state_dict())
    return student, teacher


def module_of(method: AttentionDistillation | Together, models: tuple[Model, Model]) -> DistillModule:
    objective = method.objective(*models, SETTINGS, facts())
    return DistillModule(
        models[0], AdamW(), Constant(), teacher=models[1], objective=objective, alpha=0.5
    ).train()


@pytest.mark.parametrize(
    "method",
    [SHARED, Together(["logit", "attention"], methods={"attention": SHARED, "logit": LogitDistillation()})],
    ids=["attention", "together"],
)
def test_a_teacher_with_the_students_weights_answers_as_the_student_does(method, models):
    module = module_of(method, models)

    losses = module.losses(BATCH)

    assert losses.transfer is not None
    assert losses.transfer.loss.item() == pytest.approx(0, abs=1e-12)
    assert not models[1].training


def test_a_whole_teacher_answers_in_another_way(models):
    losses = module_of(AttentionDistillation(), models).losses(BATCH)

    assert losses.transfer.loss.item() > 1e-6


def test_the_student_leaves_out_what_it_would_anyway(models):
    def draw(method: AttentionDistillation) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        losses = module_of(method, models).losses(BATCH)
        return losses.output.answer, torch.get_rng_state()

    for ours, theirs in zip(draw(SHARED), draw(AttentionDistillation()), strict=True):
        assert torch.equal(ours, theirs)


def test_both_are_whole_in_validation(models):
    module = module_of(SHARED, models).eval()

    shared = module.compare(BATCH, module.answer(BATCH, "val"))

    torch.testing.assert_close(shared.output.answer, models[1](BATCH.image).answer, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        ({"drop_path_rate": 0.0}, {}, r"student leaves out no branches; set student\.drop_path_rate"),
        ({}, {"depth": 6}, r"student has 3 blocks, its teacher 6; set student\.depth=6"),
        ({}, None, r"teacher=.* is no ViT of vitkd's own"),
    ],
)
def test_models_that_cannot_share_it_are_refused(tiny, student, teacher, says):
    of_teacher = ResNetConfig(8, 3, 5, stem="small") if teacher is None else tiny(**teacher)

    with pytest.raises(ConfigError, match=says):
        SHARED.check(tiny(**{"drop_path_rate": 0.1} | student), of_teacher, SETTINGS)


def test_the_teacher_needs_no_rate_of_its_own(tiny):
    SHARED.check(tiny(drop_path_rate=0.1), tiny(), SETTINGS)
