"""Regions of attention: planted ones are found, in order, and mean the same in every image."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from vitkd.errors import ConfigError
from vitkd.explain.maps.attention import attention_features, region_map


def maps(*shape, tokens):
    return torch.randn(*shape, tokens, tokens, dtype=torch.float64).softmax(-1)


def planted(images=6, side=8, levels=(0.2, 1.0, 3.0)):
    """True labels [B, side, side] in random places, and features [B, N, 4] around each label's level."""
    labels = torch.randint(len(levels), (images, side, side))
    features = torch.tensor(levels)[labels].flatten(1)[..., None] + 0.05 * torch.randn(images, side**2, 4)
    return labels, features


def test_features_by_brute_force():
    blocks = [maps(2, 3, tokens=8) for _ in range(2)]
    got = attention_features(blocks, (2, 3), prefix=2)
    assert got.shape == (2, 6, 4)
    for image in range(2):
        for block in range(2):
            weights = blocks[block][image]
            received = [
                sum(weights[h, q, 2 + patch].item() for h in range(3) for q in range(8)) for patch in range(6)
            ]
            by_class = [sum(weights[h, 0, 2 + patch].item() for h in range(3)) for patch in range(6)]
            for column, drawn in ((block, received), (2 + block, by_class)):
                expected = [6 * each / sum(drawn) for each in drawn]
                assert got[image, :, column].tolist() == pytest.approx(expected)


def test_features_are_in_even_shares():
    uniform = [torch.full((2, 3, 7, 7), 1 / 7)]
    torch.testing.assert_close(attention_features(uniform, (2, 3)), torch.ones(2, 6, 2))
    features = attention_features([maps(4, 2, tokens=7)] * 2, (2, 3))
    torch.testing.assert_close(features.mean(1), torch.ones(4, 4).double())


def test_features_are_laid_out_row_by_row():
    # Everything goes to patch 4, which is row 1, column 1 of 2 × 3.
    weights = torch.zeros(1, 1, 7, 7)
    weights[..., 1 + 4] = 1
    expected = torch.zeros(1, 2, 3)
    expected[0, 1, 1] = 6
    features = attention_features([weights], (2, 3)).unflatten(1, (2, 3))
    torch.testing.assert_close(features, expected[..., None].expand_as(features))


def test_an_average_of_patches_may_stand_for_the_class_token():
    weights = maps(2, 3, tokens=6)
    got = attention_features([weights], (2, 3), prefix=0, readers=range(6))
    torch.testing.assert_close(got[..., 0], got[..., 1])


def test_two_tokens_that_are_classified_count_alike():
    weights = maps(2, 3, tokens=8)
    got = attention_features([weights], (2, 3), prefix=2, readers=(0, 1))
    rows = (weights[:, :, 0] + weights[:, :, 1]).mean(1)[:, 2:]
    torch.testing.assert_close(got[..., 1], 6 * rows / rows.sum(1, keepdim=True))


def test_patches_that_draw_nothing_are_at_zero():
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 0] = 1
    assert not attention_features([weights], (2, 2)).any()
    assert not region_map(attention_features([weights], (2, 2)), 3).any()


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="7 tokens are not 1 and 2×2 patches"):
        attention_features([maps(1, 1, tokens=7)], (2, 2))


def test_planted_regions_are_found():
    labels, features = planted()
    got = region_map(features, 3)
    assert got.dtype == torch.int64
    assert adjusted_rand_score(labels.flatten(), got.flatten()) == 1
    # And numbered by activity.
    assert torch.equal(got, labels)


def test_a_label_means_the_same_in_every_image():
    """An image whose patches are all active is of the highest region, not split into its own."""
    labels, features = planted()
    features[0] = 3.0 + 0.05 * torch.randn(64, 4)
    assert torch.equal(region_map(features, 3)[0], torch.full((8, 8), 2))
    assert torch.equal(region_map(features, 3)[1:], labels[1:])


@pytest.mark.parametrize("levels", [(3.0, 1.0, 0.2), (1.0, 3.0, 0.2)])
def test_regions_are_ordered_whatever_kmeans_calls_them(levels):
    labels, features = planted(levels=levels)
    rank = torch.tensor([sorted(levels).index(level) for level in levels])
    for seed in range(5):
        assert torch.equal(region_map(features, 3, seed), rank[labels])


def test_the_seed_decides():
    features = torch.rand(3, 16, 2)
    assert torch.equal(region_map(features, 5, seed=1), region_map(features, 5, seed=1))


def test_the_same_regions_from_attention_itself():
    """The class token and all others look three times as much at the left half as at the right."""
    weights = torch.ones(2, 2, 17, 17)
    left = torch.arange(16) % 4 < 2
    weights[..., 1:] = torch.where(left, 3.0, 1.0)
    weights[1] = 1  # An image that is looked at evenly lies between both.
    weights = weights / weights.sum(-1, keepdim=True)
    got = region_map(attention_features([weights], (4, 4)), 3)
    assert torch.equal(got[0], torch.where(left, 2, 0).view(4, 4))
    assert torch.equal(got[1], torch.ones(4, 4, dtype=torch.int64))


def test_patches_need_not_lie_in_a_square():
    assert region_map(torch.rand(2, 6, 3), 2, grid=(2, 3)).shape == (2, 2, 3)
    with pytest.raises(ConfigError, match="6 patches do not fill 2×2: give their grid"):
        region_map(torch.rand(2, 6, 3), 2)
    with pytest.raises(ConfigError, match="6 patches do not fill 4×2"):
        region_map(torch.rand(2, 6, 3), 2, grid=(4, 2))


def test_fewer_distinct_patches_than_clusters():
    features = torch.tensor([0.0, 1.0, 1.0, 0.0])[None, :, None].expand(300, 4, 2)
    got = region_map(features, 4)
    assert torch.equal(got, torch.tensor([[0, 1], [1, 0]]).expand(300, 2, 2))


def test_rounding_makes_no_regions():
    features = 1 + 1e-7 * torch.randn(5, 16, 2)
    assert not region_map(features, 3).any()


def test_rare_distinct_patches_count():
    """Looking at the first patches only would not find the third kind."""
    features = torch.zeros(100, 16, 1)
    features[-1, -1], features[-1, -2] = 1.0, 5.0
    got = region_map(features, 3)
    assert [got[-1, -1, -1].item(), got[-1, -1, -2].item()] == [1, 2]
    assert got.sum() == 3


def test_no_clusters_are_refused():
    with pytest.raises(ConfigError, match="clusters=0: must be at least 1"):
        region_map(torch.rand(2, 4, 3), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_lie_where_the_features_do():
    _, features = planted()
    got = region_map(features.cuda(), 3)
    assert got.is_cuda
    assert torch.equal(got.cpu(), region_map(features, 3))
