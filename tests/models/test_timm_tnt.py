"""TNT's outer and inner attention, compared with timm's own code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.beside_timm import beside_timm
from vitkd.errors import ConfigError
from vitkd.models import Taps, TimmConfig, ViTConfig, load_model, save_model

# 4×2 patches of 2×4 words.
SMALL = {
    "img_size": 32,
    "patch_size": [8, 16],
    "first_stride": 4,
    "embed_dim": 12,
    "inner_dim": 8,
    "depth": 3,
    "num_heads_outer": 3,
    "num_heads_inner": 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "tnt_s_patch16_224": {"qkv_bias": True, "global_pool": "avg"},
    "tnt_s_legacy_patch16_224": {"patch_size": 8},
}
READ = pytest.mark.parametrize("name", FORMS)
ATTENTIONS = {"outer": "attn_out", "inner": "attn_in"}
BOTH = pytest.mark.parametrize("part", ATTENTIONS)
ALL = (0, 1, 2)


def config_of(name: str, **options: Any) -> TimmConfig:
    # timm's own mean and std, so that the images stay as they are.
    return TimmConfig(32, 3, 5, [0.5] * 3, [0.5] * 3, name, options=SMALL | options)


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def both(name: str, **options: Any) -> tuple[Any, Any]:
    return beside_timm(config_of(name, **FORMS[name] | options), noise=0.2)


@READ
@BOTH
def test_softmax_of_the_scores_is_what_timm_multiplies_the_values_with(name, part):
    model, network = both(name)
    seen: list[Tensor] = []
    for block in network.blocks:
        attention = getattr(block, ATTENTIONS[part])
        attention.attn_drop.register_forward_hook(lambda _, __, weights: seen.append(weights))
    network(images())

    output = model(images(), Taps(scores=ALL, factors=(0,), qkv=(1,), part=part))

    layouts = model.config.attention_layouts(part)
    for block, (weights, layout) in enumerate(zip(seen, layouts, strict=True)):
        scores, keys = output.scores[block], weights.shape[-1]
        assert scores.shape == (2, layout.heads, layout.windows * keys, keys)
        # timm has [images · patches, heads, …]: patch p of image b in row b · patches + p.
        patches = scores.softmax(-1).unflatten(2, (layout.windows, keys)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(patches, weights, atol=1e-6, rtol=0)
        assert (weights - 1 / keys).abs().max() > 0.01
    for block in (0, 1) if part == "outer" else ():
        torch.testing.assert_close(output.qkv[block].scores(), output.scores[block], atol=1e-6, rtol=1e-6)
    assert [block for block, qkv in output.qkv.items() if qkv.v is not None] == [1]


def test_layouts_are_of_patches_and_of_the_words_in_them():
    config = config_of("tnt_s_patch16_224")
    (outer, *_), (inner, *_) = (config.attention_layouts(part) for part in ATTENTIONS)

    assert (outer.grid, outer.prefix, outer.has_class_token, outer.window) == ((4, 2), 1, True, None)
    assert (outer.heads, outer.head_dim, outer.readers) == (3, 4, (0,))
    assert (inner.grid, inner.prefix, inner.has_class_token, inner.window) == ((8, 8), 0, False, (2, 4))
    assert (inner.heads, inner.head_dim, inner.readers, inner.windows) == (2, 4, (), 8)
    assert config.attention_layouts() == (outer,) * 3
    assert str(config) == (
        "tnt_s_patch16_224, 3×3 blocks×heads, 32×32 pixels, 4×2 patches of 2×4 words + 1 other token"
    )


def test_other_models_have_one_attention_a_block():
    vit = TimmConfig(32, 3, 5, [0.5] * 3, [0.5] * 3, "vit_tiny_patch16_224", options={"img_size": 32})

    for config in (vit, ViTConfig(8, 1, 10, patch_size=2, depth=2)):
        assert config.attention_layouts("outer") == config.attention_layouts()
        assert config.attention_layouts("inner") == ()
        channels = config.channels
        with pytest.raises(AssertionError, match="no inner attention"):
            config.build()(torch.zeros(1, channels, *[config.image_size] * 2), Taps((0,), part="inner"))


@READ
@BOTH
def test_logits_are_timms_own(name, part):
    model, network = both(name)
    expected = network(images())

    assert torch.equal(model(images()).logits, expected)
    features = ("embed", "block1", "pre_logits")
    tapped = model(images(), Taps(scores=ALL, qkv=ALL, features=features, part=part))
    torch.testing.assert_close(tapped.logits, expected, atol=1e-6, rtol=1e-6)
    kept = {"indices": [1], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    ((patches, prefix),) = network.forward_intermediates(images(), **kept)
    torch.testing.assert_close(
        tapped.features["block1"], torch.cat([prefix, patches], dim=1), atol=1e-5, rtol=1e-5
    )
    pre_logits = network.forward_head(network.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(tapped.features["pre_logits"], pre_logits, atol=1e-5, rtol=1e-5)


@READ
@BOTH
def test_without_logits_scores_are_the_same_and_nothing_is_left(name, part):
    model, network = both(name)
    whole = model(images(), Taps(scores=ALL, part=part))

    for block in ALL:
        alone = model(images(), Taps(scores=(block,), logits=False, part=part))
        torch.testing.assert_close(alone.scores[block], whole.scores[block], atol=1e-5, rtol=1e-5)
    assert torch.equal(model(images()).logits, network(images()))
    for block in model.network.blocks:
        assert block.attn_in.output is block.attn_out.output is None


@READ
def test_a_trace_is_of_the_outer_attention_in_one_graph(name):
    model, _ = both(name)
    pixels = images().requires_grad_()

    trace = model.trace(pixels)

    torch.testing.assert_close(trace.logits, model(images()).logits, atol=1e-6, rtol=1e-6)
    tokens = model.attention[0].tokens
    assert [weights.shape for weights in trace.weights] == [(2, 3, tokens, tokens)] * 3
    for gradient in torch.autograd.grad(trace.logits.sum(), [*trace.weights, *trace.tokens[:-1]]):
        assert gradient.any()


@READ
def test_a_file_holds_the_whole_model(name, tmp_path):
    model, network = both(name)
    save_model(model, tmp_path / "student.safetensors")

    assert torch.equal(load_model(tmp_path)(images()).logits, network(images()))


@BOTH
def test_it_trains_with_dropout_of_its_attention(part):
    """timm's own cannot: its dropout overwrites what the softmax's gradient is made of."""
    model = config_of("tnt_s_patch16_224", attn_drop_rate=0.5).build().train()

    for taps in (Taps(), Taps(scores=ALL, part=part)):
        model.zero_grad()
        model(images(), taps).logits.sum().backward()
        for block in model.network.blocks:
            assert block.attn_in.qk.weight.grad.any()
            assert block.attn_out.qk.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patch_size": 5}, r"img_size=32: patch_size=5 does not divide it; choose 30 or 35"),
        ({"first_stride": 3}, r"first_stride=3: does not divide patch_size=8; choose 1, 2, 4 or 8"),
        ({"num_heads_outer": 5}, r"num_heads_outer=5: does not divide embed_dim=12; choose .* 4, 6 or 12"),
        ({"num_heads_inner": 3}, r"num_heads_inner=3: does not divide inner_dim=8; choose 1, 2, 4 or 8"),
        ({"depth": 0}, r"depth=0: must be at least 1"),
        ({"num_heads": 3}, r"num_heads: is no setting of timm's tnt_\w+; .*num_heads_\w+"),
        ({"first_stride": 0}, r"timm cannot build that"),
        ({"global_pool": ""}, r"one logit a class"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(options, says):
    with pytest.raises(ConfigError, match=rf"^[^\n]*{says}[^\n]*$"):
        config_of("tnt_s_patch16_224", **options)
