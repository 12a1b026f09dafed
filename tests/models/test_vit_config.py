"""Which shapes a ViT can have, how many parameters they cost, and what is refused."""

import pytest
import torch
from vit_pytorch.vit import ViT as VitPytorch
from vit_pytorch.vit_for_small_dataset import ViT as SmallVitPytorch

from vitkd.errors import ConfigError
from vitkd.models import Taps, ViTConfig, count_parameters

SIZES = ["image_size", "channels", "num_classes", "patch_size", "embed_dim", "depth", "num_heads", "head_dim"]
SIZES += ["mlp_dim"]
REPORT = {"image_size": 32, "channels": 3, "num_classes": 100, "patch_size": 8, "embed_dim": 64}


@pytest.mark.parametrize(
    ("num_heads", "mlp_dim", "head_dim", "depth", "parameters"),
    [
        pytest.param(8, 1024, 64, 10, 2_656_164, id="teacher"),
        pytest.param(4, 512, 64, 5, 680_484, id="student"),
        pytest.param(8, 1024, 32, 13, 2_594_852, id="teacher-narrow-heads"),
        pytest.param(4, 512, 32, 6, 615_844, id="student-narrow-heads"),
    ],
)
def test_report_models_are_as_large_as_vit_pytorchs(num_heads, mlp_dim, head_dim, depth, parameters):
    ours = ViTConfig(**REPORT, num_heads=num_heads, mlp_dim=mlp_dim, head_dim=head_dim, depth=depth).build()
    theirs = VitPytorch(
        image_size=32, patch_size=8, num_classes=100, dim=64, depth=depth, heads=num_heads, mlp_dim=mlp_dim,
        dim_head=head_dim,
    )  # fmt: skip

    assert count_parameters(ours) == parameters
    assert count_parameters(theirs) == parameters


# Five times the pixels in the projection and its first norm, 5·8·8·3 = 960 of 192; the second norm is none.
SHIFTED = (960 - 192) * 64 + (960 - 192) * 2 - 2 * 64


@pytest.mark.parametrize(
    ("num_heads", "mlp_dim", "depth", "parameters"),
    [
        pytest.param(8, 1024, 10, 2_656_164 + SHIFTED + 10 * 8, id="teacher"),
        pytest.param(4, 512, 5, 680_484 + SHIFTED + 5 * 4, id="student"),
    ],
)
def test_spt_and_lsa_cost_what_they_do_in_vit_pytorch(num_heads, mlp_dim, depth, parameters):
    """But that its heads share a temperature."""
    shape = {"num_heads": num_heads, "mlp_dim": mlp_dim, "depth": depth}
    theirs = SmallVitPytorch(
        image_size=32, patch_size=8, num_classes=100, dim=64, depth=depth, heads=num_heads, mlp_dim=mlp_dim
    )

    ours = ViTConfig(**REPORT, **shape, tokenizer="spt", attention="lsa").build()

    assert count_parameters(ours) == parameters
    assert count_parameters(theirs) == parameters - depth * (num_heads - 1)


def test_each_switch_is_independent_of_the_others(tiny):
    def count(**changes: object) -> int:
        return count_parameters(tiny(**changes).build())

    plain = count()
    # 5·4·4·3 = 240 pixels a token instead of 48; 3 blocks of 2 heads; a token, a position and a head.
    spt, lsa, token = 192 * 12 + 192 * 2 - 2 * 12, 3 * 2, 12 + 12 + 5 * 13
    assert count(tokenizer="spt") == plain + spt
    assert count(attention="lsa") == plain + lsa
    assert count(distillation_token=True) == plain + token
    assert count(tokenizer="spt", attention="lsa", distillation_token=True) == plain + spt + lsa + token


def test_shifted_patches_have_their_own_norm_whatever_patch_norm_says(tiny):
    both = [tiny(tokenizer="spt", patch_norm=patch_norm).build().state_dict() for patch_norm in (True, False)]

    assert both[0].keys() == both[1].keys()


@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels", "tokens"),
    [(8, 2, 1, 17), (9, 3, 2, 10), (28, 7, 1, 17), (6, 1, 4, 37), (5, 5, 3, 2)],
)
def test_any_image_size_patch_size_and_channels(tiny, image_size, patch_size, channels, tokens):
    model = tiny(image_size=image_size, patch_size=patch_size, channels=channels).build()

    output = model(torch.randn(2, channels, image_size, image_size), Taps(scores=(0,)))

    assert output.logits.shape == (2, 5)
    assert output.scores[0].shape == (2, 2, tokens, tokens)


def test_each_patch_is_one_token_in_reading_order(tiny):
    model = tiny(image_size=6, patch_size=2, channels=1, emb_dropout=0.0).build()
    image = torch.randn(1, 1, 6, 6)
    before = model.embed(image)

    image[0, 0, 2:4, 4:6] += 1  # row 1, column 2 of the 3×3 grid: after CLS, token 1 + 5

    moved = (model.embed(image) != before).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 32, "patch_size": 5}, ["patch_size=5", "image_size=32", "1, 2, 4, 8, 16, 32"]),
        ({"patch_size": 16}, ["patch_size=16", "image_size=8", "1, 2, 4, 8"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "[0, 1)"]),
        ({"dropout": float("nan")}, ["dropout=nan", "[0, 1)"]),
        ({"emb_dropout": 1.5}, ["emb_dropout=1.5", "[0, 1)"]),
        *(({name: 0}, [f"{name}=0", "at least 1"]) for name in SIZES),
        ({"depth": -2}, ["depth=-2", "at least 1"]),
        ({"tokenizer": "shifted"}, ["tokenizer=shifted", "patch or spt"]),
        ({"attention": "swin"}, ["attention=swin", "msa or lsa"]),
        ({"tokenizer": "spt", "patch_size": 1}, ["tokenizer=spt", "patch_size=1"]),
    ],
)
def test_impossible_shapes_are_refused_in_one_line(tiny, changes, words):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)

    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


SIZES = (
    "ViTConfig(image_size=32, channels=3, num_classes=100, patch_size=8, embed_dim=64, depth=5, num_heads=4, "
    "head_dim=64, mlp_dim=512, dropout=0.0, emb_dropout=0.0, qkv_bias=False, patch_norm=True"
)


def test_variants_at_their_defaults_are_not_written():
    """Random streams hang on every character of it."""
    assert repr(ViTConfig(**REPORT)) == f"{SIZES})"
    explicit = ViTConfig(**REPORT, tokenizer="patch", attention="msa", distillation_token=False)
    assert repr(explicit) == f"{SIZES})"


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({"tokenizer": "spt"}, ", tokenizer='spt')"),
        ({"attention": "lsa"}, ", attention='lsa')"),
        ({"distillation_token": True}, ", distillation_token=True)"),
        ({"attention": "lsa", "tokenizer": "spt"}, ", tokenizer='spt', attention='lsa')"),
    ],
)
def test_variants_are_written_where_they_are_not_the_default(changes, ending):
    config = ViTConfig(**REPORT, **changes)

    assert repr(config) == SIZES + ending
    assert eval(repr(config)) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "5×4 blocks×heads, width 64, MLP 512, 4×4 patches + CLS"),
        (
            {"tokenizer": "spt", "attention": "lsa", "distillation_token": True},
            "5×4 blocks×heads, width 64, MLP 512, 4×4 shifted patches + CLS + distillation token, "
            "locality attention",
        ),
    ],
)
def test_the_shape_in_words(changes, words):
    assert str(ViTConfig(**REPORT, **changes)) == words
