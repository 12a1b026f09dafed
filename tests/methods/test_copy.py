"""`method=copy` attends exactly where the teacher does, by labels alone, and takes its teacher along."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.methods.test_methods import facts, plan
from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.copy import CopyDistillation
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.models import (
    Model,
    ResNetConfig,
    Taps,
    ViT,
    build_from_header,
    count_parameters,
    describe,
    load_model,
    save_model,
)
from vitkd.models.copying import CopyingModel
from vitkd.train.build import build_module
from vitkd.train.module import DistillModule


def settings(granularity: Granularity | None = None) -> SimpleNamespace:
    return plan(method=CopyDistillation(), granularity=granularity or Encoder())


def module_of(student: Model, teacher: Model, granularity: Granularity | None = None) -> DistillModule:
    return build_module(settings(granularity), student, teacher, facts()).double()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def teachers_weights(teacher: ViT, pictures: Tensor, block: int) -> Tensor:
    """softmax(QKᵀ/√d) [B, H, T, T] from the layer's own weights."""
    x = teacher.embed(pictures)
    for earlier in teacher.blocks[:block]:
        x, _ = earlier(x)
    attention = teacher.blocks[block].attention
    qkv = attention.qkv(attention.norm(x)).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / attention.head_dim**0.5
    allowed = attention.allowed(scores.shape[-1])
    if allowed is not None:
        scores = (scores * attention.inverse_temperature()[:, None, None]).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1)


def attending_by(student: ViT, pictures: Tensor, weights: dict[int, Tensor]) -> Tensor:
    """The student's logits where the blocks in `weights` multiply their values with these."""
    x = student.embed(pictures)
    for i, block in enumerate(student.blocks):
        if i not in weights:
            x, _ = block(x)
            continue
        attention = block.attention
        *_, v = attention.qkv(attention.norm(x)).chunk(3, dim=-1)
        v = v.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
        x = x + attention.out((weights[i] @ v).transpose(1, 2).flatten(-2))
        x = x + block.mlp(x)
    return student.head(student.norm(x[:, 0]))


@pytest.mark.parametrize("attention", ["msa", "lsa"])
@pytest.mark.parametrize(
    ("granularity", "pairs"),
    [
        (Encoder(), {0: 1, 1: 3, 2: 5}),
        (Block(), {2: 5}),
        (Block(blocks=[0, 1], teacher_blocks=[4, 4]), {0: 4, 1: 4}),
        (Encoder(head_map="group_mean"), {0: 1, 1: 3, 2: 5}),
    ],
)
def test_multiplies_its_values_with_the_teachers_weights(tiny, attention, granularity, pairs):
    student = tiny().build()
    teacher = tiny(depth=6, num_heads=4, head_dim=8, attention=attention).build()
    module, pictures = module_of(student, teacher, granularity), images()

    output = module.model(pictures)

    heads = 4 // 2 if getattr(granularity, "head_map", "") == "group_mean" else 1
    weights = {}
    for ours, theirs in pairs.items():
        of_teacher = teachers_weights(teacher, pictures, theirs)
        weights[ours] = of_teacher.unflatten(1, (-1, heads)).mean(2)[:, :2]
    torch.testing.assert_close(output.logits, attending_by(student, pictures, weights), atol=1e-12, rtol=0)
    trace = module.model.trace(pictures)
    for block, expected in weights.items():
        torch.testing.assert_close(trace.weights[block], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(trace.logits, output.logits, atol=1e-12, rtol=0)


def test_a_copy_of_the_teacher_is_the_teacher(tiny):
    teacher = tiny().build()
    model = module_of(copy.deepcopy(teacher), teacher).model.eval()
    pictures = images()

    torch.testing.assert_close(model(pictures).logits, teacher(pictures).logits, atol=1e-12, rtol=0)


def test_learns_by_the_class_loss_alone_whatever_alpha(tiny):
    student, teacher = tiny().build(), tiny().build()
    module = module_of(student, teacher, Block())
    batch = Batch(images(), torch.tensor([0, 1, 2]), torch.arange(3))

    losses = module.losses(batch)
    losses.total.backward()

    assert module.alpha == 1
    assert losses.transfer is None
    assert torch.equal(losses.total, losses.class_loss)
    assert all(p.grad is None for p in teacher.parameters())
    queries_and_keys, values = student.blocks[2].attention.qkv.weight.grad.split([16, 8])
    assert not queries_and_keys.any()
    assert values.any()
    assert student.blocks[0].attention.qkv.weight.grad[:16].any()


def test_the_teacher_stays_in_eval_mode(tiny):
    model = module_of(tiny(dropout=0.5).build(), tiny(dropout=0.5, emb_dropout=0.5).build()).model.train()
    pictures = images()

    assert model.student.training
    first, second = (model.copied(pictures) for _ in range(2))

    assert all(torch.equal(first[block], second[block]) for block in (0, 1, 2))
    assert not torch.equal(model(pictures).logits, model(pictures).logits)


def test_gives_the_scores_that_it_attends_by(tiny):
    model = module_of(tiny().build(), tiny(num_heads=4).build(), Block()).model.eval()
    pictures = images()

    output = model(pictures, Taps(scores=(1, 2), features=("block0",), logits=False))

    assert output.logits is None
    assert torch.equal(output.scores[2], model.copied(pictures)[2])
    assert output.scores[1].shape == (3, 2, 5, 5)
    assert {*output.features} == {"block0"}


@pytest.mark.parametrize("granularity", [Encoder(), Block(head_map="group_mean")])
def test_its_file_holds_its_teacher(tiny, tmp_path, granularity):
    model = build_module(
        settings(granularity), tiny().build(), tiny(depth=6, num_heads=4).build(), facts()
    ).model.eval()
    pictures = images().float()

    save_model(model, tmp_path / "student.safetensors")
    loaded = load_model(tmp_path)

    assert isinstance(loaded, CopyingModel)
    assert torch.equal(loaded(pictures).logits, model(pictures).logits)
    assert count_parameters(loaded) == count_parameters(model.student) + count_parameters(model.teacher)
    assert not any(p.requires_grad for p in loaded.teacher.parameters())
    assert str(loaded.config) == str(model.config)


def test_a_header_of_other_teachers_is_refused(tiny, tmp_path):
    header = json.loads(json.dumps(describe(module_of(tiny().build(), tiny().build()).model)))
    header["model"]["teacher"]["config"] = "os.system"

    with pytest.raises(ConfigError, match="does not describe"):
        build_from_header(header, tmp_path / "student.safetensors")


@pytest.mark.parametrize(
    ("student", "teacher", "granularity", "named"),
    [
        ({}, {}, Head(), ["granularity", "1 of the 2 heads", "granularity=block"]),
        ({}, {}, Block(head_map="hungarian"), ["hungarian", "index or group_mean"]),
        ({}, {"num_heads": 4}, Block(head_map="squeeze"), ["squeeze", "index or group_mean"]),
        ({"attention": "lsa"}, {}, Block(), ["student=", "student.attention=msa"]),
        ({}, {"patch_size": 2}, Block(), ["2×2", "4×4", "equal patch sizes"]),
        ({"distillation_token": True}, {}, Block(), ["2 tokens", "distillation_token"]),
        ({"num_heads": 4}, {"num_heads": 2}, Block(), ["student.num_heads=4"]),
    ],
)
def test_what_cannot_be_copied_is_one_line(tiny, student, teacher, granularity, named):
    with pytest.raises(ConfigError) as error:
        CopyDistillation().check(tiny(**student), tiny(**teacher), settings(granularity))

    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in named)


def test_needs_maps(tiny):
    resnet = ResNetConfig(8, 3, 5)
    for models in ((resnet, tiny()), (tiny(), resnet)):
        with pytest.raises(ConfigError, match="no attention maps"):
            CopyDistillation().check(*models, settings())
