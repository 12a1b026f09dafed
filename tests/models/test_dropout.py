"""Dropout acts at each of its five places in train mode, and at none in eval mode.

Each place is made visible by itself: with constant values flowing through a layer, zeros in its output come
from the dropout after it, and unequal values from the dropout inside it.
"""

import pytest
import torch
from torch import Tensor, nn

from vitkd.models import Taps
from vitkd.models.dropout import Dropout, quick_mask
from vitkd.models.layers import MLP, Attention
from vitkd.models.output import BlockTaps

P = 0.25


def constant(linear: nn.Linear, weight: float, bias: float | None) -> None:
    nn.init.constant_(linear.weight, weight)
    if bias is not None:
        nn.init.constant_(linear.bias, bias)


def unit_attention(dropout: float) -> Attention:
    """Gives 1 everywhere without dropout: all values are 1, and so is each output."""
    attention = Attention(dim=8, num_heads=2, head_dim=4, dropout=dropout, qkv_bias=True)
    constant(attention.qkv, 0.0, 1.0)
    constant(attention.out, 1 / 8, 0.0)
    return attention


def unit_mlp(dropout: float) -> MLP:
    """Gives 1 everywhere without dropout: all hidden units are equal."""
    mlp = MLP(dim=8, hidden=16, dropout=dropout)
    constant(mlp.expand, 0.0, 1.0)
    hidden = nn.functional.gelu(torch.tensor(1.0)).item()
    constant(mlp.contract, 1 / (16 * hidden), 0.0)
    return mlp


def through(layer: nn.Module, taps: BlockTaps | None) -> Tensor:
    x = torch.randn(40, 6, 8)
    return layer(x) if taps is None else layer(x, taps)[0]


LAYERS = pytest.mark.parametrize(
    ("build", "taps"),
    [
        pytest.param(unit_attention, BlockTaps(scores=True), id="recorded-attention"),
        pytest.param(unit_attention, BlockTaps(), id="fused-attention"),
        pytest.param(unit_mlp, None, id="mlp"),
    ],
)


@LAYERS
def test_dropout_inside_and_after_a_layer(build, taps):
    y = through(build(P).train(), taps)

    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(P, abs=0.03)
    kept = y[y != 0]
    assert kept.std() > 0.05, "nothing was dropped inside the layer"
    assert y.mean().item() == pytest.approx(1, abs=0.05), "what is kept must be scaled by 1/(1-p)"


@LAYERS
@pytest.mark.parametrize(("dropout", "train"), [(P, False), (0.0, True)])
def test_no_dropout_in_eval_mode_or_at_zero(build, taps, dropout, train):
    y = through(build(dropout).train(train), taps)

    torch.testing.assert_close(y, torch.ones_like(y))


def test_embedding_dropout(tiny):
    model = tiny(emb_dropout=P, dropout=0.0, embed_dim=64).build()
    images = torch.randn(50, 3, 8, 8)

    kept = model.eval().embed(images)
    dropped = model.train().embed(images)

    assert (dropped == 0).float().mean().item() == pytest.approx(P, abs=0.03)
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / (1 - P))


@pytest.mark.parametrize("taps", [Taps(), Taps(scores=(0, 1, 2))])
def test_eval_mode_repeats_itself_and_train_mode_does_not(tiny, taps):
    model = tiny(dropout=0.1, emb_dropout=0.1).build()
    images = torch.randn(4, 3, 8, 8)

    def twice() -> bool:
        return torch.equal(model(images, taps).logits, model(images, taps).logits)

    assert not twice()
    model.eval()
    assert twice()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_drop_as_many_as_they_should_and_keep_the_mean(p, dtype):
    x = torch.ones(1000, 1001, dtype=dtype)

    mask = quick_mask(x, p)

    dropped = (mask == 0).double().mean().item()
    # Five standard deviations, and what p is rounded by.
    assert dropped == pytest.approx(p, abs=5 * (p * (1 - p) / 1e6) ** 0.5 + 2**-17)
    assert mask.dtype == dtype
    assert mask.shape == x.shape
    values = mask[mask != 0].double()
    torch.testing.assert_close(
        values, torch.full_like(values, 1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0
    )


def test_neighbours_that_share_a_draw_are_dropped_independently():
    dropped = (quick_mask(torch.ones(4_000_000), 0.5) == 0).view(-1, 4).double()

    together = torch.corrcoef(dropped.T)

    torch.testing.assert_close(together, torch.eye(4, dtype=torch.float64), atol=5e-3, rtol=0)


@pytest.mark.parametrize("values", [1, 3, 8, 1023])
def test_each_generator_draws_its_part_as_it_does_alone(values):
    """What is no multiple of the four values of a draw included."""

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    together = quick_mask(torch.ones(3, values), 0.3, generators())

    alone = [quick_mask(torch.ones(1, values), 0.3, [generator]) for generator in generators()]
    assert torch.equal(together, torch.cat(alone))


def test_gradients_pass_where_values_do():
    layer = Dropout(P)
    x = torch.randn(50, 50, requires_grad=True)

    y = layer(x)
    y.sum().backward()

    torch.testing.assert_close(x.grad * x, y)
