"""A new ViT starts as vit-pytorch's does; on small images the start decides tens of points."""

import math

import pytest
import torch
from scipy import stats

from vitkd.models import ViT


@pytest.fixture
def model(tiny) -> ViT:
    return tiny(image_size=16, patch_size=2, embed_dim=64, mlp_dim=96, head_dim=24, qkv_bias=True).build()


@pytest.mark.parametrize("name", ["positions", "cls_token"])
def test_positions_and_class_token_are_standard_normal(model, name):
    values = model.get_parameter(name).detach().flatten().numpy()

    assert stats.kstest(values, "norm").pvalue > 0.01


def test_linear_layers_are_uniform_within_pytorchs_bound(model):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(layers) == 2 + 4 * 3
    for name, layer in layers.items():
        bound = 1 / math.sqrt(layer.in_features)
        for values in (layer.weight, layer.bias):
            uniform = stats.uniform(-bound, 2 * bound)
            assert values.abs().max().item() <= bound, name
            assert stats.kstest(values.detach().flatten().numpy(), uniform.cdf).pvalue > 1e-3, name


def test_layer_norms_start_as_the_identity(model):
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == 3 + 2 * 3
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()
        assert norm.eps == 1e-5


def test_the_seed_decides_the_weights(tiny):
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in tiny().build().parameters()])

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
