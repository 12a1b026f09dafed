"""Hand-computed fusions of heads and rows of tokens."""

import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import cls_attention, fuse, token_map

# Two heads, two tokens.
WEIGHTS = torch.tensor([[[[0.9, 0.1], [0.4, 0.6]], [[0.3, 0.7], [0.2, 0.8]]]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [[0.6, 0.4], [0.3, 0.7]]),
        ("max", [[0.9, 0.7], [0.4, 0.8]]),
        ("min", [[0.3, 0.1], [0.2, 0.6]]),
    ],
)
def test_heads_are_fused_entry_by_entry(how, expected):
    torch.testing.assert_close(fuse(WEIGHTS, how), torch.tensor([expected]))


def test_only_the_chosen_heads_count():
    assert torch.equal(fuse(WEIGHTS, heads=[1]), WEIGHTS[:, 1])
    weights = torch.rand(3, 4, 5, 5)
    torch.testing.assert_close(fuse(weights, "max", heads=(0, 3)), weights[:, [0, 3]].amax(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "mode"}, "head fusion mode: there are max, mean, min"),
        ({"heads": [0, 2]}, "heads 2: must be 0 to 1, at least one"),
        ({"heads": [-1]}, "heads -1"),
        ({"heads": []}, "heads none"),
    ],
)
def test_what_cannot_be_fused_is_reported(arguments, message):
    with pytest.raises(ConfigError, match=message):
        fuse(WEIGHTS, **arguments)


def test_bf16_weights_are_averaged_in_float32():
    weights = torch.rand(2, 7, 5, 5).bfloat16()

    fused = fuse(weights)

    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, weights.float().mean(1))


# Row i, column j holds 10·i + j: 2 tokens before 2 × 3 patches.
MATRIX = (10 * torch.arange(8.0)[:, None] + torch.arange(8.0))[None]


def test_a_tokens_row_is_laid_out_over_the_patches():
    assert token_map(MATRIX, (2, 3), prefix=2).tolist() == [[[2, 3, 4], [5, 6, 7]]]
    assert token_map(MATRIX, (2, 3), prefix=2, readers=[4]).tolist() == [[[42, 43, 44], [45, 46, 47]]]


def test_several_tokens_rows_are_averaged():
    assert token_map(MATRIX, (2, 3), prefix=2, readers=(0, 1)).tolist() == [[[7, 8, 9], [10, 11, 12]]]
    # Rows 2 to 7 have the mean 4.5.
    assert token_map(MATRIX, (2, 3), prefix=2, readers=range(2, 8)).tolist() == [[[47, 48, 49], [50, 51, 52]]]


def test_normalised_maps_sum_to_one_and_an_empty_one_stays_empty():
    matrix = torch.stack([MATRIX[0], torch.eye(8)])

    maps = token_map(matrix, (2, 3), prefix=2, normalise=True)

    torch.testing.assert_close(maps[0], torch.tensor([[2.0, 3, 4], [5, 6, 7]]) / 27)
    assert torch.equal(maps[1], torch.zeros(2, 3))


def test_the_panels_map_is_the_mean_heads_class_token_row():
    scores = torch.randn(3, 4, 10, 10)

    ours = token_map(fuse(scores.softmax(-1)), (3, 3), normalise=True)

    torch.testing.assert_close(ours, cls_attention(scores, 3))


def test_wrong_grids_and_tokens_are_reported():
    with pytest.raises(ConfigError, match="8 tokens are not 1 and 2×3 patches"):
        token_map(MATRIX, (2, 3), prefix=1)
    for readers, bad in (([-1], "-1"), ([0, 8], "8"), ([], "none")):
        with pytest.raises(ConfigError, match=f"tokens {bad}: must be 0 to 7, at least one, patches from 2"):
            token_map(MATRIX, (2, 3), prefix=2, readers=readers)
