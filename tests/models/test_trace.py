"""`ViT.trace` returns what the forward pass uses, in the graph, and computes what that computes."""

import pytest
import torch

from vitkd.models import Taps, ViT

VARIANTS = {
    "bare": {},
    "qkv-bias": {"qkv_bias": True, "patch_norm": False},
    "spt-lsa": {"tokenizer": "spt", "attention": "lsa"},
    "distillation-token": {"distillation_token": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def model(tiny, request) -> ViT:
    model = tiny(depth=4, dropout=0.3, emb_dropout=0.3, **request.param).build().double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("log_temperature"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@torch.no_grad()
def test_logits_equal_the_forward_passs(model, images):
    assert_equal(model.trace(images).logits, model(images).logits)


@torch.no_grad()
def test_weights_are_the_recorded_scores_softmax(model, images):
    scores = model(images, Taps(scores=(0, 1, 2, 3))).scores

    weights = model.trace(images).weights

    assert len(weights) == 4
    for i in range(4):
        allowed = model.attention[i].mask
        left = scores[i] if allowed is None else scores[i].where(allowed, -torch.inf)
        assert_equal(weights[i], left.softmax(-1))


@torch.no_grad()
def test_tokens_are_those_after_each_block(model, images):
    trace = model.trace(images)

    x = model.embed(images)
    for block, tokens in zip(model.blocks, trace.tokens, strict=True):
        x, _ = block(x)
        assert_equal(tokens, x)
    logits = model.head(model.norm(x[:, 0]))
    if model.distillation_token is not None:
        logits = (logits + model.distillation_head(model.norm(x[:, 1]))) / 2
    assert_equal(trace.logits, logits)


def test_weights_are_in_the_graph_of_the_logits(model, images):
    trace = model.trace(images)

    gradients = torch.autograd.grad(trace.logits[:, 2].sum(), trace.weights)

    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_in_training_the_weights_are_those_left_by_dropout(model, images):
    """The very tensors that multiplied the values: dropped entries are zero, the others scaled up."""
    weights = model.train().trace(images).weights[0]

    assert 0.1 < (weights == 0).double().mean() < 0.5
    assert (weights.sum(-1) - 1).abs().max() > 0.01


@torch.no_grad()
def test_bf16_attention_is_softmaxed_in_float32(tiny):
    model = tiny().build().bfloat16().eval()
    images = torch.randn(3, 3, 8, 8).bfloat16()
    scores = model(images, Taps(scores=(0,), logits=False)).scores[0]

    weights = model.trace(images).weights[0]

    assert scores.dtype == torch.float32
    assert torch.equal(weights, scores.softmax(-1).bfloat16())
