"""Swin's attention as rows of windows, compared with timm's own code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.beside_timm import beside_timm
from vitkd.errors import ConfigError
from vitkd.models import Taps, TimmConfig, load_model, save_model

SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
}
# Windows of other sizes: of a side not the other's, of a whole stage, and of V2's cosines.
FORMS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"window_size": [4, 2]},
    "swin_s3_tiny_224": {"window_size": 2, "head_dim": 8},
    "swinv2_tiny_window8_256": {"window_size": [2, 4]},
}
IMAGE = (2, 3, 32, 32)
READ = pytest.mark.parametrize("name", FORMS)
ALL = (0, 1, 2, 3)


def config_of(name: str, **options: Any) -> TimmConfig:
    config = TimmConfig(32, 3, 5, [0.5] * 3, [0.5] * 3, name, options=SMALL | options)
    config.mean, config.std = [*config.facts.mean], [*config.facts.std]
    return config


def images() -> Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def both(name: str, **options: Any) -> tuple[Any, Any]:
    # Biases of positions begin so small that nobody would miss them.
    return beside_timm(config_of(name, **FORMS[name] | options), noise=0.1)


def blocks_of(network: Any) -> list[Any]:
    return [block for stage in network.layers for block in stage.blocks]


@READ
def test_softmax_of_the_scores_is_what_timm_multiplies_the_values_with(name):
    model, network = both(name)
    seen: list[Tensor] = []
    for block in blocks_of(network):
        block.attn.attn_drop.register_forward_hook(lambda _, __, weights: seen.append(weights))
    network(images())

    output = model(images(), Taps(scores=ALL))

    for block, (weights, layout) in enumerate(zip(seen, model.attention, strict=True)):
        scores, keys = output.scores[block], weights.shape[-1]
        assert scores.shape == (2, layout.heads, layout.windows * keys, keys)
        masked = scores if layout.mask is None else scores.masked_fill(~layout.mask, -torch.inf)
        # timm has [images · windows, heads, …]: window w of image b in row b · windows + w.
        windows = masked.softmax(-1).unflatten(2, (layout.windows, keys)).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(windows, weights, atol=1e-6, rtol=0)


def test_layouts_are_those_of_each_stage():
    layouts = both("swin_tiny_patch4_window7_224", window_size=4)[0].attention

    assert [layout.grid for layout in layouts] == [(8, 8), (8, 8), (4, 4), (4, 4)]
    assert [layout.windows for layout in layouts] == [4, 4, 1, 1]
    assert [(layout.heads, layout.head_dim) for layout in layouts] == [(2, 6)] * 2 + [(3, 8)] * 2
    assert [layout.mask is None for layout in layouts] == [True, False, True, True]
    assert {(layout.prefix, layout.has_class_token) for layout in layouts} == {(0, False)}
    assert [len(layout.readers) for layout in layouts] == [64, 64, 16, 16]


def test_the_mask_keeps_apart_what_only_the_shift_made_neighbours():
    (_, layout, *_) = both("swin_tiny_patch4_window7_224", window_size=4)[0].attention
    # Where each token of each window stood before the shift, by plain arithmetic.
    places = [
        [((2 + 4 * row + r) % 8, (2 + 4 * column + c) % 8) for r in range(4) for c in range(4)]
        for row in range(2)
        for column in range(2)
    ]

    for window, its_places in enumerate(places):
        for query, (row, column) in enumerate(its_places):
            for key, (other_row, other_column) in enumerate(its_places):
                is_near = abs(row - other_row) < 4 and abs(column - other_column) < 4
                assert bool(layout.mask[window * 16 + query, key]) == is_near


@READ
def test_logits_are_timms_own(name):
    model, network = both(name)
    expected = network(images())

    assert torch.equal(model(images()).logits, expected)
    tapped = model(images(), Taps(scores=ALL, qkv=ALL, features=("embed", "block1", "pre_logits")))
    torch.testing.assert_close(tapped.logits, expected, atol=1e-6, rtol=1e-6)
    (of_stage,) = network.forward_intermediates(images(), indices=[0], intermediates_only=True)
    torch.testing.assert_close(tapped.features["block1"], of_stage.flatten(2).mT, atol=1e-5, rtol=1e-5)
    pre_logits = network.forward_head(network.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(tapped.features["pre_logits"], pre_logits, atol=1e-5, rtol=1e-5)


@READ
def test_without_logits_scores_are_the_same_and_nothing_is_left(name):
    model, network = both(name)
    whole = model(images(), Taps(scores=ALL))

    for block in ALL:
        alone = model(images(), Taps(scores=(block,), logits=False))
        torch.testing.assert_close(alone.scores[block], whole.scores[block], atol=1e-5, rtol=0)
    assert torch.equal(model(images()).logits, network(images()))
    assert all(block.attn.output is None for block in blocks_of(model.network))


@READ
def test_a_file_holds_the_whole_model(name, tmp_path):
    model, network = both(name)
    save_model(model, tmp_path / "student.safetensors")

    loaded = load_model(tmp_path)

    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded(images()).logits, network(images()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"window_size": 3},
            r"window_size=3: does not divide the 8 patches .* of stage 0; choose one of 1, 2, 4, 8",
        ),
        ({"patch_size": 5}, r"img_size=32: patch_size=5 does not divide it"),
        ({"depth": 2}, r"depth: is no setting of timm's swin_\w+; .*depths"),
        ({"num_heads": [2]}, r"timm cannot build that"),
        ({"depths": [2, 0]}, r"depths: stage 1 has no blocks"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(options, says):
    with pytest.raises(ConfigError, match=rf"^[^\n]*{says}[^\n]*$"):
        config_of("swin_tiny_patch4_window7_224", **options)
