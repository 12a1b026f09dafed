"""What is recorded is what the model used: weights by hand from Q and K, logits as without recording."""

import sys

import pytest
import timm
import torch
from torch import nn

from vitkd.errors import ConfigError
from vitkd.explain.maps.recording import has_maps, layout, logits_of, record, timm_model, who_reads
from vitkd.models import ResNetConfig, Taps


def timm_vit(**changes) -> nn.Module:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.models.VisionTransformer(**(shape | changes)).double().eval()


def images_for(height=16, width=16):
    return torch.randn(4, 3, height, width, dtype=torch.float64)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def assert_untouched(model):
    """No hook is left, and fused attention is on again."""
    assert not any(module._forward_hooks for module in model.modules())
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))


def test_vitkds_own_model_is_traced(tiny):
    model = tiny().build().double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    recording = record(model, images)

    assert_close(recording.logits, model(images).logits)
    for i, scores in model(images, Taps(scores=(0, 1, 2))).scores.items():
        assert_close(recording.weights[i], scores.softmax(-1))
    assert (recording.prefix, recording.grid, [*recording.readers]) == (1, (2, 2), [0])
    assert [tokens.shape for tokens in recording.tokens] == [(2, 5, 12)] * 3


def test_readers_are_the_tokens_that_the_answer_comes_from(tiny):
    """Of the last block's tokens the logits' gradient reaches those alone, whatever the layout says."""
    models = {
        "plain": tiny().build(),
        "distilled": tiny(distillation_token=True).build(),
        "timm's": timm_vit(img_size=8, patch_size=4),
        "timm's distilled": timm_distilled(),
        "registers": timm_vit(img_size=8, patch_size=4, reg_tokens=1),
        "pooled": timm_vit(img_size=8, patch_size=4, global_pool="avg"),
    }
    for name, model in models.items():
        recording = record(model.double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(recording.logits[:, 1].sum(), recording.tokens[-1])
        reached = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
        assert [*recording.readers] == reached, name
        if "distilled" in name:
            assert reached == [0, 1]
            assert who_reads(recording) == "class and distillation tokens"


def timm_distilled() -> nn.Module:
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.models.deit.VisionTransformerDistilled(**shape)
    for head in (model.head, model.head_dist):
        nn.init.normal_(head.weight)  # timm's start of 0 would let no gradient through
    return model.double().eval()


@pytest.mark.parametrize(
    ("changes", "sees_itself"),
    [({"attention": "lsa"}, False), ({"tokenizer": "spt"}, True), ({"distillation_token": True}, True)],
)
@torch.no_grad()
def test_other_switches_of_vitkds_model(tiny, changes, sees_itself):
    model = tiny(**changes).build().double().eval()
    recording = record(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))

    own = torch.stack([each.diagonal(dim1=-2, dim2=-1) for each in recording.weights])
    assert recording.sees_itself == sees_itself
    assert (own == 0).all() if not sees_itself else (own > 0).all()
    assert_close(sum(each.sum(-1) for each in recording.weights), torch.full(own.shape[1:], 3.0).double())


def test_a_residual_network_has_no_maps(tiny):
    network = ResNetConfig(image_size=8, channels=3, num_classes=5, stem="small").build()

    assert not has_maps(network)
    assert has_maps(tiny().build())
    assert has_maps(timm_vit())
    with pytest.raises(ConfigError, match="ResNet has no softmax attention that was found"):
        layout(network, torch.randn(2, 3, 8, 8))


def test_timms_logits_are_those_of_the_model_left_alone():
    model, images = timm_vit(), images_for()
    expected = model(images)

    recording = record(model, images)

    assert_close(recording.logits, expected)
    assert_close(model(images), expected)
    assert_untouched(model)


def test_timms_weights_are_the_softmax_of_queries_times_keys():
    model, images = timm_vit(), images_for()
    recording = record(model, images)
    entering = [model._pos_embed(model.patch_embed(images)), *recording.tokens]

    for block, x, weights in zip(model.blocks, entering[:-1], recording.weights, strict=True):
        q, k, _ = block.attn.qkv(block.norm1(x)).reshape(4, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        assert_close(weights, (q @ k.mT / 4**0.5).softmax(-1))
        assert_close(weights.sum(-1), torch.ones(4, 3, 5, dtype=torch.float64))


def test_timms_tokens_are_those_between_the_blocks():
    model, images = timm_vit(), images_for()

    recording = record(model, images)

    x = model._pos_embed(model.patch_embed(images))
    for block, tokens in zip(model.blocks, recording.tokens, strict=True):
        x = block(x)
        assert_close(tokens, x)
    assert_close(recording.logits, model.head(model.norm(x)[:, 0]))


@pytest.mark.parametrize("build", [timm_vit, lambda: timm_vit(qk_norm=True, init_values=0.1)])
def test_the_recorded_weights_are_in_the_graph_of_a_frozen_model(build):
    model = build().requires_grad_(False)

    recording = record(model, images_for())

    gradients = torch.autograd.grad(recording.logits[:, 1].sum(), recording.weights)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_without_gradients_nothing_is_kept_for_them():
    with torch.no_grad():
        assert not record(timm_vit(), images_for()).weights[0].requires_grad


def test_gradients_flow_through_a_checkpointed_model_too():
    model, images = timm_vit(), images_for()
    expected = torch.autograd.grad(*of_class_0(record(model, images)))
    model.set_grad_checkpointing(True)

    found = torch.autograd.grad(*of_class_0(record(model, images)))

    assert_close(found, expected)
    assert model.grad_checkpointing


def of_class_0(recording):
    return recording.logits[:, 0].sum(), recording.weights


def test_dropout_is_off_while_recording_and_modes_come_back():
    model, images = timm_vit(attn_drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5), images_for()
    expected = model(images)
    model.train()
    model.blocks[1].eval()

    recording = record(model, images)

    assert_close(recording.logits, expected)
    assert model.training
    assert model.blocks[0].attn.training
    assert not model.blocks[1].training
    assert not model.blocks[1].attn.training


def test_an_error_in_the_pass_leaves_the_model_as_it_was():
    model = timm_vit().train()
    model.blocks[2].mlp = None

    with pytest.raises(TypeError):
        record(model, images_for())

    assert_untouched(model)
    assert model.training


@pytest.mark.parametrize(
    ("changes", "size", "prefix", "grid", "readers", "in_words"),
    [
        ({"reg_tokens": 2}, (16, 16), 3, (2, 2), [0], "class token"),
        ({"img_size": (16, 24)}, (16, 24), 1, (2, 3), [0], "class token"),
        ({"dynamic_img_size": True}, (32, 24), 1, (4, 3), [0], "class token"),
        ({"class_token": False, "global_pool": "avg"}, (16, 16), 0, (2, 2), [0, 1, 2, 3], "patches"),
        (
            *({"class_token": False, "reg_tokens": 1, "global_pool": "map"}, (16, 16), 1, (2, 2)),
            *([1, 2, 3, 4], "patches"),
        ),
    ],
    ids=["registers", "oblong", "dynamic", "pooled", "attention-pooled"],
)
def test_layouts_of_timms_variants(changes, size, prefix, grid, readers, in_words):
    model, images = timm_vit(**changes), images_for(*size)

    recording = record(model, images)

    assert (recording.prefix, recording.grid) == (prefix, grid)
    assert ([*recording.readers], who_reads(recording)) == (readers, in_words)
    assert recording.weights[0].shape[-1] == prefix + grid[0] * grid[1]
    assert_close(recording.logits, model(images))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("deit_tiny_distilled_patch16_224", 2), ("beitv2_base_patch16_224", 1), ("eva02_tiny_patch14_224", 1)],
)
def test_timms_relatives_are_recorded_too(name, prefix):
    size = 28 if "patch14" in name else 32
    model = timm.create_model(name, img_size=size, depth=2).eval()
    images = torch.randn(2, 3, size, size)

    recording = record(model, images)

    assert (recording.prefix, recording.grid) == (prefix, (2, 2))
    torch.testing.assert_close(recording.logits, model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("resnet18", {}, "no softmax attention"),
        ("mixer_s16_224", {"img_size": 32}, "num_prefix_tokens|no softmax attention"),
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "window_size": 7}, "within windows"),
        ("xcit_nano_12_p16_224", {}, "num_prefix_tokens|tokens, which are not|laid out"),
        ("vit_small_patch16_18x2_224", {"img_size": 32, "depth": 2}, "2 attentions in one block"),
    ],
)
def test_a_model_without_maps_is_reported_why(name, options, cause):
    model = timm.create_model(name, **options).eval()
    size = options.get("img_size", 32)

    with pytest.raises(ConfigError, match=cause) as raised:
        record(model, torch.randn(2, 3, size, size))

    assert type(model).__name__ in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_differential_attention_has_no_one_map_a_head():
    model = timm_vit(attn_layer="diff", num_heads=2)

    with pytest.raises(ConfigError, match="4 maps into 2 heads"):
        record(model, images_for())


class Doubling(nn.Module):
    """Stands for an `attn_drop` that is not between a softmax and the values."""

    def forward(self, weights):
        return 2 * weights


def test_weights_that_are_no_softmaxs_are_refused():
    model = timm_vit()
    model.blocks[1].attn.attn_drop = Doubling()

    with pytest.raises(ConfigError, match=r"do not sum to 1.*\(block 1\)"):
        record(model, images_for())


def test_a_lost_patch_layout_is_reported():
    model = timm_vit()
    model.num_prefix_tokens = 2

    with pytest.raises(ConfigError, match="5 tokens, which are not 2 and 2×2 patches"):
        record(model, images_for())


def test_images_of_another_size_are_reported_both_sizes(tiny):
    with pytest.raises(ConfigError, match="images of 24×16: the model takes 16×16"):
        record(timm_vit(), images_for(24, 16))
    with pytest.raises(ConfigError, match="images of 1×8×8: the model takes 3×8×8"):
        record(tiny().build(), torch.zeros(2, 1, 8, 8))


def test_logits_come_out_of_either_kind_of_model(tiny):
    ours, theirs = tiny().build().eval(), timm_vit().float()

    assert logits_of(ours, torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    assert logits_of(theirs, torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def test_a_timm_model_by_name_is_random_and_ready():
    model = timm_model("timm:test_vit")

    assert not model.training
    assert len(record(model, torch.zeros(1, 3, 160, 160)).weights) == len(model.blocks)


@pytest.mark.slow
def test_a_swin_by_name_answers_as_timms_own_and_tells_where_its_windows_lie():
    model = timm_model("timm:swin_tiny_patch4_window7_224")
    images = torch.randn(1, 3, 224, 224)

    recording = record(model, images)

    torch.testing.assert_close(recording.logits, model.network(images), atol=1e-5, rtol=1e-5)
    assert [place.grid for place in recording.windows] == [layout.grid for layout in model.attention]
    assert recording.grid == (56, 56)


def test_an_unknown_timm_name_is_answered_with_near_ones():
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        timm_model("vit_tinny_patch16_224")
    with pytest.raises(ConfigError, match="vit_tiny"):
        timm_model("zzz")


def test_weights_that_do_not_exist_are_reported():
    with pytest.raises(ConfigError, match="cannot be built"):
        timm_model("vit_tiny_patch16_224.no_such_weights", pretrained=True)


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(ConfigError, match=r"pip install 'vitkd\[timm\]'"):
        timm_model("vit_tiny_patch16_224")
