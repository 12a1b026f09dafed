"""The inner and the outer attention of a TNT: what is compared, and what cannot be."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from tests.models.beside_timm import roughen
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.methods.maps.losses import CE, KL, MSE
from vitkd.methods.relation import RelationDistillation
from vitkd.methods.token import TokenDistillation
from vitkd.models import ResNetConfig, Taps, TimmConfig, ViTConfig

# 2×2 patches of 4×4 words.
TNT = {
    "img_size": 16,
    "patch_size": 8,
    "first_stride": 2,
    "embed_dim": 12,
    "inner_dim": 8,
    "depth": 2,
    "num_heads_outer": 3,
    "num_heads_inner": 2,
}
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.zeros(2).long(), torch.arange(2))
PARTS = ("outer", "inner")
ATTENTIONS = {"outer": "attn_out", "inner": "attn_in"}


def timm_config(name: str, options: dict[str, Any]) -> TimmConfig:
    return TimmConfig(16, 3, 5, [0.5] * 3, [0.5] * 3, name, options=options)


def tnt(**options: Any) -> TimmConfig:
    return timm_config("tnt_s_patch16_224", TNT | options)


def vit(**options: Any) -> TimmConfig:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return timm_config("vit_tiny_patch16_224", sizes | options)


def prepared(*configs: TimmConfig) -> list[Any]:
    """Models in float64 whose maps are not nearly uniform; the last, a teacher, is frozen."""
    torch.manual_seed(0)
    models = [config.build().double().eval() for config in configs]
    for model in models:
        roughen(model, 0.2)
    models[-1].requires_grad_(False)
    return models


def inputs_of_softmax(model: Any, part: str) -> list[Tensor]:
    """log of what multiplies the values in each block of timm's own forward, [images · windows, H, N, N]."""
    weights: list[Tensor] = []
    drops = [getattr(block, ATTENTIONS[part]).attn_drop for block in model.network.blocks]
    hooks = [drop.register_forward_hook(lambda _, __, x: weights.append(x)) for drop in drops]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    return [each.log() for each in weights]


@pytest.mark.parametrize("part", PARTS)
def test_kl_is_the_mean_over_heads_tokens_and_patches(part):
    """Σ p (log p − log q) of every row, with p and q as timm's own code computes them."""
    student, teacher = prepared(tnt(), tnt(embed_dim=24, inner_dim=16, depth=4))
    settings = plan(granularity=Encoder(part=part), loss=KL())
    objective = AttentionDistillation().objective(student, teacher, settings, facts())
    teachers = [inputs_of_softmax(teacher, part)[block] for block in (1, 3)]
    expected = []
    for log_p, log_q in zip(teachers, inputs_of_softmax(student, part), strict=True):
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
        expected.append(rows.unflatten(0, (2, -1)).mean((1, 3)))

    outputs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)
    terms = objective(BATCH, *outputs)

    torch.testing.assert_close(terms["map_loss"], torch.cat(expected, dim=-1), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(objective.transfer(terms), torch.cat(expected, dim=-1).mean(-1))
    assert terms["map_loss"].min() > 1e-4


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", [MSE(center="row"), CE()], ids=repr)
def test_the_gradient_reaches_this_attention_of_the_student_alone(part, loss):
    student, teacher = prepared(tnt(), tnt(embed_dim=24))
    settings = plan(granularity=Block(part=part), loss=loss)
    objective = AttentionDistillation().objective(student, teacher, settings, facts())

    outputs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)
    objective(BATCH, *outputs)["map_loss"].sum().backward()

    first, last = student.network.blocks
    assert getattr(last, ATTENTIONS[part]).qk.weight.grad.any()
    # The inner attention feeds the outer one of its block, which feeds no words.
    assert last.attn_in.qk.weight.grad.any()
    assert first.attn_in.qk.weight.grad.any()
    assert (last.attn_out.qk.weight.grad is not None) == (part == "outer")
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_hungarian_heads_are_found_among_words():
    """The student is its teacher but for the order of the inner heads."""
    (teacher,) = prepared(tnt(num_heads_inner=4))
    (student,) = prepared(tnt(num_heads_inner=4))
    order = (2, 0, 3, 1)
    weight = student.network.blocks[1].attn_in.qk.weight
    weight.copy_(weight.unflatten(0, (2, 4, -1))[:, order].flatten(0, 2))
    matched = plan(granularity=Block(head_map="hungarian", part="inner"), loss=KL())

    (pair,) = AttentionDistillation().objective(student, teacher, matched, facts(lambda: IMAGES)).pairs

    assert pair.teacher_heads == tuple((head,) for head in order)
    assert pair.part == "inner"


@pytest.mark.parametrize("swap", [False, True])
def test_the_outer_attention_is_compared_with_a_vits(swap):
    configs = [vit(), tnt()]
    student, teacher = prepared(*(configs[::-1] if swap else configs))
    settings = plan(granularity=Encoder(), loss=KL())
    AttentionDistillation().check(student.config, teacher.config, settings)
    objective = AttentionDistillation().objective(student, teacher, settings, facts())

    outputs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)
    values = objective(BATCH, *outputs)["map_loss"]

    assert [scores.shape for scores in outputs[0].scores.values()] == [(2, 3, 5, 5)] * 2
    log_q, log_p = (torch.stack([*each.scores.values()], dim=1).log_softmax(-1) for each in outputs)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).flatten(1)
    torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        (tnt(), vit(), "granularity.part=inner: teacher=vit_tiny.* one attention a block; set part=outer"),
        (vit(), tnt(), "granularity.part=inner: student=vit_tiny.* one attention a block; set part=outer"),
        (
            ViTConfig(16, 3, 5, patch_size=8, depth=2),
            tnt(),
            "granularity.part=inner: student=.* one attention a block; set part=outer, or choose a TNT",
        ),
        (tnt(), ResNetConfig(16, 3, 5), "teacher=resnet18.* has no attention maps"),
        (
            tnt(),
            tnt(first_stride=4),
            "8×8 words are not 4×4; choose models with equal words and patches, or method=logit",
        ),
        (
            tnt(first_stride=1),
            tnt(patch_size=16, first_stride=1),
            "patches of 8×8 words are not those of 16×16; choose models with equal words and patches",
        ),
        (tnt(num_heads_inner=4), tnt(), "num_heads=4 is more than .*num_heads=2"),
    ],
)
@pytest.mark.parametrize("resize", [None, "bilinear"])
def test_inner_maps_that_cannot_be_compared_are_one_line(student, teacher, says, resize):
    settings = plan(granularity=Encoder(part="inner"))

    with pytest.raises(ConfigError, match=rf"^[^\n]*{says}[^\n]*$"):
        AttentionDistillation(resize=resize).check(student, teacher, settings)


def test_outer_maps_of_other_patches_are_one_line():
    with pytest.raises(ConfigError, match=r"^the student's 2×2 token grid is not the teacher's 4×4[^\n]*$"):
        AttentionDistillation().check(tnt(), tnt(patch_size=4), plan())
    AttentionDistillation(resize="bilinear").check(tnt(), tnt(patch_size=4), plan())
    AttentionDistillation().check(tnt(), tnt(first_stride=4), plan())


def test_other_methods_say_what_they_do_not_compare():
    inner = plan(granularity=Block(part="inner"))

    with pytest.raises(ConfigError, match=r"^granularity\.part=inner: method=relation[^\n]*part=outer"):
        RelationDistillation().check(tnt(), tnt(), inner)
    RelationDistillation().check(tnt(), tnt(embed_dim=24), plan())
    with_token = timm_config("deit_tiny_distilled_patch16_224", {"img_size": 16, "patch_size": 8, "depth": 2})
    with pytest.raises(ConfigError, match=r"^granularity\.part=inner: student=deit_tiny[^\n]*$"):
        TokenDistillation(attention_weight=1.0).check(with_token, tnt(), inner)


@pytest.mark.parametrize("granularity", [Block, Encoder, Head])
def test_a_part_that_there_is_not_is_one_line(granularity: type[Granularity]):
    with pytest.raises(ConfigError, match=r"^part=middle: choose outer or inner$"):
        granularity(part="middle")


def test_taps_of_several_parts_are_no_union():
    inner, logits = Taps(scores=(0,), part="inner"), Taps()

    assert Taps.union([logits, inner]) == inner
    assert Taps.union([]).part == "outer"
    with pytest.raises(AssertionError, match="several parts: inner, outer"):
        Taps.union([inner, Taps(scores=(0,))])
