"""A stack of students computes what each of them computes alone."""

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch

from tests.train.objectives import compare_maps
from vitkd.data import Batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.methods.maps.losses import CE, JS, KL, MSE, AttentionLoss, ReverseKL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.models import ViT
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

EXACT = {"atol": 1e-12, "rtol": 1e-12}
IMAGES, CLASSES = 6, 5

GRANULARITIES: list[Granularity] = [
    Head(),
    Head(heads=[[1, 3], [0, 2]]),
    Block(head_map="group_mean"),
    Encoder(),
]
LOSSES: list[AttentionLoss] = [
    MSE(),
    MSE(center="row"),
    CE(),
    KL(temperature=0.7),
    KL(temperature=1.3),
    ReverseKL(),
    JS(reduction="sum"),
]
GRID = [*product(GRANULARITIES, LOSSES, (0.0, 0.3)), (Head(), MSE(), 1.0), (Encoder(), KL(), 1.0)]


@pytest.fixture
def teacher(tiny) -> ViT:
    return tiny(depth=6, num_heads=4).build().double()


@pytest.fixture
def alone(tiny, teacher) -> Callable[..., DistillModule]:
    """alone(granularity, loss, alpha) is a student that trains by itself."""

    def build(granularity: Granularity, loss: AttentionLoss, alpha: float, **settings: float):
        student = tiny(num_heads=2).build().double()
        objective = compare_maps(student, teacher, granularity, loss)
        return DistillModule(
            student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=alpha, **settings
        ).train()

    return build


def test_temperatures_go_where_the_scores_are_and_stay_there(alone):
    modules = [alone(Encoder(), KL(temperature=t), 0.5) for t in (0.7, 1.3)]
    (group,) = StackedModule(modules, [0, 0], seeds=[0, 1]).groups
    elsewhere = torch.ones(2, 1, 1, 3, 3, device="meta")

    assert group.objective.loss.softened(elsewhere).shape == elsewhere.shape

    assert group.objective.loss.temperature.is_meta


def test_students_of_several_temperatures_share_all_else_of_their_comparison(alone):
    modules = [alone(Encoder(), KL(temperature=t), 0.5) for t in (0.7, 1.3)]
    for module in modules:
        pairs, loss = module.objective.pairs, module.objective.loss
        module.objective = AttentionObjective(pairs, loss, tokens=1000, control="uniform")

    (group,) = StackedModule(modules, [0, 0], seeds=[0, 1]).groups

    assert group.objective.streams
    assert group.objective.control == "uniform"
    assert [module.objective.loss.temperature for module in modules] == [0.7, 1.3], "theirs are as before"


def test_settings_are_not_rounded_as_bf16_weights_are(alone):
    modules = [alone(Encoder(), KL(), alpha, label_smoothing=0.3) for alpha in (0.1, 0.7)]
    stacked = StackedModule(modules, [0, 0], seeds=[0, 1]).train().to(torch.bfloat16)
    given = batch()

    losses = stacked.losses(given._replace(image=given.image.bfloat16()))

    weights, transfer = torch.tensor([0.1, 0.7]), losses.transfer.loss
    expected = weights * losses.class_loss + torch.tensor([0.9, 0.3]) * transfer
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=0)
    assert stacked.smoothings.tolist() == pytest.approx([0.3, 0.3], rel=1e-6)


def batch(orders: int | None = None) -> Batch:
    many = [] if orders is None else [orders]
    return Batch(
        torch.randn(*many, IMAGES, 3, 8, 8, dtype=torch.float64),
        torch.randint(CLASSES, (*many, IMAGES)),
        torch.randint(100, (*many, IMAGES)),
    )


def mixed(given: Batch) -> Batch:
    """With a target, as if its images were mixed."""
    return given._replace(target=torch.rand(*given.label.shape, CLASSES).softmax(-1))


def of_order(batch: Batch, order: int) -> Batch:
    return batch.map(lambda part: part[order])


@pytest.mark.parametrize("orders", [None, 3], ids=["one-order", "three-orders"])
def test_losses_and_gradients_are_those_of_separate_runs(alone, orders):
    modules = [alone(*cell, label_smoothing=0.1 * (s % 3)) for s, cell in enumerate(GRID)]
    order = [s % (orders or 1) for s in range(len(GRID))]

    assert_trains_as_alone(modules, order, batch(orders))
    assert all(p.grad is not None for module in modules for p in module.model.parameters())


@pytest.mark.parametrize("orders", [None, 3], ids=["one-order", "three-orders"])
def test_so_they_are_on_mixed_images(alone, orders):
    cells = GRID[::9]
    modules = [alone(*cell, label_smoothing=0.1 * (s % 3)) for s, cell in enumerate(cells)]

    assert_trains_as_alone(modules, [s % (orders or 1) for s in range(len(cells))], mixed(batch(orders)))


@pytest.mark.parametrize("orders", [None, 3], ids=["one-order", "three-orders"])
def test_followers_have_losses_of_their_own_and_gradients_of_the_student_that_is_trained(alone, orders):
    # Those that train, and what follows them; at alpha = 1 a follower may have any comparison.
    trained = [(Block(), CE(), 0.3), (Block(), CE(), 0.7), (Head(), MSE(), 0.3), (Encoder(), JS(), 1.0)]
    following = {1: (Block(), KL(), 0.7), 0: (Block(), KL(), 0.3), 3: (Block(), KL(), 1.0)}
    modules = [alone(*cell) for cell in (*trained, *following.values())]
    for module, leader in zip(modules[len(trained) :], following, strict=True):
        module.model = modules[leader].model
    students = [*range(len(trained)), *following]
    order = [student % (orders or 1) for student in students]

    assert_trains_as_alone(modules, order, batch(orders), students)


def test_validation_of_followers_is_their_own(alone):
    modules = [alone(Encoder(), MSE(), 1.0), alone(Block(), CE(), 1.0), alone(Block(), KL(), 1.0)]
    for module in modules:
        module.model = modules[0].model

    assert_validates_as_alone(modules, students=[0, 0, 0])


def assert_validates_as_alone(
    modules: Sequence[DistillModule], students: Sequence[int] | None = None
) -> None:
    """The stack of `modules` has the curves of each one's own validation."""
    stacked = StackedModule(modules, [0] * len(modules), range(len(modules)), students=students).eval()
    given = batch()

    stacked.validation_step(given, 0)
    together = stacked.curves(stacked.val_meter.means())

    for found, module in zip(together, modules, strict=True):
        module.eval().validation_step(given, 0)
        (expected,) = module.curves(module.val_meter.means())
        assert found == pytest.approx(expected, rel=1e-9)


def assert_trains_as_alone(
    modules: Sequence[DistillModule],
    order: Sequence[int],
    given: Batch,
    students: Sequence[int] | None = None,
) -> None:
    """One step of the stack of `modules` has the losses, logits and gradients of each one's own."""
    stacked = StackedModule(modules, order, seeds=range(len(modules)), students=students).train()

    together = stacked.losses(given)
    together.total.sum().backward()

    for s, module in enumerate(modules):
        module.model.zero_grad()
        expected = module.losses(given if given.label.ndim == 1 else of_order(given, order[s]))
        expected.total.backward()
        torch.testing.assert_close(together.total[s], expected.total, **EXACT)
        torch.testing.assert_close(together.class_loss[s], expected.class_loss, **EXACT)
        torch.testing.assert_close(together.output.answer[s], expected.output.answer, **EXACT)
        for name, parameter in module.model.named_parameters():
            gradient = stacked.model.get_parameter(name).grad[students[s] if students else s]
            # Where alone there is none at all, in a stack others have one.
            if parameter.grad is None:
                assert not gradient.any(), name
            else:
                torch.testing.assert_close(gradient, parameter.grad, **EXACT)
