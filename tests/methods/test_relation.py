"""`method=relation` is the equation of its paper for any head counts, and refuses what cannot be compared."""

import math

import pytest
import torch

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.base import DataFacts
from vitkd.methods.maps.granularity import Block, Encoder
from vitkd.methods.maps.losses import KL
from vitkd.methods.relation import RELATIONS, RelationDistillation
from vitkd.models import ViT

FACTS = DataFacts(8, 5, lambda: torch.empty(0))


class Settings:
    loss = KL()

    def __init__(self, granularity=None):
        self.granularity = granularity or Block()


def batch(count: int = 3) -> Batch:
    images = torch.randn(count, 3, 8, 8, dtype=torch.float64)
    return Batch(images, torch.randint(5, (count,)), torch.arange(count))


def compared(method: RelationDistillation, student: ViT, teacher: ViT, settings: Settings, of: Batch):
    """The terms that the method's objective gives, and the transfer loss of each image."""
    objective = method.objective(student, teacher, settings, FACTS)
    with torch.no_grad():
        answer = teacher(of.image, objective.teacher_taps)
    terms = objective(of, student(of.image, objective.student_taps), answer)
    return terms["relation_loss"], objective.transfer(terms)


def reference(model: ViT, images: torch.Tensor, block: int, relation: str, heads: int) -> torch.Tensor:
    """R_ij of the paper by loops over images, heads and tokens, from the layer's own weights."""
    x = model.embed(images)
    for earlier in model.blocks[:block]:
        x, _ = earlier(x)
    attention = model.blocks[block].attention
    width = attention.num_heads * attention.head_dim
    projected = dict(zip("qkv", attention.qkv(attention.norm(x)).split(width, dim=-1), strict=True))
    # The layer's features are ordered head by head, so a relation head is a run of neighbours.
    size = width // heads
    relations = torch.zeros(len(images), heads, x.shape[1], x.shape[1], dtype=torch.float64)
    for image in range(len(images)):
        for head in range(heads):
            of_head = slice(head * size, (head + 1) * size)
            first, second = (projected[name][image, :, of_head] for name in relation)
            for token in range(x.shape[1]):
                scores = torch.stack([first[token] @ key / math.sqrt(size) for key in second])
                relations[image, head, token] = scores.exp() / scores.exp().sum()
    return relations


@pytest.mark.parametrize("relations", ["same", "all"])
@pytest.mark.parametrize("heads", [None, 1, 4])
def test_is_the_papers_equation(tiny, relations, heads):
    student = tiny(num_heads=2, head_dim=4).build().double()
    teacher = tiny(depth=5, num_heads=3, head_dim=8, embed_dim=16).build().double().eval()
    of = batch()
    settings = Settings(Block(blocks=[1, 2]))

    values, transfer = compared(RelationDistillation(relations, heads), student, teacher, settings, of)

    expected = []
    for ours, theirs in settings.granularity.block_pairs(3, 5):
        for relation in RELATIONS[relations]:
            p = reference(teacher, of.image, theirs, relation, heads or 2)
            q = reference(student, of.image, ours, relation, heads or 2)
            expected.append((p * (p.log() - q.log())).sum(-1).mean((1, 2)))
    assert len(RELATIONS[relations]) == {"same": 3, "all": 9}[relations]
    torch.testing.assert_close(values, torch.stack(expected, dim=-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(transfer, torch.stack(expected).mean(0), atol=1e-12, rtol=0)


def test_is_zero_and_flat_for_a_copy_of_the_teacher(tiny):
    teacher = tiny().build().double().eval()
    student = tiny().build().double().eval()
    student.load_state_dict(teacher.state_dict())

    values, transfer = compared(RelationDistillation("all"), student, teacher, Settings(Encoder()), batch())
    gradients = torch.autograd.grad(transfer.sum(), list(student.parameters()), allow_unused=True)

    assert values.abs().max() < 1e-12
    assert all(gradient is None or gradient.abs().max() < 1e-12 for gradient in gradients)


def test_reaches_queries_keys_and_values(tiny):
    student, teacher = tiny().build().double(), tiny(num_heads=4).build().double().eval()
    _, transfer = compared(RelationDistillation(relation_heads=2), student, teacher, Settings(), batch())

    (gradient,) = torch.autograd.grad(transfer.sum(), [student.blocks[-1].attention.qkv.weight])

    assert all(part.abs().sum() > 0 for part in gradient.chunk(3))
    assert teacher.blocks[-1].attention.qkv.weight.grad is None


@pytest.mark.parametrize("owner", ["student", "teacher"])
def test_a_distillation_token_of_one_is_left_out(tiny, owner):
    models = {"student": tiny().build().double(), "teacher": tiny().build().double().eval()}
    models[owner] = tiny(distillation_token=True).build().double().eval()

    values, _ = compared(RelationDistillation(), *models.values(), Settings(), batch())

    assert values.shape == (3, 3)
    assert values.isfinite().all()


def test_the_teacher_stops_after_the_last_block_asked_for(tiny):
    student, teacher = tiny().build().double(), tiny(depth=4).build().double().eval()
    settings, of = Settings(Block(blocks=[0], teacher_blocks=[1])), batch()
    expected, _ = compared(RelationDistillation(), student, teacher, settings, of)

    for module in (teacher.blocks[1].mlp, teacher.blocks[1].attention.out, teacher.blocks[2], teacher.head):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, torch.nan)

    assert torch.equal(compared(RelationDistillation(), student, teacher, settings, of)[0], expected)


@pytest.mark.parametrize(
    ("settings", "student", "teacher", "words"),
    [
        ({"relation_heads": 3}, {}, {}, ["relation_heads=3", "student", "8"]),
        ({"relation_heads": 8}, {}, {"num_heads": 3}, ["relation_heads=8", "teacher", "12"]),
        ({}, {"patch_size": 2}, {}, ["4×4", "2×2", "patch sizes"]),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny, settings, student, teacher, words):
    with pytest.raises(ConfigError) as error:
        RelationDistillation(**settings).check(tiny(**student), tiny(**teacher), Settings())

    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"relations": "some"}, {"relation_heads": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        RelationDistillation(**settings)
