"""Locality self-attention is vit-pytorch's under copied weights, and by every way through the layer the same.

Our temperatures are one a head, and logarithms of τ/√head_dim; vit-pytorch's is one a layer, log(1/τ).
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from vit_pytorch.vit_for_small_dataset import LSA
from vit_pytorch.vit_for_small_dataset import ViT as VitPytorch

from tests.models.test_spt import vit_pytorch_counterpart as tokenizer_counterpart
from vitkd.models import Taps, ViT
from vitkd.models.dropout import Dropout
from vitkd.models.layers import Attention
from vitkd.models.output import BlockTaps
from vitkd.models.small_data import LocalityAttention, shifted_diagonally

DIM, HEADS, HEAD_DIM = 12, 3, 4
EXACT = {"atol": 1e-12, "rtol": 1e-12}
# Every way from tokens to tokens.
WAYS: dict[str, Callable[[Attention, Tensor], Tensor]] = {
    "fused": lambda attention, x: attention(x)[0],
    "recorded": lambda attention, x: attention(x, BlockTaps(scores=True))[0],
    "factors": lambda attention, x: attention(x, BlockTaps(factors=True))[0],
    "trace": lambda attention, x: attention(x, BlockTaps(weights=True))[0],
}


def randomised(dropout: float = 0.0, qkv_bias: bool = False) -> LocalityAttention:
    attention = LocalityAttention(DIM, HEADS, HEAD_DIM, dropout, qkv_bias).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def vit_pytorch_counterpart(ours: LocalityAttention) -> LSA:
    """Of an attention whose heads share one temperature."""
    (log_temperature,) = ours.log_temperature.detach().unique()
    theirs = LSA(ours.norm.normalized_shape[0], ours.num_heads, ours.head_dim).double()
    theirs.norm.load_state_dict(ours.norm.state_dict())
    theirs.to_qkv.load_state_dict(ours.qkv.state_dict())
    theirs.to_out[0].load_state_dict(ours.out.state_dict())
    nn.init.constant_(theirs.temperature, -log_temperature.item() - math.log(ours.head_dim) / 2)
    return theirs


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("log_temperature", [0.0, 0.7, -0.4])
def test_tokens_and_gradients_equal_vit_pytorchs(way, log_temperature, x):
    ours = randomised()
    nn.init.constant_(ours.log_temperature, log_temperature)
    theirs = vit_pytorch_counterpart(ours)
    weights = torch.randn(2, 6, DIM, dtype=torch.float64)

    our_tokens, their_tokens = way(ours, x), theirs(x)
    (our_x,) = torch.autograd.grad((our_tokens * weights).sum(), x, retain_graph=True)
    (their_x,) = torch.autograd.grad((their_tokens * weights).sum(), x, retain_graph=True)
    (our_tokens * weights).sum().backward()
    (their_tokens * weights).sum().backward()

    torch.testing.assert_close(our_tokens, their_tokens, **EXACT)
    torch.testing.assert_close(our_x, their_x, **EXACT)
    torch.testing.assert_close(ours.qkv.weight.grad, theirs.to_qkv.weight.grad, **EXACT)
    assert theirs.temperature.grad.abs() > 0.01
    torch.testing.assert_close(ours.log_temperature.grad.sum(), -theirs.temperature.grad, **EXACT)


def test_a_new_one_starts_at_vit_pytorchs_temperature():
    ours = LocalityAttention(DIM, HEADS, HEAD_DIM, 0.0, False)

    start = LSA(DIM, HEADS, HEAD_DIM).temperature.exp().item()

    x = torch.randn(2, 6, DIM)
    q, k, _ = ours.qkv(ours.norm(x)).unflatten(-1, (3, HEADS, HEAD_DIM)).transpose(1, 3).unbind(2)
    torch.testing.assert_close(ours.tapped(x, BlockTaps(factors=True)).qkv.scores(), q @ k.mT * start)


@torch.no_grad()
def test_logits_equal_vit_pytorchs_vit_for_small_datasets(tiny):
    """With shifted patches, of which it gets our shifts."""
    config = tiny(image_size=12, tokenizer="spt", attention="lsa", num_heads=3)
    ours = config.build().double().eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    for block, log_temperature in zip(ours.blocks, (0.5, -0.2, 0.0), strict=True):
        nn.init.constant_(block.attention.log_temperature, log_temperature)
    theirs = VitPytorch(
        image_size=12, patch_size=4, num_classes=5, dim=12, depth=3, heads=3, mlp_dim=16, dim_head=4
    ).double()
    theirs.to_patch_embedding = tokenizer_counterpart(ours.tokenizer).to_patch_tokens
    theirs.pos_embedding.copy_(ours.positions)
    theirs.cls_token.copy_(ours.cls_token)
    theirs.mlp_head[0].load_state_dict(ours.norm.state_dict())
    theirs.mlp_head[1].load_state_dict(ours.head.state_dict())
    for layer, block in zip(theirs.transformer.layers, ours.blocks, strict=True):
        layer[0] = vit_pytorch_counterpart(block.attention)
        for i, own in enumerate((block.mlp.norm, block.mlp.expand, None, None, block.mlp.contract)):
            if own is not None:
                layer[1].net[i].load_state_dict(own.state_dict())
    images = torch.randn(4, 3, 12, 12, dtype=torch.float64)

    torch.testing.assert_close(ours(images).logits, theirs(shifted_diagonally(images, 2)), **EXACT)


@torch.no_grad()
def test_weights_at_the_start_are_plain_attentions_over_the_other_tokens(x):
    plain = Attention(DIM, HEADS, HEAD_DIM, 0.0, qkv_bias=True).double()
    local = LocalityAttention(DIM, HEADS, HEAD_DIM, 0.0, qkv_bias=True).double()
    local.load_state_dict(plain.state_dict(), strict=False)
    scores = plain.tapped(x, BlockTaps(factors=True)).qkv.scores()

    weights = local(x, BlockTaps(weights=True))[1].weights

    for token in range(6):
        others = [other for other in range(6) if other != token]
        torch.testing.assert_close(
            weights[..., token, others], scores[..., token, others].softmax(-1), **EXACT
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_diagonal_of_the_weights_is_exactly_0_and_rows_sum_to_1(dtype, x):
    weights = randomised().to(dtype)(x.to(dtype), BlockTaps(weights=True))[1].weights

    assert weights.shape == (2, HEADS, 6, 6)
    assert weights.dtype == dtype
    assert not weights.diagonal(dim1=-2, dim2=-1).any()
    error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    assert (weights.sum(-1) - 1).abs().max() < error


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("masks", ["none", "ours", "pytorchs"])
def test_no_token_sees_itself_whatever_the_way(way, masks, monkeypatch):
    """Where Q and K are constant, a token tells of itself by its value alone."""
    attention = randomised(dropout=0.0 if masks == "none" else 0.3, qkv_bias=True)
    nn.init.zeros_(attention.qkv.weight[: 2 * HEADS * HEAD_DIM].detach())
    if masks == "pytorchs":
        monkeypatch.setattr(Dropout, "has_own_masks", lambda self, x: False)
    assert attention.dropout.has_own_masks(torch.zeros(1)) == (masks == "ours")
    x = torch.randn(1, 5, DIM, dtype=torch.float64)

    slope = torch.autograd.functional.jacobian(lambda x: way(attention, x), x)[0, :, :, 0].abs().amax((1, 3))

    assert not slope.diagonal().any()
    assert slope.count_nonzero() == 5 * 4 if masks == "none" else 5 < slope.count_nonzero() <= 5 * 4


@pytest.mark.parametrize("train", [True, False])
def test_every_way_gives_the_same_tokens_and_gradients(train, x):
    """In training under the same masks: on the CPU they are ours, whatever is recorded."""
    attention = randomised(dropout=0.3, qkv_bias=True).train(train)
    results = []
    for way in WAYS.values():
        torch.manual_seed(7)
        tokens = way(attention, x)
        results.append((tokens, *torch.autograd.grad(tokens.square().sum(), [x, *attention.parameters()])))

    for result in results[1:]:
        # The fused kernel's rounding is its own.
        torch.testing.assert_close(result, results[0], atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("factors", [False, True])
def test_recorded_scores_are_all_pairs_over_the_heads_temperature(factors, x):
    """By loops; what is masked is recorded as any other pair."""
    attention = randomised()
    projected = attention.qkv(attention.norm(x))

    tapped = attention(x, BlockTaps(scores=not factors, factors=factors))[1]
    scores = tapped.qkv.scores() if factors else tapped.scores

    q, k, _ = projected.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    for head in range(HEADS):
        temperature = HEAD_DIM**0.5 * attention.log_temperature[head].exp().item()
        for query in range(6):
            for key in range(6):
                expected = (q[1, query, head] @ k[1, key, head]).item() / temperature
                assert scores[1, head, query, key].item() == pytest.approx(expected, abs=1e-12)


@torch.no_grad()
def test_a_heads_temperature_is_its_own(x):
    attention = randomised()
    before = attention.tapped(x, BlockTaps(scores=True)).scores
    tokens = attention(x)[0]

    attention.log_temperature[1] += 0.5

    after = attention.tapped(x, BlockTaps(scores=True)).scores
    torch.testing.assert_close(after[:, 1], before[:, 1] / math.exp(0.5), **EXACT)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (attention(x)[0] - tokens).abs().max() > 1e-3


def randomised_vit(tiny, **changes: object) -> ViT:
    """Everything at its start but the temperatures."""
    model = tiny(attention="lsa", **changes).build().double()
    for block in model.blocks:
        nn.init.normal_(block.attention.log_temperature, std=0.5)
    return model


@torch.no_grad()
@pytest.mark.parametrize("factors", [False, True])
def test_scores_alone_equal_the_forward_passs_at_other_temperatures(tiny, factors):
    model = randomised_vit(tiny)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)

    taps = Taps(factors=(0, 2)) if factors else Taps(scores=(0, 2))
    outputs = model(images, taps), model(images, taps._replace(logits=False))

    recorded, alone = (output.qkv if factors else output.scores for output in outputs)
    assert alone.keys() == recorded.keys() == {0, 2}
    for i in (0, 2):
        torch.testing.assert_close(alone[i], recorded[i], **EXACT)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_of_two_tokens_each_sees_the_other(way):
    """An image of one patch: the smallest row that a mask may leave something of."""
    attention = randomised()
    x = torch.randn(3, 2, DIM, dtype=torch.float64, requires_grad=True)

    tokens = way(attention, x)
    gradients = torch.autograd.grad(tokens.square().sum(), [x, *attention.parameters()])

    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(attention(x, BlockTaps(weights=True))[1].weights, swap.expand(3, HEADS, 2, 2))
    inner = HEADS * HEAD_DIM
    values = attention.qkv(attention.norm(x))[..., 2 * inner :].flip(-2)
    torch.testing.assert_close(tokens, attention.out(values), **EXACT)
    assert all(torch.isfinite(slope).all() for slope in gradients)


@pytest.mark.parametrize("blocks", [(), (0, 1, 2)])
def test_bf16_autocast_records_float32_and_comes_close(tiny, blocks):
    model = randomised_vit(tiny).float().train()
    images = torch.randn(3, 3, 8, 8)
    expected = model(images, Taps(scores=(0, 1, 2)))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, Taps(scores=blocks))
        output.logits.sum().backward()

    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.05, rtol=0.05)
    assert tuple(sorted(output.scores)) == blocks
    for i in blocks:
        assert output.scores[i].dtype == torch.float32
        torch.testing.assert_close(output.scores[i], expected.scores[i], atol=0.05, rtol=0.05)
    for block in model.blocks:
        assert torch.isfinite(block.attention.log_temperature.grad).all()
        assert block.attention.log_temperature.grad.any()


def test_the_mask_is_what_the_configuration_says(tiny):
    assert all(layout.mask is None for layout in tiny().attention_layouts())
    layouts = tiny(attention="lsa", distillation_token=True).attention_layouts()
    assert len(layouts) == 3
    for layout in layouts:
        assert layout.mask.tolist() == [[query != key for key in range(6)] for query in range(6)]
