"""Attention maps computed by hand."""

import math

import pytest
import torch

from vitkd.explain.gallery.figures import denormalise, upsample
from vitkd.explain.maps.attention import cls_attention


def scores_of(rows):
    """[B, H, 5, 5] whose class token's row is `rows` [B, H, 5]; the other rows must not count."""
    rows = torch.tensor(rows)
    scores = torch.full((*rows.shape[:2], 5, 5), 7.0)
    scores[..., 0, :] = rows
    return scores


def test_one_head_by_hand():
    # exp of the row is 4, 1, 2, 3, 10: the patches share 1 + 2 + 3 + 10 = 16, whatever CLS keeps for itself.
    row = [math.log(4), 0.0, math.log(2), math.log(3), math.log(10)]
    expected = torch.tensor([[[1 / 16, 2 / 16], [3 / 16, 10 / 16]]])
    torch.testing.assert_close(cls_attention(scores_of([[row]]), grid=2), expected)


def test_heads_are_averaged_before_renormalising():
    # Head 0 keeps 6 of 10 parts for CLS and gives each patch 1; head 1 keeps nothing and looks at one patch.
    # The means are .3, .55, .05, .05, .05, so the patches share .7.
    rows = [[[math.log(6), 0.0, 0.0, 0.0, 0.0], [-100.0, 0.0, -100.0, -100.0, -100.0]]]
    expected = torch.tensor([[[0.55, 0.05], [0.05, 0.05]]]) / 0.7
    torch.testing.assert_close(cls_attention(scores_of(rows), grid=2), expected)


def test_only_the_chosen_heads_count():
    scores = torch.randn(3, 4, 10, 10)
    torch.testing.assert_close(cls_attention(scores, 3, heads=[2]), cls_attention(scores[:, 2:3], 3))
    torch.testing.assert_close(cls_attention(scores, 3, heads=(0, 3)), cls_attention(scores[:, [0, 3]], 3))
    torch.testing.assert_close(cls_attention(scores, 3, heads=range(4)), cls_attention(scores, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_maps_sum_to_one(dtype):
    maps = cls_attention(torch.randn(5, 3, 17, 17, dtype=dtype) * 10, grid=4)
    assert maps.shape == (5, 4, 4)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(5, dtype=maps.dtype))


def test_a_class_token_that_looks_at_itself_alone_gives_an_empty_map():
    maps = cls_attention(scores_of([[[1000.0, 0.0, 0.0, 0.0, 0.0]]]), grid=2)
    assert torch.equal(maps, torch.zeros(1, 2, 2))


def test_a_distillation_token_looks_as_much_as_the_class_token():
    # Of 6 tokens the last 4 are patches. CLS gives them 1, 2, 3 and 4 of 20 parts; the distillation token
    # 8, 2, 0 and 0. The means are 9, 4, 3 and 4 of 40.
    rows = torch.tensor([[9.0, 1, 1, 2, 3, 4], [5, 5, 8, 2, 0, 0]]).log()
    scores = torch.full((1, 1, 6, 6), 7.0)
    scores[..., :2, :] = rows
    expected = torch.tensor([[[9.0, 4], [3, 4]]]) / 20
    torch.testing.assert_close(cls_attention(scores, grid=2, prefix=2, readers=(0, 1)), expected)


def test_what_is_masked_gets_nothing():
    # Unmasked, CLS would give itself nearly all, and 0 would be left for patches in float32.
    row = [200.0, 0.0, math.log(2), math.log(3), math.log(10)]
    allowed = ~torch.eye(5, dtype=torch.bool)
    allowed[0, 2] = False
    expected = torch.tensor([[[1.0, 0], [3, 10]]]) / 14
    torch.testing.assert_close(cls_attention(scores_of([[row]]), 2, allowed=allowed), expected)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="17 tokens are not 1 and 3×3 patches"):
        cls_attention(torch.zeros(1, 1, 17, 17), grid=3)


def test_upsampling_keeps_a_constant_map():
    torch.testing.assert_close(upsample(torch.full((2, 4, 4), 0.25), 32), torch.full((2, 32, 32), 0.25))


def test_upsampling_is_bilinear_between_patch_centres():
    # Centres of two patches lie at a quarter and three quarters; four pixels at 1/8, 3/8, 5/8 and 7/8.
    maps = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    expected = torch.tensor([0.0, 0.25, 0.75, 1.0]).expand(1, 4, 4)
    torch.testing.assert_close(upsample(maps, 4), expected)


def test_denormalise_undoes_normalisation():
    images, mean, std = torch.rand(2, 3, 4, 4), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(denormalise(normalised, mean, std), images)


def test_the_tokens_that_are_read_are_averaged_on_any_grid():
    """Registers before the patches are not read; where there is no class token, all patches are."""
    scores = torch.randn(2, 3, 8, 8)
    weights = scores.softmax(-1).mean(1)[..., 2:]

    of_first = cls_attention(scores, (2, 3), prefix=2, readers=(0,))
    of_patches = cls_attention(scores, (2, 3), prefix=2, readers=range(2, 8))

    for maps, rows in ((of_first, weights[:, :1]), (of_patches, weights[:, 2:])):
        mean = rows.mean(1)
        torch.testing.assert_close(maps, (mean / mean.sum(-1, keepdim=True)).unflatten(-1, (2, 3)))
