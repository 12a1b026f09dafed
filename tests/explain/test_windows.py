"""Attention within windows against explicit T×T matrices, of a Swin written over all pairs of tokens."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.explain.maps import subjects
from vitkd.explain.maps.flow import (
    attention_grad_cam,
    attention_gradients,
    gradient_rollout,
    relevance,
    rollout,
    windowed_gradient_rollout,
    windowed_relevance,
    windowed_rollout,
)
from vitkd.explain.maps.methods import CLASS_SPECIFIC, explain_by
from vitkd.explain.maps.recording import Recording, record, who_reads
from vitkd.explain.maps.subjects import subject_of, with_regions
from vitkd.explain.maps.windows import given, identity, on_patches, received, times, unmerged, windows_of
from vitkd.explain.measures.distances import locality, windowed_locality
from vitkd.models import TimmConfig
from vitkd.models.output import AttentionLayout
from vitkd.train.pictures import look

# 8×8 patches in windows of 4×2, then 4×4 tokens in two windows. The second block of each stage is shifted,
# that of the second stage from left to right only.
SHAPE = {
    "img_size": 16,
    "patch_size": 2,
    "window_size": [4, 2],
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
}
SINGLE = {"window_size": 8, "depths": [3], "num_heads": [2]}
OURS = ("attention", "rollout", "gradient_rollout", "relevance", "grad_cam")


def swin(name: str = "swin_tiny_patch4_window7_224", **options: Any) -> Any:
    """In float64, with weights so large that heads, images and classes differ."""
    config = TimmConfig(16, 3, 5, [0.5] * 3, [0.5] * 3, name, options=SHAPE | options)
    model = config.build().double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


TARGET = torch.tensor([3, 1])


class Dense(NamedTuple):
    """A Swin's forward pass over all pairs of tokens."""

    logits: Tensor
    weights: list[Tensor]
    """per block [B, H, T, T], in the graph"""
    grids: list[tuple[int, int]]


def is_seen(block: Any, grid: tuple[int, int], query: int, key: int) -> bool:
    """Whether both lie in one window after the shift, and did not come there from opposite borders."""
    for side in (0, 1):
        size, window, shift = grid[side], block.window_size[side], block.shift_size[side]
        places = [(divmod(token, grid[1])[side] - shift) % size for token in (query, key)]
        # What the shift carried around the border stands in the last `shift` places.
        if places[0] // window != places[1] // window or len({at >= size - shift for at in places}) > 1:
            return False
    return True


def scores_added(block: Any, grid: tuple[int, int]) -> Tensor:
    """The position bias [H, T, T] by the distance of two tokens; −∞ where they do not see each other."""
    tokens, (height, width) = grid[0] * grid[1], block.window_size
    table = block.attn.relative_position_bias_table
    added = torch.full((table.shape[1], tokens, tokens), -torch.inf, dtype=torch.float64)
    for query in range(tokens):
        for key in range(tokens):
            if is_seen(block, grid, query, key):
                (row, column), (other_row, other_column) = divmod(query, grid[1]), divmod(key, grid[1])
                place = (row - other_row + height - 1) * (2 * width - 1) + column - other_column + width - 1
                added[:, query, key] = table[place].detach()
    return added


def densely(model: Any, x: Tensor) -> Dense:
    """What timm's Swin computes, with every block's attention as matrices over all its tokens."""
    network, weights, grids = model.network, [], []
    x = network.patch_embed(model.inputs(x))
    for stage in network.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            grid, heads = (x.shape[1], x.shape[2]), block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(x).flatten(1, 2)).unflatten(-1, (3, heads, -1)).unbind(2)
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            a = (q @ k.mT / q.shape[-1] ** 0.5 + scores_added(block, grid)).softmax(-1)
            mixed = block.attn.proj((a @ v).transpose(1, 2).flatten(2)).view_as(x)
            x = x + mixed
            x = x + block.mlp(block.norm2(x))
            weights.append(a)
            grids.append(grid)
    return Dense(network.head.fc(network.norm(x).mean((1, 2))), weights, grids)


def merging(grid: tuple[int, int]) -> Tensor:
    """M [T/4, T]: a quarter of each of the four tokens that become one."""
    rows, columns = grid
    matrix = torch.zeros(rows // 2, columns // 2, rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            matrix[row // 2, column // 2, row, column] = 1 / 4
    return matrix.flatten(2).flatten(0, 1)


def product(factors: list[Tensor], grids: list[tuple[int, int]]) -> Tensor:
    """F_L ⋯ M ⋯ F_1 [B, T_L, T_1]."""
    flow = factors[0]
    for factor, (below, above) in zip(factors[1:], pairwise(grids), strict=True):
        flow = factor @ (flow if below == above else merging(below) @ flow)
    return flow


def positive(dense: Dense) -> list[Tensor]:
    """mean_h((∇A ⊙ A)⁺) of each block, with ∇A by autograd through the dense model."""
    chosen = dense.logits.gather(1, TARGET[:, None]).sum()
    gradients = torch.autograd.grad(chosen, dense.weights, retain_graph=True)
    return [(a * g).clamp_min(0).mean(1) for a, g in zip(dense.weights, gradients, strict=True)]


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype)


def half(matrices: list[Tensor]) -> list[Tensor]:
    return [(a + eye(a)) / (a + eye(a)).sum(-1, keepdim=True) for a in matrices]


def grad_cam_of_last(model: Any, dense: Dense) -> Tensor:
    """[B, T, T]: a head weighs as much as the mean of its gradient over all pairs within windows."""
    weights, windows = dense.weights[-1], model.attention[-1].windows
    chosen = dense.logits.gather(1, TARGET[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, weights, retain_graph=True)
    pairs = weights.shape[-1] ** 2 // windows
    within = times(torch.eye(16).double(), torch.ones(16, 8).double(), windows_of(model.attention[-1])) > 0
    return ((gradient * within).sum((-2, -1), keepdim=True) / pairs * weights).mean(1).clamp_min(0)


def expected_maps(model: Any, dense: Dense) -> dict[str, Tensor]:
    """Every method's maps from dense matrices."""
    grids, speaks, attends = dense.grids, positive(dense), [a.mean(1) for a in dense.weights]
    to_patches = merging((8, 8))
    return {
        name: matrix.mean(1).unflatten(-1, (8, 8))
        for name, matrix in {
            "attention": attends[-1] @ to_patches,
            "grad_cam": grad_cam_of_last(model, dense) @ to_patches,
            "rollout": product(half(attends), grids),
            "gradient_rollout": product(half(speaks), grids),
            "relevance": product([a + eye(a) for a in speaks], grids),
        }.items()
    }


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return swin()


@pytest.fixture(scope="module")
def recording(model: Any) -> Recording:
    return record(model, images())


@pytest.fixture(scope="module")
def dense(model: Any) -> Dense:
    return densely(model, images())


def test_a_blocks_windows_are_one_matrix_of_the_image(recording, dense):
    """The shift is undone, and what the model masks or what lies in another window is 0."""
    masks = []
    for weights, place, expected in zip(recording.weights, recording.windows, dense.weights, strict=True):
        own = torch.eye(expected.shape[-1], dtype=torch.float64)
        found = times(own, weights, place)
        close(found, expected)
        assert found[expected == 0].max() < 1e-30
        masks.append((times(own, torch.ones_like(weights), place)[expected == 0] > 0).any().item())
    # Pairs of one window that only the shift made neighbours are among the zeros.
    assert masks == [False, True, False, True]


def test_logits_and_tokens_are_those_of_the_model(model, recording, dense):
    close(dense.logits, model(images()).logits, 1e-10)
    close(recording.logits, dense.logits, 1e-10)
    assert [tokens.shape for tokens in recording.tokens] == [(2, 64, 12)] * 2 + [(2, 16, 24)] * 2
    assert (recording.grid, recording.prefix, who_reads(recording)) == ((8, 8), 0, "patches")


@pytest.mark.parametrize("method", OURS)
def test_maps_are_those_of_dense_matrices(method, model, dense):
    expected = expected_maps(model, dense)[method]

    found = explain_by(method, model, images(), TARGET)

    assert expected.std((-2, -1)).min() > 1e-3 * expected.mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=1e-5)


def test_gradients_are_those_of_the_dense_model(model, recording, dense):
    """What relevance is made of, entry by entry."""
    gradients = attention_gradients(recording, TARGET)

    for weights, gradient, place, expected in zip(
        recording.weights, gradients, recording.windows, positive(dense), strict=True
    ):
        own = torch.eye(expected.shape[-1], dtype=torch.float64)
        close(times(own, (weights * gradient).clamp_min(0).mean(1), place), expected)


def test_every_tokens_rollout_sums_to_1_and_is_the_dense_one(recording, dense):
    every_token = torch.eye(16, dtype=torch.float64)

    found = windowed_rollout(recording.weights, recording.windows, every_token)

    assert found.shape == (2, 16, 8, 8)
    close(found.sum((-2, -1)), torch.ones(2, 16, dtype=torch.float64))
    close(found.flatten(2), product(half([a.mean(1) for a in dense.weights]), dense.grids))
    close(found.mean(1), windowed_rollout(recording.weights, recording.windows))


def test_every_tokens_relevance_is_the_dense_one(recording, dense):
    gradients = attention_gradients(recording, TARGET)

    found = windowed_relevance(recording.weights, gradients, recording.windows, torch.eye(16).double())

    close(found.flatten(2), product([a + eye(a) for a in positive(dense)], dense.grids))


def test_in_a_single_window_without_merging_it_is_the_vits_formula():
    model = swin(**SINGLE)
    recording = record(model, images())
    weights, gradients = recording.weights, attention_gradients(recording, TARGET)

    assert weights[0].shape == (2, 2, 64, 64)
    for ours, vits in (
        (windowed_rollout(weights, recording.windows), rollout(weights)),
        (windowed_relevance(weights, gradients, recording.windows), relevance(weights, gradients)),
        (
            windowed_gradient_rollout(weights, gradients, recording.windows),
            gradient_rollout(weights, gradients),
        ),
        (
            received(attention_grad_cam(weights, gradients), recording.windows),
            attention_grad_cam(weights, gradients),
        ),
    ):
        close(ours, vits.mean(1).unflatten(-1, (8, 8)))


def layout(shift: tuple[int, int] = (0, 0), grid: tuple[int, int] = (4, 6)) -> AttentionLayout:
    return AttentionLayout(1, 4, grid, 0, (), window=(2, 3), shift=shift)


def test_windows_without_a_shift_lie_side_by_side():
    place = windows_of(layout())

    assert place.tokens.tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]
    # Shifted by one down and two across, the first begins there and the last holds all four corners.
    shifted = windows_of(layout((1, 2))).tokens.tolist()
    assert shifted[0] == [8, 9, 10, 14, 15, 16]
    assert shifted[3] == [23, 18, 19, 5, 0, 1]
    # By a whole turn, it is no shift.
    assert torch.equal(windows_of(layout((4, 6))).tokens, place.tokens)


def test_a_token_that_attends_to_itself_keeps_its_row():
    place, rows = windows_of(layout((1, 2))), torch.randn(3, 5, 24)

    torch.testing.assert_close(times(rows, identity(place, rows).expand(3, -1, -1), place), rows)


def test_merging_shares_a_row_among_the_four_that_became_one():
    rows = torch.randn(2, 24, dtype=torch.float64)

    close(unmerged(rows, (4, 6), (8, 12)), rows @ merging((8, 12)))
    assert unmerged(rows, (4, 6), (4, 6)) is rows
    # A corner of an odd grid is a token alone.
    odd = unmerged(torch.tensor([4.0, 2.0, 6.0, 3.0]), (2, 2), (3, 3)).view(3, 3)
    assert odd.tolist() == [[1, 1, 1], [1, 1, 1], [3, 3, 3]]


def test_a_patch_asks_as_the_token_that_it_became_part_of(recording, dense):
    expected = dense.weights[2] @ merging((8, 8))

    found = given(recording.weights[2], recording.windows[:3])

    assert found.shape == (2, 3, 64, 8, 8)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        token = row // 2 * 4 + column // 2
        close(found[:, :, row * 8 + column].flatten(2), expected[:, :, token])
    close(found.mean(2), received(recording.weights[2], recording.windows[:3]))
    close(on_patches(dense.weights[2].mean(2), recording.windows[:3]), found.mean(2))


@pytest.mark.parametrize("name", ["swin_s3_tiny_224", "swinv2_tiny_window8_256"])
def test_other_forms_of_swin_have_maps_too(name):
    model = swin(name, window_size=4)

    maps = {method: explain_by(method, model, images(), TARGET) for method in OURS}

    assert {each.shape for each in maps.values()} == {(2, 8, 8)}
    for method in ("attention", "rollout", "gradient_rollout"):
        torch.testing.assert_close(maps[method].sum((-2, -1)), torch.ones(2))


def test_maps_of_another_class_differ_where_the_method_depends_on_it(model):
    for method in OURS:
        ours, others = (explain_by(method, model, images(), target) for target in (TARGET, TARGET.flip(0)))
        assert torch.equal(ours, others) == (method not in CLASS_SPECIFIC), method


def test_distances_are_those_of_the_dense_maps(recording, dense):
    found = windowed_locality(recording.weights, recording.windows)

    assert found.shape == (2, 4, 3)
    # The first stage has two heads.
    assert found[:, :2, 2].isnan().all()
    for block, (weights, grid) in enumerate(zip(dense.weights, dense.grids, strict=True)):
        close(found[:, block, : weights.shape[1]], locality([weights], grid, prefix=0)[:, 0])


def test_a_subject_holds_every_block_on_the_patches(model, dense):
    subject, features = subject_of("it", model, images(), ["attention", "rollout", "random"])

    attention = subject.maps["attention"]
    assert (attention.shape, [*subject.heads]) == ((2, 4, 3, 8, 8), [2, 2, 3, 3])
    assert (attention[:, :2, 2] == 0).all()
    for block, weights in enumerate(dense.weights):
        means = weights.mean(2) if block < 2 else weights.mean(2) @ merging((8, 8))
        maps = torch.from_numpy(attention[:, block, : weights.shape[1]]).flatten(2)
        torch.testing.assert_close(maps.double(), means, atol=1e-7, rtol=1e-5)
    # Of this page every patch can be asked, by each head.
    assert subject.patches.shape == (2, 4, 3, 64, 8, 8)
    assert features.shape == (2, 64, 4)
    torch.testing.assert_close(features.mean(1), torch.ones(2, 4, dtype=features.dtype))
    assert with_regions(subject, features, 3).maps["regions"].shape == (2, 8, 8)


def test_where_heads_are_averaged_the_missing_ones_do_not_count(model, dense, monkeypatch):
    monkeypatch.setattr(subjects, "MAX_ATTENTION_VALUES", 1)

    subject, _ = subject_of("it", model, images(), ["attention"])

    assert (subject.maps["attention"].shape, [*subject.heads]) == ((2, 4, 1, 8, 8), [])
    expected = dense.weights[0].mean((1, 2)).unflatten(-1, (8, 8)).float()
    torch.testing.assert_close(torch.from_numpy(subject.maps["attention"][:, 0, 0]), expected)


def test_pictures_during_training_are_the_same_maps(model):
    subject, _ = subject_of("it", model, images(), ["attention"])

    maps, labels = look(model, images(), {1: [1], 3: [0, 2]})

    assert labels == [*subject.predicted]
    attention = torch.from_numpy(subject.maps["attention"])
    torch.testing.assert_close(maps[1].float(), attention[:, 1, 1])
    torch.testing.assert_close(maps[3].float(), attention[:, 3, [0, 2]].mean(1))


def test_another_packages_grad_cam_has_no_one_grid_to_read(model):
    with pytest.raises(ConfigError, match=r"^methods=pytorch_grad_cam: [^\n]*methods=grad_cam[^\n]*$"):
        explain_by("pytorch_grad_cam", model, images().float(), TARGET)


def test_recording_leaves_the_model_as_it_was(model):
    before = model(images()).logits

    record(model, images())

    assert torch.equal(model(images()).logits, before)
    assert all(block.attn.output is None for block in model.encoder.blocks)
