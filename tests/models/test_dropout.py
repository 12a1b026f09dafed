"""Dropout acts at each of its five places in train mode, and at none in eval mode.

Each place is made visible by itself: with constant values flowing through a layer, zeros in its output come
from the dropout after it, and unequal values from the dropout inside it.
"""

import pytest
import torch
from torch import Tensor, nn

from vitkd.models.layers import MLP, Attention

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


def through(layer: nn.Module, record: bool | None) -> Tensor:
    x = torch.randn(40, 6, 8)
    return layer(x) if record is None else layer(x, record)[0]


LAYERS = pytest.mark.parametrize(
    ("build", "record"),
    [
        pytest.param(unit_attention, True, id="recorded-attention"),
        pytest.param(unit_attention, False, id="fused-attention"),
        pytest.param(unit_mlp, None, id="mlp"),
    ],
)


@LAYERS
def test_dropout_inside_and_after_a_layer(build, record):
    y = through(build(P).train(), record)

    dropped = (y == 0).float().mean().item()
    assert dropped == pytest.approx(P, abs=0.03)
    kept = y[y != 0]
    assert kept.std() > 0.05, "nothing was dropped inside the layer"
    assert y.mean().item() == pytest.approx(1, abs=0.05), "what is kept must be scaled by 1/(1-p)"


@LAYERS
@pytest.mark.parametrize(("dropout", "train"), [(P, False), (0.0, True)])
def test_no_dropout_in_eval_mode_or_at_zero(build, record, dropout, train):
    y = through(build(dropout).train(train), record)

    torch.testing.assert_close(y, torch.ones_like(y))


def test_embedding_dropout(tiny):
    model = tiny(emb_dropout=P, dropout=0.0, embed_dim=64).build()
    images = torch.randn(50, 3, 8, 8)

    kept = model.eval().embed(images)
    dropped = model.train().embed(images)

    assert (dropped == 0).float().mean().item() == pytest.approx(P, abs=0.03)
    torch.testing.assert_close(dropped[dropped != 0], kept[dropped != 0] / (1 - P))


@pytest.mark.parametrize("record", [[], [0, 1, 2]])
def test_eval_mode_repeats_itself_and_train_mode_does_not(tiny, record):
    model = tiny(dropout=0.1, emb_dropout=0.1).build()
    images = torch.randn(4, 3, 8, 8)

    def twice() -> bool:
        return torch.equal(model(images, record).logits, model(images, record).logits)

    assert not twice()
    model.eval()
    assert twice()
