"""Attention scores are returned data: for the blocks asked for, at least cost, leaving the logits alone.

`ViT.trace` returns what the forward pass uses, in the graph, and computes what that computes.
"""

from collections.abc import Callable

import pytest
import torch

from vitkd.models import Taps, ViT

VARIANTS = {
    "bare": {},
    "qkv-bias": {"qkv_bias": True, "patch_norm": False},
    "spt-lsa": {"tokenizer": "spt", "attention": "lsa", "qkv_bias": True},
    "distillation-token": {"distillation_token": True},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def make(tiny, request) -> Callable[..., ViT]:
    """A model of each variant, LSA with temperatures of its own; keyword arguments change it."""

    def build(**changes: object) -> ViT:
        model = tiny(depth=4, **request.param, **changes).build().double()
        for name, parameter in model.named_parameters():
            if name.endswith("log_temperature"):
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    return build


@pytest.fixture
def model(make) -> ViT:
    return make()


@pytest.fixture
def dropping(make) -> ViT:
    """In eval mode."""
    return make(dropout=0.3, emb_dropout=0.3).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("blocks", [[], [0], [3], [1, 2], [0, 1, 2, 3]])
def test_exactly_the_blocks_asked_for_are_recorded(model, images, blocks):
    scores = model(images, Taps(scores=tuple(blocks))).scores

    T = model.config.tokens
    assert sorted(scores) == blocks
    assert all(s.shape == (3, 2, T, T) and s.requires_grad for s in scores.values())


@pytest.mark.parametrize("train", [True, False])
def test_recording_leaves_logits_and_gradients_as_fused_attention_has_them(model, images, train):
    model.train(train)
    results = []
    for blocks in ((), (0, 1, 2, 3)):
        logits = model(images, Taps(scores=blocks)).logits
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits, *gradients))

    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_recorded_scores_do_not_depend_on_what_else_is_recorded(model, images):
    everything = model(images, Taps(scores=(0, 1, 2, 3))).scores
    for i in range(4):
        alone = model(images, Taps(scores=(i,))).scores[i]
        torch.testing.assert_close(alone, everything[i], atol=1e-12, rtol=0)


@pytest.mark.parametrize("blocks", [[0], [2], [0, 2], [2, 0], [1, 2, 3]])
def test_scores_alone_equal_the_forward_passs(model, images, blocks):
    recorded = model(images, Taps(scores=tuple(blocks))).scores
    output = model(images, Taps(scores=tuple(blocks), logits=False))
    alone = output.scores

    assert output.logits is None
    assert alone.keys() == recorded.keys()
    for i in blocks:
        torch.testing.assert_close(alone[i], recorded[i], atol=1e-12, rtol=0)


@torch.no_grad()
def test_scores_alone_touch_nothing_past_the_last_blocks_keys(model, images):
    taps = Taps(scores=(0, 2), logits=False)
    expected = model(images, taps).scores
    last = model.blocks[2]
    inner = model.config.num_heads * model.config.head_dim

    for module in (last.mlp, last.attention.out, model.blocks[3], model.norm, model.head):
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    for parameter in last.attention.qkv.parameters():
        parameter[2 * inner :] = torch.nan

    assert model(images).logits.isnan().all()
    for i, scores in model(images, taps).scores.items():
        assert torch.equal(scores, expected[i])


def test_scores_are_queries_times_keys_over_the_temperature(model, images):
    """By loops, for one image and one head. The temperature is √head_dim, but for what LSA learned."""
    attention, x = model.blocks[0].attention, model.embed(images)
    projected = attention.qkv(attention.norm(x))[1]
    head, d, inner = 1, 4, 8
    scores = model(images, Taps(scores=(0,), logits=False)).scores[0][1, head]
    learned = attention.log_temperature[head].exp().item() if model.config.attention == "lsa" else 1.0

    for query in range(model.config.tokens):
        for key in range(model.config.tokens):
            q = projected[query, head * d : (head + 1) * d]
            k = projected[key, inner + head * d : inner + (head + 1) * d]
            assert scores[query, key].item() == pytest.approx((q @ k).item() / (learned * d**0.5), abs=1e-12)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_traces_logits_equal_the_forward_passs(dropping, images):
    assert_equal(dropping.trace(images).logits, dropping(images).logits)


@torch.no_grad()
def test_a_traces_weights_are_the_recorded_scores_softmax(dropping, images):
    scores = dropping(images, Taps(scores=(0, 1, 2, 3))).scores

    weights = dropping.trace(images).weights

    assert len(weights) == 4
    for i in range(4):
        allowed = dropping.attention[i].mask
        left = scores[i] if allowed is None else scores[i].where(allowed, -torch.inf)
        assert_equal(weights[i], left.softmax(-1))


@torch.no_grad()
def test_a_traces_tokens_are_those_after_each_block(dropping, images):
    trace = dropping.trace(images)

    x = dropping.embed(images)
    for block, tokens in zip(dropping.blocks, trace.tokens, strict=True):
        x, _ = block(x)
        assert_equal(tokens, x)
    logits = dropping.head(dropping.norm(x[:, 0]))
    if dropping.distillation_token is not None:
        logits = (logits + dropping.distillation_head(dropping.norm(x[:, 1]))) / 2
    assert_equal(trace.logits, logits)


def test_a_traces_weights_are_in_the_graph_of_the_logits(dropping, images):
    trace = dropping.trace(images)

    gradients = torch.autograd.grad(trace.logits[:, 2].sum(), trace.weights)

    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_in_training_the_weights_are_those_left_by_dropout(dropping, images):
    """The very tensors that multiplied the values: dropped entries are zero, the others scaled up."""
    weights = dropping.train().trace(images).weights[0]

    mask = dropping.attention[0].mask
    allowed = weights if mask is None else weights[..., mask]
    assert 0.1 < (allowed == 0).double().mean() < 0.5
    assert (weights.sum(-1) - 1).abs().max() > 0.01


@torch.no_grad()
def test_bf16_attention_is_softmaxed_in_float32(tiny):
    model = tiny().build().bfloat16().eval()
    images = torch.randn(3, 3, 8, 8).bfloat16()
    scores = model(images, Taps(scores=(0,), logits=False)).scores[0]

    weights = model.trace(images).weights[0]

    assert scores.dtype == torch.float32
    assert torch.equal(weights, scores.softmax(-1).bfloat16())
