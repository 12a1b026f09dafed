"""Several methods at once: their losses and gradients add up, and each has its curves."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.base import Method
from vitkd.methods.crd import CRDDistillation
from vitkd.methods.dkd import DKD
from vitkd.methods.logit import LogitDistillation
from vitkd.methods.maps.granularity import Encoder
from vitkd.methods.maps.losses import KL
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.relation import RelationDistillation
from vitkd.methods.together import Together, WeightedSum
from vitkd.models import Model, ResNetConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule

METHODS: dict[str, Method] = {
    "attention": AttentionDistillation(),
    "relation": RelationDistillation(),
    "logit": LogitDistillation(temperature=2.0),
    "dkd": DKD(),
    "crd": CRDDistillation(bank="queue", negatives=8, width=16),
}
SETTINGS = plan(granularity=Encoder(), loss=KL())
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def models(tiny) -> tuple[Model, Model]:
    """A student and its teacher; equal for every call of one test."""
    torch.manual_seed(0)
    return tiny().build().double(), tiny(depth=6).build().double()


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randn(4, 3, 8, 8).double(), torch.tensor([3, 0, 4, 1]), torch.arange(4))


def module_of(method: Method, models: tuple[Model, Model]) -> DistillModule:
    student, teacher = models
    torch.manual_seed(1)  # of projections
    images = facts()._replace(labels=lambda: (torch.arange(4), torch.tensor([3, 0, 4, 1])))
    objective = method.objective(student, teacher, SETTINGS, images).double()
    return DistillModule(
        student, AdamW(), Constant(), teacher=teacher, objective=objective, alpha=0.4
    ).train()


def gradients(loss: Tensor, module: DistillModule) -> list[Tensor]:
    """Of all of the student's weights, 0 where the loss does not reach one."""
    weights = [*module.model.parameters()]
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@pytest.mark.parametrize("parts", [*combinations(METHODS, 2), tuple(METHODS)], ids="+".join)
def test_losses_and_gradients_of_the_parts_add_up(parts, models, batch):
    weights = [0.5, 2.0, 0.25, 3.0, 1.5][: len(parts)]
    together = module_of(Together([*parts], weights, METHODS), models)
    alone = [module_of(METHODS[name], models) for name in parts]

    losses, of_parts = together.losses(batch), [module.losses(batch).transfer.loss for module in alone]

    expected = sum(weight * loss for weight, loss in zip(weights, of_parts, strict=True))
    torch.testing.assert_close(losses.transfer.loss, expected, **EXACT)
    torch.testing.assert_close(losses.total, 0.4 * losses.class_loss + 0.6 * expected, **EXACT)
    each = [gradients(loss, module) for loss, module in zip(of_parts, alone, strict=True)]
    assert all(any(gradient.any() for gradient in of_part) for of_part in each)
    for own, *terms in zip(gradients(losses.transfer.loss, together), *each, strict=True):
        total = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        torch.testing.assert_close(own, total, **EXACT)


def test_every_part_has_its_curves_by_name(models, batch):
    together = module_of(Together([*METHODS], [0.5, 2.0, 0.25, 0.0, 1.0], METHODS), models)
    alone = {name: module_of(method, models) for name, method in METHODS.items()}

    found = curves_of(together, batch)

    for name, module in alone.items():
        own = curves_of(module, batch)
        assert found[f"part_loss/{name}"] == pytest.approx(own.pop("transfer_loss"), rel=1e-12)
        assert {curve: found[curve] for curve in module.objective.curves} == pytest.approx(
            {curve: own[curve] for curve in module.objective.curves}, rel=1e-12
        )


def curves_of(module: DistillModule, batch: Batch) -> dict[str, float]:
    measured = module.losses(batch).measures(batch.label)
    (curves,) = module.curves({name: value.reshape(-1).tolist() for name, value in measured.items()})
    return curves


def test_streamed_maps_and_relations_of_one_block_share_what_the_model_returns(models, batch):
    student, teacher = models
    attention, relation = (
        METHODS[name].objective(*models, SETTINGS, facts()) for name in ("attention", "relation")
    )
    streaming = AttentionObjective(attention.pairs, attention.loss, attention.alignments, tokens=10**6)
    both = WeightedSum({"attention": streaming, "relation": relation}, [1.0, 1.0])

    terms = both(batch, student(batch.image, both.student_taps), teacher(batch.image, both.teacher_taps))

    alone = [
        each.transfer(
            each(batch, student(batch.image, each.student_taps), teacher(batch.image, each.teacher_taps))
        )
        for each in (attention, relation)
    ]
    assert streaming.streams
    torch.testing.assert_close(both.transfer(terms), sum(alone), **EXACT)


def test_pairs_of_maps_are_those_of_the_parts(models):
    objective = Together(["logit", "attention"], None, METHODS).objective(*models, SETTINGS, facts())

    assert objective.weights == (1.0, 1.0)
    assert objective.pairs == METHODS["attention"].objective(*models, SETTINGS, facts()).pairs


@pytest.mark.parametrize(
    ("parts", "ignored"),
    [
        (["attention", "logit"], {"method.relation", "method.dkd", "method.crd"}),
        (["logit", "dkd"], {"granularity", "loss", "method.attention", "method.relation", "method.crd"}),
        (
            ["relation", "dkd"],
            {"loss", "granularity.heads", "granularity.head_map"}
            | {"method.attention", "method.logit", "method.crd"},
        ),
    ],
)
def test_what_no_part_reads_has_no_effect(parts, ignored):
    assert {*Together(parts, None, METHODS).ignores} == ignored


@pytest.mark.parametrize(
    ("parts", "weights", "words"),
    [
        (["attention", "logits"], None, r"parts=\[attention,logits\]: .*logits.*did you mean logit\?"),
        ([], None, r"parts=\[\]: name two or more of attention, relation, logit, dkd"),
        (["logit"], None, r"parts=\[logit\]: name two or more of attention, relation, logit, dkd"),
        (["logit", "logit"], None, r"parts=\[logit,logit\]: .*each once"),
        (
            ["attention", "logit"],
            [1.0],
            r"weights=\[1.0\]: .*one number for each of parts=\[attention,logit\]",
        ),
        (["attention", "logit"], [], r"weights=\[\]: .*one number for each"),
        (["attention", "logit"], [1.0, -1.0], r"weights=\[1.0, -1.0\]: .*0 or more"),
    ],
)
def test_wrong_settings_are_one_line(parts, weights, words):
    with pytest.raises(ConfigError, match=rf"^{words}[^\n]*$"):
        Together(parts, weights, METHODS)


def test_a_parts_advice_names_its_own_setting(tiny):
    student, teacher = tiny(patch_size=4), tiny(patch_size=2)

    with pytest.raises(ConfigError, match=r"method\.attention\.resize=bilinear"):
        Together(["logit", "attention"], None, METHODS).check(student, teacher, SETTINGS)


def test_a_part_that_needs_maps_refuses_a_model_without(tiny):
    with pytest.raises(ConfigError, match=r"^teacher=resnet18.*no attention maps"):
        Together(["logit", "attention"], None, METHODS).check(tiny(), ResNetConfig(8, 3, 5), SETTINGS)

    Together(["logit", "dkd"], None, METHODS).check(tiny(), ResNetConfig(8, 3, 5), SETTINGS)


def test_a_neighbours_maps_need_a_neighbour():
    shuffled = METHODS | {"attention": AttentionDistillation(control="shuffled")}

    assert Together(["logit", "attention"], None, shuffled).min_batch_size == 2
    assert Together(["logit", "dkd"], None, shuffled).min_batch_size == 1
