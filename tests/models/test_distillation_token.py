"""A ViT with a distillation token is timm's DeiT under copied weights, and else what it is without one."""

import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled

from tests.models.test_vit_oracles import LAYER_NORM, convolution, plain, randomised
from vitkd.models import Taps, ViT, ViTConfig, count_parameters, load_model, save_model

EXACT = {"atol": 1e-12, "rtol": 1e-12}
OWN = {"distillation_token", "distillation_head.weight", "distillation_head.bias"}


@pytest.fixture
def model(tiny) -> ViT:
    return randomised(plain(tiny, mlp_dim=24, distillation_token=True), torch.float64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, dtype=torch.float64)


def timm_counterpart(ours: ViT) -> VisionTransformerDistilled:
    c = ours.config
    theirs = VisionTransformerDistilled(
        img_size=c.image_size, patch_size=c.patch_size, in_chans=c.channels, num_classes=c.num_classes,
        embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads, mlp_ratio=c.mlp_dim / c.embed_dim,
        qkv_bias=True, norm_layer=LAYER_NORM,
    ).double()  # fmt: skip
    renamed = {
        "cls_token": ours.cls_token,
        "dist_token": ours.distillation_token,
        "pos_embed": ours.positions,
        "patch_embed.proj.weight": convolution(ours),
        "patch_embed.proj.bias": ours.tokenizer.projection.bias,
    }
    outer = {"norm": "norm", "head": "head", "distillation_head": "head_dist"}
    inner = {
        "attention.norm": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj",
        "mlp.norm": "norm2", "mlp.expand": "mlp.fc1", "mlp.contract": "mlp.fc2",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for mine, their in outer.items():
            renamed[f"{their}.{kind}"] = ours.get_parameter(f"{mine}.{kind}")
        for i in range(c.depth):
            for mine, their in inner.items():
                renamed[f"blocks.{i}.{their}.{kind}"] = ours.get_parameter(f"blocks.{i}.{mine}.{kind}")
    theirs.load_state_dict(renamed)
    return theirs.eval()


@torch.no_grad()
def test_the_answer_equals_timms_in_eval_mode(model, images):
    torch.testing.assert_close(model(images).logits, timm_counterpart(model)(images), **EXACT)


def test_both_heads_and_all_gradients_equal_timms_in_distilled_training(model, images):
    theirs = timm_counterpart(model).train()
    theirs.set_distilled_training(True)
    weights = torch.randn(2, 4, 5, dtype=torch.float64)

    heads = model.train()(images).heads
    their_heads = theirs(images)
    for both in (heads.values(), their_heads):
        sum((logits * weight).sum() for logits, weight in zip(both, weights, strict=True)).backward()

    assert isinstance(their_heads, tuple)
    torch.testing.assert_close(heads["class_token"], their_heads[0], **EXACT)
    torch.testing.assert_close(heads["distillation_token"], their_heads[1], **EXACT)
    pairs = [("distillation_token", "dist_token"), ("cls_token", "cls_token"), ("positions", "pos_embed")]
    pairs += [("head.weight", "head.weight"), ("distillation_head.weight", "head_dist.weight")]
    for mine, their in pairs:
        expected = theirs.get_parameter(their).grad
        assert expected.any()
        torch.testing.assert_close(model.get_parameter(mine).grad, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("train", [True, False])
def test_the_answer_is_the_heads_mean_in_both_modes(model, images, train):
    output = model.train(train)(images)

    class_token, distillation_token = output.heads["class_token"], output.heads["distillation_token"]
    torch.testing.assert_close(output.logits, (class_token + distillation_token) / 2, **EXACT)
    assert (class_token - distillation_token).abs().max() > 0.1


@torch.no_grad()
def test_the_token_stands_behind_the_class_token(model, images):
    tokens = model.embed(images)

    assert tokens.shape == (4, 6, 12)
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0] + model.positions[0, 0], **EXACT)
    torch.testing.assert_close(tokens[0, 1], model.distillation_token[0, 0] + model.positions[0, 1], **EXACT)
    torch.testing.assert_close(tokens[:, 2:], model.tokenizer(images) + model.positions[:, 2:], **EXACT)


@torch.no_grad()
def test_the_record_and_the_trace_have_its_row_and_column(model, images):
    output, trace = model(images, Taps(scores=(0, 2))), model.trace(images)

    torch.testing.assert_close(trace.logits, output.logits, **EXACT)
    assert [weights.shape for weights in trace.weights] == [(4, 3, 6, 6)] * 3
    assert [tokens.shape for tokens in trace.tokens] == [(4, 6, 12)] * 3
    alone = model(images, Taps(scores=(0, 2), logits=False)).scores
    for i in (0, 2):
        assert output.scores[i].shape == (4, 3, 6, 6)
        torch.testing.assert_close(alone[i], output.scores[i], **EXACT)
        torch.testing.assert_close(output.scores[i].softmax(-1), trace.weights[i], **EXACT)


def test_each_head_learns_from_its_own_logits(model, images):
    heads = model(images).heads

    heads["distillation_token"].sum().backward()

    assert model.head.weight.grad is None
    assert model.distillation_head.weight.grad.any()
    assert model.cls_token.grad.any(), "the tokens look at each other"


def test_without_it_there_is_one_head_and_no_trace_of_another(tiny, images):
    with_one, without = tiny(distillation_token=True).build(), tiny().build().double()

    assert without(images).heads == {}
    assert {name for name, _ in with_one.named_parameters()} - set(without.state_dict()) == OWN
    assert set(without.state_dict()) < set(with_one.state_dict())
    # The token, its position, and its head's map and bias.
    assert count_parameters(with_one) - count_parameters(without) == 12 + 12 + (5 * 12 + 5)


@pytest.mark.parametrize(("token", "prefix", "tokens"), [(False, 1, 5), (True, 2, 6)])
def test_the_configuration_counts_it(tiny, token, prefix, tokens):
    config: ViTConfig = tiny(distillation_token=token)

    assert (config.prefix, config.tokens, config.grid) == (prefix, tokens, 2)
    assert config.build().positions.shape == (1, tokens, 12)


def test_both_heads_survive_a_file(model, images, tmp_path):
    model = model.float()
    save_model(model, tmp_path / "student.safetensors")

    loaded = load_model(tmp_path)

    assert loaded.config == model.config
    assert set(loaded.state_dict()) > OWN
    with torch.no_grad():
        before, after = model(images.float()).heads, loaded(images.float()).heads
    assert after.keys() == before.keys() == {"class_token", "distillation_token"}
    assert all(torch.equal(after[token], before[token]) for token in before)


def test_a_new_head_starts_as_the_class_tokens_head_does(tiny):
    """But not as a copy of it."""
    model = tiny(embed_dim=64, num_classes=50, distillation_token=True).build()

    bound = 1 / math.sqrt(64)
    for layer in (model.head, model.distillation_head):
        assert bound * 0.95 < layer.weight.abs().max() <= bound
    assert not torch.equal(model.head.weight, model.distillation_head.weight)
