"""Mimetic first weights: products that are nearly the identity, positions that are waves (numpy, timm)."""

import numpy as np
import pytest
import torch
from timm.layers import build_sincos2d_pos_embed

from vitkd.errors import ConfigError
from vitkd.models import TimmConfig, ViT
from vitkd.models.mimetic import factors, near_identity, sinusoidal

HALF = [0.5, 0.5, 0.5]
WIDE = {"embed_dim": 64, "num_heads": 2, "head_dim": 32, "mlp_dim": 16}


def products(model: ViT, block: int) -> tuple[list[np.ndarray], np.ndarray]:
    """W_Q W_Kᵀ of each head, and W_V W_out, [D, D], in float64."""
    attention = model.blocks[block].attention
    inner = attention.num_heads * attention.head_dim
    qkv, out = (w.detach().double().numpy() for w in (attention.qkv.weight, attention.out.weight))
    heads = [slice(h * attention.head_dim, (h + 1) * attention.head_dim) for h in range(attention.num_heads)]
    return [qkv[:inner][h].T @ qkv[inner : 2 * inner][h] for h in heads], qkv[2 * inner :].T @ out.T


def noise_of(product: np.ndarray, diagonal: float) -> np.ndarray:
    """Z of product = α Z + diagonal · I, scaled to variance 1 where α is the diagonal's size."""
    return (product - diagonal * np.eye(len(product))) / abs(diagonal) * len(product) ** 0.5


def test_values_and_output_make_a_noisy_negative_identity(tiny):
    model = tiny(**WIDE, init="mimetic").build()

    _, product = products(model, 1)

    noise = noise_of(product, -0.4)
    assert abs(noise.mean()) < 4 / 64
    assert noise.std() == pytest.approx(1, abs=4 / (2 * 64**2) ** 0.5)


def test_full_heads_make_a_noisy_identity_each(tiny):
    """Where a head is as wide as the model, as the report's are, its product is the target itself."""
    model = tiny(**WIDE | {"head_dim": 64}, init="mimetic").build()

    (first, second), product = products(model, 0)

    for noise in (noise_of(first, 0.7), noise_of(second, 0.7), noise_of(product, -0.4)):
        assert noise.std() == pytest.approx(1, abs=4 / (2 * 64**2) ** 0.5)
    assert not np.allclose(first, second)


def test_narrow_heads_take_the_largest_components(tiny):
    """The nearest matrix of that rank (Eckart and Young): what is left over has the small singular values."""
    torch.manual_seed(3)
    model = tiny(**WIDE, init="mimetic").build()

    heads, _ = products(model, 0)

    for product in heads:
        singular = np.linalg.svd(product, compute_uv=False)
        assert (singular[32:] < 1e-5).all()
        # Of 0.7 (Z + I) the upper half lies above its median, which is some 0.9.
        assert singular[31] > 0.6
        assert np.trace(product) / 64 > 0.35, "a positive diagonal"


@pytest.mark.parametrize("width", [3, 8, 13])
def test_factors_are_the_best_of_their_width(width):
    target = near_identity(8, 0.7, 0.7)

    left, right = factors(target, width)

    u, s, vt = np.linalg.svd(target.double().numpy())
    best = (u[:, :width] * s[:width]) @ vt[:width]
    assert (left.shape, right.shape) == ((8, width), (width, 8))
    np.testing.assert_allclose(left @ right, best, atol=1e-5)
    assert left.norm().item() == pytest.approx(right.norm().item(), rel=1e-5), "each has half of the scale"
    assert (left.norm(dim=0) > 1e-3).all(), "no dimension is dead"


def test_positions_are_waves_of_row_and_column():
    rows, columns, dim = 3, 5, 16

    found = sinusoidal((rows, columns), dim).double().numpy()

    for patch in range(rows * columns):
        y, x = divmod(patch, columns)
        angles = [at / 10_000 ** (i / 4) for at in (x, y) for i in range(4)]
        x, y = np.array(angles[:4]), np.array(angles[4:])
        np.testing.assert_allclose(
            found[patch], np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)]), atol=1e-6
        )


def test_positions_are_timms_up_to_the_order_of_axes():
    theirs = build_sincos2d_pos_embed([4, 4], 32, temperature=10_000.0).reshape(16, -1)

    ours = sinusoidal((4, 4), 32)

    torch.testing.assert_close(ours.sort(dim=1).values, theirs.sort(dim=1).values, atol=1e-5, rtol=1e-5)


def test_all_else_is_as_without_it(tiny):
    models = []
    for init in (None, "mimetic"):
        torch.manual_seed(7)
        models.append(tiny(qkv_bias=True, distillation_token=True, init=init).build())
    plain, mimetic = (dict(model.named_parameters()) for model in models)

    changed = {name for name, values in plain.items() if not torch.equal(values, mimetic[name])}

    attention = {f"blocks.{b}.attention.{each}.weight" for b in range(3) for each in ("qkv", "out")}
    assert changed == attention | {"positions"}
    assert not mimetic["positions"][0, :2].any(), "tokens have no place"
    assert repr(models[0].config) == repr(models[1].config), "seeds are made from it"


def test_the_seed_decides_it(tiny):
    def build(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return tiny(init="mimetic").build().blocks[0].attention.qkv.weight

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


def test_timms_vit_begins_alike():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    config = TimmConfig(32, 3, 5, HALF, HALF, "vit_tiny_patch16_224", init="mimetic", options=options)

    network = config.build().network

    value, out = network.blocks[1].attn.qkv.weight[48:], network.blocks[1].attn.proj.weight
    assert (out @ value).diagonal().mean().item() == pytest.approx(-0.4, abs=0.15)
    torch.testing.assert_close(network.pos_embed[0, 1:], sinusoidal((4, 4), 24))


def test_what_cannot_be_mimetic_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"^init=mimetic: .* 4 divides, and embed_dim=10$"):
        tiny(embed_dim=10, init="mimetic").build()
    swin = {"img_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": [2], "num_heads": [2]}
    with pytest.raises(ConfigError, match=r"^init=mimetic: swin_\w+ is a SwinTransformer of timm's"):
        TimmConfig(8, 3, 5, HALF, HALF, "swin_tiny_patch4_window7_224", init="mimetic", options=swin)
    with pytest.raises(ConfigError, match=r"^init=mimetic: pretrained=true is what it begins with"):
        TimmConfig(32, 3, 5, HALF, HALF, "vit_tiny_patch16_224", pretrained=True, init="mimetic")
    with pytest.raises(ConfigError, match=r"^init=mimetik: choose null, mimetic or weight_selection$"):
        tiny(init="mimetik")
