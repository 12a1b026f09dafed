"""A new ViT starts as vit-pytorch's does; on small images the start decides tens of points."""

import math

import pytest
import torch
from scipy import stats

SHAPE = {"image_size": 16, "patch_size": 2, "embed_dim": 64, "mlp_dim": 96, "head_dim": 24, "qkv_bias": True}
EVERYTHING = {"tokenizer": "spt", "attention": "lsa", "distillation_token": True}
# Linear layers and layer norms outside the three blocks.
OUTER = [({}, 2, 3), (EVERYTHING, 3, 2)]


@pytest.mark.parametrize("name", ["positions", "cls_token", "distillation_token"])
def test_positions_and_tokens_are_standard_normal(tiny, name):
    model = tiny(**SHAPE, **EVERYTHING).build()

    values = model.get_parameter(name).detach().flatten().numpy()

    assert stats.kstest(values, "norm").pvalue > 0.01


@pytest.mark.parametrize(("changes", "linear", "_norms"), OUTER, ids=["bare", "everything"])
def test_linear_layers_are_uniform_within_pytorchs_bound(tiny, changes, linear, _norms):
    model = tiny(**SHAPE, **changes).build()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert len(layers) == linear + 4 * 3
    for name, layer in layers.items():
        bound = 1 / math.sqrt(layer.in_features)
        for values in (layer.weight, layer.bias):
            uniform = stats.uniform(-bound, 2 * bound)
            assert values.abs().max().item() <= bound, name
            assert stats.kstest(values.detach().flatten().numpy(), uniform.cdf).pvalue > 1e-3, name


@pytest.mark.parametrize(("changes", "_linear", "outer"), OUTER, ids=["bare", "everything"])
def test_layer_norms_start_as_the_identity(tiny, changes, _linear, outer):
    model = tiny(**SHAPE, **changes).build()
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)]
    assert len(norms) == outer + 2 * 3
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()
        assert norm.eps == 1e-5


def test_temperatures_start_at_the_root_of_head_dim(tiny):
    model = tiny(attention="lsa").build()

    assert [block.attention.log_temperature.tolist() for block in model.blocks] == [[0.0, 0.0]] * 3


def test_locality_attention_takes_no_random_number(tiny):
    """So a student with it and one without begin with the same weights otherwise."""

    def weights(attention: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        return tiny(attention=attention).build().state_dict()

    plain, local = weights("msa"), weights("lsa")

    assert all(torch.equal(local[name], values) for name, values in plain.items())


def test_the_seed_decides_the_weights(tiny):
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in tiny().build().parameters()])

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
