"""Whatever students learn from their teacher, in a stack they learn it as they would alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.stacked.test_architectures import randomised
from tests.train.stacked.test_module import assert_trains_as_alone, assert_validates_as_alone, batch
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.base import DataFacts, Method, Objective
from vitkd.methods.dkd import DKD
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Block
from vitkd.methods.maps.losses import KL, AttentionLoss
from vitkd.methods.relation import RelationDistillation
from vitkd.methods.together import Together
from vitkd.methods.token import TokenDistillation
from vitkd.methods.weighting import Constant as ConstantWeighting
from vitkd.models import Model, ResNetConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

OF_LOGITS: list[tuple[Method, float]] = [
    (LogitDistillation(temperature=2.0), 0.4),
    (LogitDistillation(temperature=4.0), 0.4),
    (LogitDistillation(temperature=4.0), 0.0),
    (LogitDistillation(temperature=2.0, standardize=True), 0.4),
    (DKD(), 0.4),
    (DKD(non_target_weight=2.0), 0.4),
    (TokenDistillation(), 0.5),
    (TokenDistillation(targets="soft", temperature=2.0), 0.7),
    (TokenDistillation(), 1.0),
    (LogitDistillation(), 1.0),
]
OF_MAPS: list[tuple[Method, float]] = [
    (AttentionDistillation(), 0.3),
    (AttentionDistillation(control="shuffled"), 0.3),
    (AttentionDistillation(control="uniform"), 0.3),
    (TokenDistillation(targets="soft", attention_weight=0.7), 0.2),
    (TokenDistillation(attention_weight=0.2), 0.2),
    (AttentionDistillation(), 1.0),
]
EACH = {"attention": AttentionDistillation(), "relation": RelationDistillation(), "dkd": DKD()}
OF_BOTH: list[tuple[Method, float]] = [
    (Together(["attention", "dkd"], [0.5, 2.0], EACH), 0.3),
    (Together(["relation", "attention", "dkd"], None, EACH), 0.3),
]
TEACHERS = ["a ViT", "a ViT with both tokens", "a network"]


@pytest.fixture
def members(tiny):
    """members(teacher) is that teacher's students, each as it would train alone."""

    def make(kind: str) -> list[DistillModule]:
        teacher: Model
        if kind == "a network":
            teacher = ResNetConfig(image_size=8, channels=3, num_classes=5, stem="small").build().double()
        else:
            teacher = randomised(tiny(depth=4, num_heads=2, distillation_token="both" in kind))
        methods = OF_LOGITS if kind == "a network" else OF_LOGITS + OF_MAPS + OF_BOTH
        smoothings = [0.1 * (s % 3) for s in range(len(methods))]
        return [
            alone(tiny, method, alpha, teacher, smoothing)
            for (method, alpha), smoothing in zip(methods, smoothings, strict=True)
        ]

    return make


def alone(
    tiny, method: Method, alpha: float, teacher: Model, smoothing: float, loss: AttentionLoss | None = None
) -> DistillModule:
    plan: Any = SimpleNamespace(
        granularity=Block(), loss=loss or KL(), alpha=alpha, optimizer=AdamW(), schedule=Constant(),
        label_smoothing=smoothing, method=method, weighting=ConstantWeighting(),
    )  # fmt: skip
    student = randomised(tiny(distillation_token=True))
    return build_module(plan, student, teacher, DataFacts(100, 5, lambda: torch.empty(0))).train()


@pytest.mark.parametrize("orders", [None, 3], ids=["one order", "three orders"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_losses_and_gradients_are_those_of_separate_runs(teacher, orders, members):
    modules = members(teacher)

    assert_trains_as_alone(modules, [s % (orders or 1) for s in range(len(modules))], batch(orders))


@torch.no_grad()
@pytest.mark.parametrize("teacher", TEACHERS)
def test_curves_are_those_of_separate_runs(teacher, members):
    assert_validates_as_alone(members(teacher))


def test_students_of_one_kind_share_a_group_and_no_others_do(members):
    groups = StackedModule(members("a ViT"), [0] * 18, seeds=range(18)).groups

    assert [(group.start, group.stop) for group in groups if group.stop - group.start > 1] == [(1, 3)]
    assert len(groups) == 17


def test_students_of_one_sum_share_a_group_whatever_the_temperatures_of_their_maps(tiny):
    """Which a part of a sum has as `method=attention` does."""
    teacher, method = randomised(tiny(depth=4, num_heads=2)), OF_BOTH[0][0]
    modules = [alone(tiny, method, 0.3, teacher, 0.0, KL(temperature=t)) for t in (0.7, 1.3)]

    (group,) = StackedModule(modules, [0, 0], seeds=[0, 1]).groups

    assert group.jobs == range(2)
    assert_trains_as_alone(modules, [0, 0], batch())


def test_students_of_other_weights_or_parts_share_none(tiny):
    teacher = randomised(tiny(depth=4, num_heads=2))
    methods = [
        *(method for method, _ in OF_BOTH),
        Together(["attention", "dkd"], [0.5, 1.0], EACH),
        Together(["attention", "dkd"], [0.5, 1.0], EACH | {"dkd": DKD(temperature=1.0)}),
    ]
    modules = [alone(tiny, method, 0.3, teacher, 0.0) for method in methods]

    assert len(StackedModule(modules, [0] * 4, seeds=range(4)).groups) == 4


def test_an_objective_without_a_stack_key_is_in_a_group_of_its_own():
    class Mine(Objective):
        def forward(self, batch, student, teacher):
            return {"mine": student.answer.mean(-1, keepdim=True)}

    one, other = Mine(), Mine()

    assert one.stack_key == one.stack_key
    assert one.stack_key != other.stack_key


@pytest.mark.parametrize(
    ("methods", "asked"),
    [
        ([AttentionDistillation()], False),
        ([AttentionDistillation(), LogitDistillation()], True),
        ([TokenDistillation()], True),
    ],
)
def test_logits_are_asked_for_where_some_student_learns_from_them(methods, asked, tiny):
    teacher = randomised(tiny())
    modules = [alone(tiny, method, 0.5, teacher, 0.0) for method in methods]
    stacked = StackedModule(modules, [0] * len(modules), seeds=range(len(modules))).train()

    assert (stacked.ask_teacher(batch().image, "train").logits is not None) is asked
    assert stacked.ask_teacher(batch().image, "val").logits is not None
