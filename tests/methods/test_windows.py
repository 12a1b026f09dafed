"""Maps of models that attend within windows: what is compared, and what cannot be."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.attention import AttentionDistillation
from vitkd.methods.maps.granularity import Block, Encoder
from vitkd.methods.maps.losses import CE, KL, MSE
from vitkd.methods.relation import RelationDistillation
from vitkd.models import TimmConfig

# 8×8 patches in windows of 4×4, shifted in block 1; then 4×4 patches in one window.
SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
}
IMAGES = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = Batch(IMAGES, torch.zeros(2).long(), torch.arange(2))
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}


def swin(**options: Any) -> TimmConfig:
    return timm_config("swin_tiny_patch4_window7_224", SWIN | options)


def timm_config(name: str, options: dict[str, Any]) -> TimmConfig:
    return TimmConfig(16, 3, 5, [0.5] * 3, [0.5] * 3, name, options=options)


def both() -> tuple[Any, Any]:
    """A student, and a teacher of other heads, in float64."""
    student, teacher = swin().build(), swin(embed_dim=24, num_heads=[4, 4]).build()
    return student.double().eval(), teacher.double().eval().requires_grad_(False)


def weights_in_timm(model: Any) -> list[Tensor]:
    """What multiplies the values in each block of timm's own forward, [images · windows, H, N, N]."""
    weights: list[Tensor] = []
    blocks = [block for stage in model.network.layers for block in stage.blocks]
    hooks = [
        block.attn.attn_drop.register_forward_hook(lambda _, __, x: weights.append(x)) for block in blocks
    ]
    model(IMAGES)
    for hook in hooks:
        hook.remove()
    return weights


def test_cross_entropy_is_mini_swins_mean_over_windows_heads_and_tokens():
    """−Σ softmax(T) log softmax(S), of each token of each window (MiniViT, section 3.3)."""
    student, teacher = both()
    objective = AttentionDistillation().objective(
        student, teacher, plan(granularity=Encoder(), loss=CE()), facts()
    )
    expected = []
    for p, q in zip(weights_in_timm(teacher), weights_in_timm(student), strict=True):
        rows = -(p[:, : q.shape[1]] * q.clamp(min=1e-300).log()).sum(-1)
        expected.append(rows.unflatten(0, (2, -1)).mean((1, 3)))

    outputs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)
    values = objective(BATCH, *outputs)["map_loss"]

    torch.testing.assert_close(values, torch.cat(expected, dim=-1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("loss", [MSE(), MSE(center="row"), KL()], ids=repr)
def test_the_gradient_reaches_the_student_alone_and_no_masked_entry_counts(loss):
    student, teacher = both()
    objective = AttentionDistillation().objective(
        student, teacher, plan(granularity=Encoder(), loss=loss), facts()
    )
    ours, theirs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)
    for scores in ours.scores.values():
        scores.retain_grad()

    objective(BATCH, ours, theirs)["map_loss"].sum().backward()

    for layout, scores in zip(student.attention, ours.scores.values(), strict=True):
        allowed = torch.ones(scores.shape[-2:]).bool() if layout.mask is None else layout.mask
        assert scores.grad[..., allowed].abs().min() > 0
        assert not scores.grad[..., ~allowed].any()
    for stage in student.network.layers:
        for block in stage.blocks:
            assert block.attn.relative_position_bias_table.grad.any()
            assert block.attn.qkv.weight.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_hungarian_heads_are_found_on_windows():
    """The student is its teacher but for the order of heads in the first block."""
    order = (2, 0, 3, 1)
    _, teacher = both()
    student = deepcopy(teacher)
    attention = student.network.layers[0].blocks[0].attn
    attention.relative_position_bias_table.copy_(attention.relative_position_bias_table[:, order])
    for parameter in (attention.qkv.weight, attention.qkv.bias):
        parameter.copy_(parameter.unflatten(0, (3, 4, -1))[:, order].flatten(0, 2))
    matched = plan(granularity=Block(blocks=[0], head_map="hungarian"), loss=KL())

    (pair,) = AttentionDistillation().objective(student, teacher, matched, facts(lambda: IMAGES)).pairs

    assert pair.teacher_heads == tuple((head,) for head in order)


def test_scores_with_a_bias_are_not_made_of_queries_and_keys():
    config = swin(img_size=32)
    objective = AttentionDistillation().objective(config.build(), config.build(), plan(), facts())

    assert config.attention_layouts()[0].tokens > 128
    assert not objective.student_taps.factors
    assert objective.student_taps.scores == (2,)


@pytest.mark.parametrize(
    ("student", "teacher", "granularity", "says"),
    [
        (
            swin(window_size=2),
            swin(),
            Encoder(),
            "windows of 2×2 patches are not those of 4×4.*equal patches",
        ),
        (swin(img_size=32), swin(), Encoder(), "16×16 patches are not 8×8.*method=logit"),
        (
            swin(),
            swin(depths=[4, 2]),
            Encoder(),
            "student block 0 .* block 1, as only one of the two shifts.* teacher block 0 or 2 by granularity",
        ),
        (
            swin(),
            timm_config("vit_tiny_patch16_224", VIT | {"patch_size": 2}),
            Encoder(),
            "windows of 4×4 patches are not those of 8×8",
        ),
        (
            timm_config("vit_tiny_patch16_224", VIT | {"patch_size": 2}),
            swin(num_heads=[3, 2], embed_dim=12),
            Block(blocks=[0], teacher_blocks=[0]),
            "windows of 8×8 patches are not those of 4×4",
        ),
    ],
)
def test_windows_that_are_not_the_same_are_one_line(student, teacher, granularity, says):
    for resize in (None, "bilinear"):
        with pytest.raises(ConfigError, match=rf"^[^\n]*{says}[^\n]*$"):
            AttentionDistillation(resize=resize).check(student, teacher, plan(granularity=granularity))


def test_relations_within_windows_are_one_line():
    with pytest.raises(ConfigError, match=r"^method=relation[^\n]*windows[^\n]*method=attention[^\n]*$"):
        RelationDistillation().check(swin(), swin(), plan(granularity=Encoder()))
    RelationDistillation().check(swin(), swin(), plan())


@pytest.mark.parametrize("swap", [False, True])
def test_a_block_of_one_window_is_compared_with_a_vits_patches(swap):
    models = [swin(num_heads=[2, 2]), timm_config("vit_tiny_patch16_224", VIT | {"num_heads": 2})]
    student, teacher = (each.build().double() for each in (models[::-1] if swap else models))
    AttentionDistillation().check(student.config, teacher.config, plan())
    objective = AttentionDistillation().objective(student, teacher, plan(loss=KL()), facts())

    outputs = student(IMAGES, objective.student_taps), teacher(IMAGES, objective.teacher_taps)

    assert objective(BATCH, *outputs)["map_loss"].shape == (2, 2)
