"""The kernels by Triton's interpreter, against plain PyTorch in float64; `test_kernels.py` runs this file."""

import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.models import Taps, ViT, ViTConfig, kernels
from vitkd.models.dropout import Masks, drop_by
from vitkd.models.kernels.attention import attend
from vitkd.models.kernels.philox import dropped
from vitkd.models.kernels.pointwise import finished, normed
from vitkd.train.stacked.dropout import KeyedStreams

SEEDS = [5, 2**40 + 5]
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def masks(place: int = 1, step: int = 0, seeds: list[int] = SEEDS) -> Masks:
    return Masks(torch.tensor(seeds), torch.tensor(step), place, 0.3)


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit numbers from a 64-bit key and a 128-bit counter."""
    k0, k1, (c0, c1, c2, c3) = key % 2**32, key >> 32, counter
    for _ in range(10):
        high, low = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (low >> 32) ^ c1 ^ k0, low % 2**32, (high >> 32) ^ c3 ^ k1, high % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_masks_are_philoxs():
    x = torch.randn(2, 7, 301, requires_grad=True)

    y = dropped(x, masks())
    y.sum().backward()

    torch.testing.assert_close(x.grad * x, y)
    values = x.grad[x.grad != 0]
    torch.testing.assert_close(values, torch.full_like(values, 1 / 0.7))
    share = (y == 0).float().mean((1, 2))
    assert ((share - 0.3).abs() < 5 * (0.21 / 2107) ** 0.5).all(), share
    drawn = [number for four in range(527) for number in philox(SEEDS[1], (four, 1, 0, 0))][:2107]
    assert np.array_equal(np.array(drawn) >= round(0.3 * 2**32), (y[1] != 0).flatten().numpy())
    torch.testing.assert_close(dropped(x.double(), masks()), y.double(), rtol=1e-6, atol=0)


def test_masks_are_a_function_of_seed_step_and_place():
    x = torch.randn(2, 7, 301)
    y = dropped(x, masks())

    others = {
        "as before": masks(),
        "another place": masks(place=2),
        "another step": masks(step=1),
        "other seeds": masks(seeds=[6, 7]),
    }
    assert [name for name, other in others.items() if torch.equal(dropped(x, other), y)] == ["as before"]
    assert torch.equal(dropped(x[1:], masks(seeds=SEEDS[1:]))[0], y[1]), "whoever else is in the stack"


HEADS, WIDTH, IMAGES = 2, 12, 2


def plain_attention(
    qkv: Tensor, inverse: Tensor | None, allowed: Tensor | None, masks: Masks | None
) -> tuple[Tensor, Tensor]:
    """The merged values and the scores of the fused projection `qkv` [S, B, T, 3·H·head_dim]."""
    q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH)).transpose(-4, -2).unbind(-3)
    scores = q @ k.mT / math.sqrt(WIDTH)
    if inverse is not None:
        scores = scores * inverse[:, None, :, None, None]
    weights = (scores if allowed is None else scores.masked_fill(~allowed, -math.inf)).softmax(-1)
    if masks is not None:
        weights = dropped(weights, masks)
    return (weights @ v).transpose(-3, -2).flatten(-2), scores


@pytest.mark.parametrize(
    ("tokens", "has_temperature", "is_masked", "drops"),
    [(17, False, False, False), (17, True, True, True), (5, True, False, True), (32, False, True, False)],
)
def test_attention(tokens, has_temperature, is_masked, drops):
    qkv = torch.randn(2, IMAGES, tokens, 3 * HEADS * WIDTH, requires_grad=True)
    inverse = (torch.rand(2, HEADS) + 0.5).requires_grad_() if has_temperature else None
    allowed = ~torch.eye(tokens, dtype=torch.bool) if is_masked else None
    inputs = [qkv, *([inverse] if has_temperature else [])]
    its_masks = masks() if drops else None

    found = attend(qkv, HEADS, inverse, allowed, its_masks, with_scores=True)
    exact = inverse.double() if has_temperature else None
    expected = plain_attention(qkv.double(), exact, allowed, its_masks)

    weights = [torch.randn_like(each) for each in found]
    for outputs in ([0], [1], [0, 1]):
        # Twice: gradients are measured term by term, in one graph.
        loss, its_loss = (sum((each[i] * weights[i]).sum() for i in outputs) for each in (found, expected))
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        for gradient, other in zip(
            gradients, torch.autograd.grad(its_loss, inputs, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(gradient, other, **CLOSE)
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other.float(), **CLOSE)


def test_attention_in_half_precision_has_exact_scores():
    # Not bfloat16: the interpreter multiplies its bits.
    qkv = torch.randn(1, IMAGES, 5, 3 * HEADS * WIDTH).half().requires_grad_()

    values, scores = attend(qkv, HEADS, with_scores=True)
    (values.float().square().sum() + scores.sum()).backward()
    exact = qkv.detach().double().requires_grad_()
    expected, exact_scores = plain_attention(exact, None, None, None)
    (expected.square().sum() + exact_scores.sum()).backward()

    assert (values.dtype, scores.dtype, qkv.grad.dtype) == (torch.float16, torch.float32, torch.float16)
    torch.testing.assert_close(scores, exact_scores.float(), **CLOSE)
    torch.testing.assert_close(values.double(), expected, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(qkv.grad.double(), exact.grad, atol=6e-3, rtol=6e-3)


def assert_close(compute: Callable, plain: Callable, inputs: list[Tensor]) -> None:
    """Values and gradients of both, the plain one's in float64."""
    exact = [each.detach().double().requires_grad_() for each in inputs]
    found, expected = compute(*inputs), plain(*exact)
    weights = torch.randn_like(expected)

    torch.testing.assert_close(found, expected.to(found.dtype), **CLOSE)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), exact), strict=True
    ):
        torch.testing.assert_close(gradient, other.float(), **CLOSE)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("columns", [12, 65])
def test_layer_norm(columns):
    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normalised = F.layer_norm(x, (columns,), eps=1e-3)
        return normalised * weight[:, None, None] + bias[:, None, None]

    inputs = tensors((2, 3, 23, columns), (2, columns), (2, columns))
    assert_close(lambda x, weight, bias: normed(x, weight, bias, 1e-3), plain, inputs)


def test_a_norm_under_autocast_is_rounded_as_the_product_after_it_would(monkeypatch):
    x, weight, bias = (tensor.requires_grad_() for tensor in tensors((2, 3, 23, 12), (2, 12), (2, 12)))
    upstream = torch.randn(2, 3, 23, 12).bfloat16()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)

    whole, rounded = (normed(x, weight, bias, 1e-3, feeds_product) for feeds_product in (False, True))
    of_whole, of_rounded = (
        torch.autograd.grad(y, (x, weight, bias), upstream.to(y.dtype)) for y in (whole, rounded)
    )

    assert whole.dtype == torch.float32
    assert torch.get_autocast_dtype("cuda") == rounded.dtype != torch.float32
    assert torch.equal(whole.to(rounded.dtype), rounded)
    assert all(map(torch.equal, of_whole, of_rounded))


@pytest.mark.parametrize("its_masks", [None, masks()], ids=["dry", "dropout"])
@pytest.mark.parametrize("columns", [12, 132])
@pytest.mark.parametrize("has_residual", [False, True], ids=["activated", "added"])
def test_what_follows_a_product(has_residual, columns, its_masks):
    def plain(h: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = h + bias[:, None, None]
        y = F.gelu(y) if residual is None else y
        y = y if its_masks is None else dropped(y, its_masks)
        return y if residual is None else residual + y

    shape = (2, 3, 23, columns)
    inputs = tensors(shape, (2, columns), *([shape] if has_residual else []))
    assert_close(lambda h, bias, *residual: finished(h, bias, its_masks, *residual), plain, inputs)


SHAPE = {"image_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "embed_dim": 12, "depth": 2}
SHAPE |= {"num_heads": 2, "head_dim": 4, "mlp_dim": 16}
IMAGES_OF_MODELS = torch.randn(3, 3, 8, 8)


def both_ways(model: ViT, monkeypatch: pytest.MonkeyPatch, students: int) -> list[list[Tensor]]:
    """Logits, scores, queries and all gradients of a training step, by the plain path and by kernels."""
    results = []
    for use in (False, True):
        monkeypatch.setattr(kernels, "can_compute", lambda _, use=use: use)
        own = deepcopy(model).train()
        if students:
            drop_by(
                (streams := KeyedStreams(SEEDS, torch.device("cpu"))).drop, own.modules(), streams.next_masks
            )
            streams.next_step()
        output = own(IMAGES_OF_MODELS, Taps(scores=(1,), qkv=(0,)))
        (output.logits.square().sum() + output.scores[1].square().sum() + output.qkv[0].q.sum()).backward()
        outputs = [output.logits, output.scores[1], output.qkv[0].q]
        results.append([*outputs, *(parameter.grad for parameter in own.parameters())])
    return results


def test_a_model_is_the_same_with_and_without(monkeypatch):
    model = ViTConfig(**SHAPE).build()

    for plain, by_kernels in zip(*both_ways(model, monkeypatch, students=0), strict=True):
        torch.testing.assert_close(by_kernels, plain, **CLOSE)


def test_a_stack_is_the_same_with_and_without(monkeypatch):
    """With dropout and stochastic depth: kernels draw the plain path's masks."""
    models = [ViTConfig(**SHAPE, attention="lsa", dropout=0.3, drop_path_rate=0.5).build() for _ in SEEDS]
    stacked = deepcopy(models[0])
    for name, _ in models[0].named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = torch.stack([model.get_parameter(name).detach() for model in models])
        setattr(stacked.get_submodule(owner), leaf, nn.Parameter(values))

    for plain, by_kernels in zip(*both_ways(stacked, monkeypatch, students=2), strict=True):
        torch.testing.assert_close(by_kernels, plain, **CLOSE)
