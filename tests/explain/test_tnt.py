"""The maps of a TNT's outer attention against the papers' formulas, over a TNT that is written by hand."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, unfold

from tests.explain.test_references import TARGET, grad_cam_by_hand
from tests.models.test_timm_tnt import SMALL
from vitkd.errors import ConfigError
from vitkd.explain.maps.flow import attention_gradients, relevance, rollout
from vitkd.explain.maps.methods import CLASS_SPECIFIC, explain_by, pytorch_grad_cam
from vitkd.explain.maps.recording import record, timm_model, who_reads
from vitkd.explain.maps.subjects import subject_of, with_regions
from vitkd.models import TimmConfig

# 2×3 patches of 2×2 words.
SHAPE = SMALL | {"img_size": [16, 24], "patch_size": 8}
HEADS, PATCHES, GRID = 3, 6, (2, 3)
OURS = ("attention", "rollout", "gradient_rollout", "relevance", "grad_cam")
READERS = {"token": "class token", "avg": "patches"}
BOTH_POOLS = pytest.mark.parametrize("global_pool", READERS)


def tnt(global_pool: str = "token") -> Any:
    """In float64, with weights so large that heads, images and classes differ."""
    options = SHAPE | {"global_pool": global_pool}
    config = TimmConfig(16, 3, 5, [0.5] * 3, [0.5] * 3, "tnt_s_patch16_224", options=options)
    torch.manual_seed(0)
    model = config.build().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    torch.nn.init.normal_(model.network.head.weight, std=20)  # gradients that do not vanish beside I
    return model


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=generator)


def normalised(norm: Any, x: Tensor) -> Tensor:
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def mixed(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What attention adds to tokens [..., T, D], and its weights [..., H, T, T]."""
    heads = attention.num_heads
    q, k = attention.qk(x).unflatten(-1, (2, heads, -1)).unbind(-3)
    v = attention.v(x).unflatten(-1, (heads, -1)).transpose(-2, -3)
    weights = torch.einsum("...qhd,...khd->...hqk", q, k) / q.shape[-1] ** 0.5
    weights = weights.softmax(-1)
    return attention.proj((weights @ v).transpose(-2, -3).flatten(-2)), weights


def fed_forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.fc2(gelu(mlp.fc1(x)))


def by_hand(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Han et al. 2021, equations 3 to 7: logits [B, K] and per block the outer weights [B, H, T, T]."""
    network, weights = model.network, []
    cut = unfold(model.inputs(x), 8, stride=8).mT.reshape(-1, 3, 8, 8)
    words = (network.pixel_embed.proj(cut) + network.pixel_pos).flatten(2).mT.unflatten(0, (-1, PATCHES))
    patches = normalised(network.norm1_proj, words.flatten(2))
    patches = normalised(network.norm2_proj, network.proj(patches))
    tokens = torch.cat([network.cls_token.expand(len(x), 1, -1), patches], 1) + network.patch_pos
    for block in network.blocks:
        words = words + mixed(block.attn_in, normalised(block.norm_in, words))[0]
        words = words + fed_forward(block.mlp_in, normalised(block.norm_mlp_in, words))
        added = block.proj(normalised(block.norm1_proj, words.flatten(2)))
        tokens = tokens + torch.nn.functional.pad(normalised(block.norm2_proj, added), (0, 0, 1, 0))
        change, attention = mixed(block.attn_out, normalised(block.norm_out, tokens))
        tokens = tokens + change
        tokens = tokens + fed_forward(block.mlp, normalised(block.norm_mlp, tokens))
        weights.append(attention)
    tokens = normalised(network.norm, tokens)
    read = tokens[:, 0] if network.global_pool == "token" else tokens[:, 1:].mean(1)
    return network.head(read), weights


def with_identity(matrix: Tensor) -> Tensor:
    return matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def product(factors: list[Tensor]) -> Tensor:
    flow = factors[0]
    for factor in factors[1:]:
        flow = factor @ flow
    return flow


def rows_scaled(factors: list[Tensor]) -> list[Tensor]:
    return [each / each.sum(-1, keepdim=True) for each in factors]


def expected_matrices(logits: Tensor, weights: list[Tensor]) -> dict[str, Tensor]:
    """Every method's matrix [B, T, T] over all tokens."""
    chosen = logits.gather(1, TARGET[:, None]).sum()
    gradients = torch.autograd.grad(chosen, weights, retain_graph=True)
    attends = [with_identity(each.mean(1)) for each in weights]
    speaks = [with_identity((a * g).clamp_min(0).mean(1)) for a, g in zip(weights, gradients, strict=True)]
    of_heads = gradients[-1].mean((-2, -1), keepdim=True)
    return {
        "attention": weights[-1].mean(1),
        "rollout": product(rows_scaled(attends)),
        "gradient_rollout": product(rows_scaled(speaks)),
        "relevance": product(speaks),
        "grad_cam": (of_heads * weights[-1]).mean(1).clamp_min(0),
    }


def read_by(global_pool: str, matrix: Tensor) -> Tensor:
    """The rows of what is classified, on the patches."""
    row = matrix[:, 0] if global_pool == "token" else matrix[:, 1:].mean(1)
    return row[:, 1:].unflatten(-1, GRID)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@BOTH_POOLS
def test_what_is_recorded_is_the_attention_among_patches(global_pool):
    model = tnt(global_pool)
    logits, weights = by_hand(model, images())

    recording = record(model, images())

    close(logits, model(images()).logits)
    close(recording.logits, logits)
    for ours, theirs in zip(recording.weights, weights, strict=True):
        close(ours, theirs)
    assert (recording.prefix, recording.grid, recording.windows) == (1, GRID, ())
    assert who_reads(recording) == READERS[global_pool]
    assert [tokens.shape for tokens in recording.tokens] == [(3, 1 + PATCHES, 12)] * 3


@BOTH_POOLS
def test_maps_are_the_papers_formulas(global_pool):
    model = tnt(global_pool)
    expected = expected_matrices(*by_hand(model, images()))

    for method in OURS:
        found = explain_by(method, model, images(), TARGET)
        maps = read_by(global_pool, expected[method])
        # Grad-CAM finds nothing for the class in some images.
        assert (maps.std((-2, -1)) > 0.01 * maps.mean()).any(), method
        torch.testing.assert_close(found.double(), maps, atol=1e-7, rtol=1e-5)


def test_every_tokens_rows_are_those_of_the_formulas_and_rollouts_sum_to_1():
    model = tnt()
    expected, recording = expected_matrices(*by_hand(model, images())), record(model, images())

    found = rollout(recording.weights)

    close(found, expected["rollout"])
    close(found.sum(-1), torch.ones(3, 1 + PATCHES, dtype=torch.float64))
    close(relevance(recording.weights, attention_gradients(recording, TARGET)), expected["relevance"])


def test_maps_of_another_class_differ_where_the_method_depends_on_it():
    model = tnt()
    for method in OURS:
        ours, others = (explain_by(method, model, images(), target) for target in (TARGET, TARGET.flip(0)))
        assert torch.equal(ours, others) == (method not in CLASS_SPECIFIC), method


def test_another_packages_grad_cam_reads_the_patches_before_the_last_outer_attention():
    pytest.importorskip("pytorch_grad_cam")
    model = tnt()

    found = pytorch_grad_cam(model, images(), TARGET)

    norm = model.network.blocks[-1].norm_out
    expected = grad_cam_by_hand(model, norm, images(), TARGET, GRID)
    assert expected.amax((1, 2)).max() > 0.99
    # The package divides by the maximum plus 1e-7, twice.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_subject_holds_every_block_and_what_its_patches_attend_to():
    model = tnt()
    _, weights = by_hand(model, images())

    subject, features = subject_of("it", model, images(), ["attention", "rollout"])

    maps = torch.from_numpy(subject.maps["attention"])
    rows = torch.stack([each[:, :, 0, 1:].unflatten(-1, GRID) for each in weights], 1)
    torch.testing.assert_close(maps, rows.float())
    of_patches = torch.stack([each[:, :, 1:, 1:].unflatten(-1, GRID) for each in weights], 1)
    torch.testing.assert_close(torch.from_numpy(subject.patches), of_patches.float())
    assert with_regions(subject, features, 2).maps["regions"].shape == (3, *GRID)


def test_timms_network_alone_is_refused_by_the_name_of_what_takes_it():
    network = timm.create_model("tnt_s_patch16_224", **SHAPE | {"img_size": 16})

    with pytest.raises(ConfigError, match=r"^TNT attends within patches too, [^\n]*TimmModel of TNT[^\n]*$"):
        record(network, torch.zeros(1, 3, 16, 16))


@pytest.mark.slow
def test_a_tnt_by_name_answers_as_timms_own():
    model = timm_model("timm:tnt_s_patch16_224")
    pixels = torch.randn(1, 3, 224, 224)

    recording = record(model, pixels)

    torch.testing.assert_close(recording.logits, model.network(pixels), atol=1e-5, rtol=1e-5)
    assert [each.shape for each in recording.weights] == [(1, 6, 197, 197)] * 12
    assert recording.grid == (14, 14)


@pytest.mark.slow
def test_the_command_draws_a_tnt_of_timms(command, tmp_path):
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(photo)
    methods = "methods=[attention,rollout,relevance]"

    ended = command("explain", "model=timm:tnt_s_patch16_224", f"image={photo}", methods, f"out={out}")

    assert (ended.code, ended.err) == (0, "")
    with np.load(out / "maps.npz", allow_pickle=False) as found:
        assert found["tnt_s_patch16_224/attention"].shape == (1, 12, 6, 14, 14)
        for method in ("rollout", "relevance"):
            assert found[f"tnt_s_patch16_224/{method}"].shape == (1, 14, 14)
    assert (out / "index.html").is_file()
