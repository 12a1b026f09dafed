"""Hand-computed attention maps, and panels that render without a warning."""

import math
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from vitkd.explain import attention_panel, cls_attention, denormalise, upsample


def scores_of(rows):
    """[B, H, 5, 5] whose class token's row is `rows` [B, H, 5]; the other rows must not count."""
    rows = torch.tensor(rows)
    scores = torch.full((*rows.shape[:2], 5, 5), 7.0)
    scores[..., 0, :] = rows
    return scores


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def random_maps(count, grid):
    return torch.rand(count, grid**2).softmax(-1).unflatten(-1, (grid, grid))


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


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match="17 tokens are not CLS and 3×3 patches"):
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


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 64)])
def test_a_panel_renders_as_png(channels, size):
    images = torch.rand(2, channels, size, size)
    figure = attention_panel(
        images,
        random_maps(2, 4),
        random_maps(2, 8),
        labels=["price $1", "ship_$2"],
        teacher_predictions=["price $1", "ship_$2"],
        student_predictions=["ship_$2", "ship_$2"],
        columns=("image", "teacher, block 9", "student, block 4"),
        caption="epoch 3",
    )
    file = BytesIO()
    figure.savefig(file, format="png")
    assert Image.open(file).size == tuple((figure.get_size_inches() * figure.dpi).astype(int))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["price $1", "price $1 ✓", "ship_$2 ✗"]
    assert titles[3:6] == ["ship_$2", "ship_$2 ✓", "ship_$2 ✓"]
    assert "attention weight" in figure.axes[-1].get_ylabel()


def test_a_panel_needs_no_text_and_no_pyplot():
    assert rendered(attention_panel(torch.rand(1, 1, 8, 8), random_maps(1, 4), random_maps(1, 4))).std() > 0
    assert plt.get_fignums() == []


def test_everything_lies_inside_the_figure():
    figure = attention_panel(
        torch.rand(4, 3, 32, 32), random_maps(4, 4), random_maps(4, 4), labels=list("abcd"), caption="below"
    )
    figure.canvas.draw()
    inner = figure.get_tightbbox()
    assert inner.x0 >= 0
    assert inner.y0 >= 0
    assert inner.x1 <= figure.get_figwidth()
    assert inner.y1 <= figure.get_figheight()


def test_maps_share_one_colour_scale():
    strong = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    figure = attention_panel(torch.full((1, 1, 8, 8), 0.5), strong, strong / 2)
    teacher, student, bar = figure.axes[1], figure.axes[2], figure.axes[3]
    teacher_pixel, student_pixel = (axes.images[0].get_array()[0, 0] for axes in (teacher, student))
    assert bar.get_ylim() == (0, 1)
    # Over mid-grey a map has the very colours of the bar.
    colours = bar.collections[-1].get_cmap()
    np.testing.assert_allclose(teacher_pixel, colours(1.0)[:3], atol=1e-6)
    np.testing.assert_allclose(student_pixel, colours(0.5)[:3], atol=1e-2)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_maps_without_a_highest_weight_are_drawn_all_the_same(value):
    maps = torch.full((1, 4, 4), value)
    assert rendered(attention_panel(torch.rand(1, 1, 8, 8), maps, maps)).std() > 0


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match=r"equally many .* \[1, 2\]"):
        attention_panel(torch.rand(2, 1, 8, 8), random_maps(2, 4), random_maps(1, 4))
    with pytest.raises(ValueError, match="at least one"):
        attention_panel(torch.rand(0, 1, 8, 8), torch.rand(0, 4, 4), torch.rand(0, 4, 4))
