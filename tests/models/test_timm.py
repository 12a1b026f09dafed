"""timm's networks as models of vitkd's, compared with timm's own code."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.models.beside_timm import beside_timm
from vitkd.models import Taps, TimmConfig, load_model, save_model

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HALF = [0.5, 0.5, 0.5]
# One of each form that timm builds from the classes which vitkd reads.
FORMS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {"qk_norm": True, "init_values": 0.1, "scale_attn_norm": True},
    "deit3_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_rpn_224": {},
    "vit_little_patch16_reg4_gap_256": {},
    "aimv2_large_patch14_224": {},
    "eva_large_patch14_196": {},
    "eva02_enormous_patch14_clip_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
}
# The newest are not in the oldest timm that is supported.
NAMES = [name for name in FORMS if timm.is_model(name)]
DISTINCT = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224")
EVERY_FORM = pytest.mark.parametrize("name", NAMES)
MOST_SLOWLY = pytest.mark.parametrize(
    "name", [name if name in DISTINCT else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)


def config_of(name: str, size: int = 32, **options: Any) -> TimmConfig:
    facts = TimmConfig(size, 3, 5, HALF, HALF, name, options=TINY | options).facts
    return TimmConfig(size, 3, 5, [*facts.mean], [*facts.std], name, options=TINY | options)


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def both(name: str) -> tuple[Any, Any]:
    return beside_timm(config_of(name, **FORMS[name]))


@EVERY_FORM
def test_softmax_of_the_scores_is_what_timm_multiplies_the_values_with(name):
    model, network = both(name)
    seen: list[Tensor] = []
    for block in network.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, weights: seen.append(weights))
    network(images())

    output = model(images(), Taps(scores=(0, 1), factors=(0,), qkv=(1,)))

    for block, weights in enumerate(seen):
        assert output.scores[block].shape == (
            2,
            model.attention[block].heads,
            *[model.attention[0].tokens] * 2,
        )
        torch.testing.assert_close(output.scores[block].softmax(-1), weights, atol=1e-6, rtol=0)
        torch.testing.assert_close(output.qkv[block].scores(), output.scores[block], atol=1e-6, rtol=1e-6)
    assert len(seen) == len(model.attention) == 2


@EVERY_FORM
def test_logits_are_timms_own(name):
    model, network = both(name)
    expected = network(images())

    assert torch.equal(model(images()).logits, expected)
    tapped = model(images(), Taps(scores=(0,), qkv=(1,), features=("embed", "block1", "pre_logits")))
    torch.testing.assert_close(tapped.logits, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tapped.features["block1"], network_tokens(network), atol=1e-5, rtol=0)
    pre_logits = network.forward_head(network.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(tapped.features["pre_logits"], pre_logits, atol=1e-5, rtol=0)


def network_tokens(network: Any) -> Tensor:
    """The tokens after the last block, by timm's own feature extraction."""
    wanted = {"indices": [1], "output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True}
    (last,) = network.forward_intermediates(images(), **wanted)
    patches, prefix = last if isinstance(last, tuple) else (last, last[:, :0])
    return torch.cat([prefix, patches], dim=1)


@MOST_SLOWLY
def test_without_logits_scores_are_the_same_and_nothing_is_left(name):
    model, _ = both(name)
    whole = model(images(), Taps(scores=(0, 1)))

    alone = model(images(), Taps(scores=(0, 1), logits=False))

    assert alone.logits is None
    for block in (0, 1):
        torch.testing.assert_close(alone.scores[block], whole.scores[block], atol=1e-6, rtol=1e-6)
    for module in model.modules():
        assert not module._forward_hooks
        assert "output" not in vars(module) or module.output is None
    assert torch.equal(model(images()).logits, both(name)[0](images()).logits)


@MOST_SLOWLY
def test_a_file_holds_the_whole_model(name, tmp_path):
    model, network = both(name)
    save_model(model, tmp_path / "student.safetensors")
    state = torch.get_rng_state()

    loaded = load_model(tmp_path)

    assert torch.equal(torch.get_rng_state(), state)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded(images()).logits, network(images()))


@MOST_SLOWLY
def test_a_trace_is_in_one_graph(name):
    model, _ = both(name)
    pixels = images().requires_grad_()

    trace = model.trace(pixels)

    torch.testing.assert_close(trace.logits, model(images()).logits, atol=1e-6, rtol=0)
    for gradient in torch.autograd.grad(trace.logits.sum(), [*trace.weights, *trace.tokens[:-1]]):
        assert gradient.isfinite().all()
        assert gradient.any()
