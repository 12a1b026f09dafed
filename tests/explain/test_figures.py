"""Figures whose colours and texts are read back and compared with the numbers given."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.font_manager import fontManager, get_font, ttfFontProperty
from PIL import Image

from vitkd.explain.gallery import fonts
from vitkd.explain.gallery.figures import (
    COLOURS,
    OPACITY,
    Rows,
    attention_unit,
    figure_1,
    figure_rows,
    png,
    upsample,
)


def maps_of(count, grid=4):
    return torch.rand(count, grid, grid) / grid**2


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def written(figure):
    return [text.get_text() for text in figure.texts]


def drawn(axes):
    """The pixels of a cell, [H, W, 3]."""
    return np.asarray(axes.images[0].get_array())


def rows_of(count, title="", confidences=()):
    labels = ["seal", "bed", "oak"][:count]
    return Rows(
        title,
        torch.rand(count, 3, 16, 16),
        [maps_of(count), maps_of(count, 2)],
        labels,
        [labels, ["seal"] * count],
        confidences,
    )


COLUMNS = ("image", "teacher", "student")


def test_figure_1_has_a_column_for_a_block_that_was_not_distilled():
    figure = figure_1(
        torch.rand(2, 1, 8, 8),
        maps_of(2),
        maps_of(2, 2),
        maps_of(2, 2),
        labels=["seal", "bed"],
        teacher_predictions=["seal", "bed"],
        student_predictions=["seal", "seal"],
        student_confidences=[0.9, 0.4],
    )
    assert written(figure)[:4] == ["image", "teacher", "student, distilled", "student, not distilled"]
    assert titles(figure)[:8] == ["seal", "seal ✓", "seal ✓ 90 %", "", "bed", "bed ✓", "seal ✗ 40 %", ""]
    assert len(figure.axes) == 2 * 4 + 1


def test_figure_1_leaves_that_column_out_where_every_block_was_distilled():
    figure = figure_1(torch.rand(2, 1, 8, 8), maps_of(2), maps_of(2, 2))
    assert written(figure)[:3] == ["image", "teacher", "student, distilled"]
    assert len(figure.axes) == 2 * 3 + 1


@pytest.mark.parametrize(
    ("readers", "unit"),
    [
        (["class token"] * 2, "attention weight\nof the class token"),
        (["class and distillation tokens"], "attention weight\nof the class and distillation tokens"),
        (["class token", "patches"], "attention weight\nof the classifying tokens"),
    ],
)
def test_the_colour_bar_says_whose_attention_it_is(readers, unit):
    assert attention_unit(readers) == unit
    maps = maps_of(2)
    figure = figure_1(torch.rand(2, 1, 8, 8), maps, maps, unit=attention_unit(readers))
    assert figure.axes[-1].get_ylabel() == unit
    assert figure_1(torch.rand(2, 1, 8, 8), maps, maps).axes[-1].get_ylabel() == attention_unit()


def test_confidences_stand_beside_predictions():
    figure = figure_rows([rows_of(2, confidences=[[0.981, 0.5], None])], columns=COLUMNS)
    assert titles(figure)[:6] == ["seal", "seal ✓ 98 %", "seal ✓", "bed", "bed ✓ 50 %", "seal ✗"]


def test_all_maps_of_a_figure_share_one_colour_scale_across_groups():
    black = torch.zeros(1, 1, 8, 8)
    groups = [
        Rows(title, black, [torch.full((1, 2, 2), value)])
        for title, value in (("faint", 0.1), ("strong", 0.4))
    ]
    figure = figure_rows(groups, columns=("image", "student"), across=2)
    bar = figure.axes[-1]
    assert bar.get_ylim() == pytest.approx((0, 0.4))
    # Over black, paled to a quarter of white.
    for axes, value in ((figure.axes[1], 0.25), (figure.axes[3], 1.0)):
        wanted = OPACITY * np.array(COLOURS(value)[:3]) + (1 - OPACITY) * 0.25
        np.testing.assert_allclose(drawn(axes)[0, 0], wanted, atol=1e-6)


def test_maps_are_interpolated_to_the_image():
    each = maps_of(1, 2)
    figure = figure_rows([Rows("", torch.zeros(1, 1, 8, 8), [each])], columns=("image", "student"))
    smooth = upsample(each, 256)[0].numpy() / float(each.max())
    wanted = OPACITY * COLOURS(smooth)[..., :3] + (1 - OPACITY) * 0.25
    np.testing.assert_allclose(drawn(figure.axes[1]), wanted, atol=0.02)


def test_a_scale_of_signed_maps_begins_below_zero():
    signed = torch.tensor([[[-2.0, 1.0], [0.0, 0.5]]])
    figure = figure_rows(
        [Rows("", torch.zeros(1, 1, 8, 8), [signed])], columns=("image", "student"), unit="u"
    )
    assert figure.axes[-1].get_ylim() == (-2, 1)
    assert figure.axes[-1].get_ylabel() == "u"


def test_an_empty_group_says_so_beside_the_others():
    empty = Rows("both wrong", torch.zeros(0, 3, 16, 16), [])
    groups = [rows_of(2, "both right"), rows_of(1, "student wrong"), rows_of(3, "teacher wrong"), empty]
    figure = figure_rows(groups, columns=COLUMNS, across=2)
    texts = written(figure)
    assert [text for text in texts if text in {group.title for group in groups}] == [
        group.title for group in groups
    ]
    assert texts.count("no such image") == 1
    assert len(figure.axes) == (2 + 1 + 3) * 3 + 1
    # Side by side, and the second line below the first.
    first, second, third = (figure.axes[place].get_position() for place in (0, 6, 9))
    assert second.x0 > first.x0
    assert second.y0 == pytest.approx(first.y0)
    assert third.x0 == pytest.approx(first.x0)
    assert third.y0 < first.y0


FIGURES = {
    "figure_1": lambda caption: figure_1(
        torch.rand(2, 1, 8, 8), maps_of(2), maps_of(2), labels=["a $1", "b_$2"], caption=caption
    ),
    "rows": lambda caption: figure_rows(
        [rows_of(1, "student wrong"), rows_of(2, "both wrong")], columns=COLUMNS, across=2, caption=caption
    ),
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("caption", ["", "epoch 3 of the run that is shown here, all heads averaged " * 4])
def test_everything_lies_inside_the_figure(name, caption):
    figure = FIGURES[name](caption)
    figure.canvas.draw()
    inner = figure.get_tightbbox()
    assert inner.x0 >= 0
    assert inner.y0 >= 0
    assert inner.x1 <= figure.get_figwidth()
    assert inner.y1 <= figure.get_figheight()
    assert plt.get_fignums() == []


def test_a_figure_as_png():
    figure = FIGURES["rows"]("below")
    image = Image.open(BytesIO(png(figure)))
    assert image.format == "PNG"
    assert image.size == tuple((figure.get_size_inches() * figure.dpi).astype(int))


class TestFonts:
    """Warnings are errors here, so that a character without a glyph is one."""

    @pytest.fixture(autouse=True)
    def _those_of_matplotlib(self, monkeypatch):
        """The fonts that come with matplotlib, whatever this machine has."""
        # Read here: matplotlib's list may be another installation's.
        own = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
        monkeypatch.setattr(fontManager, "ttflist", [ttfFontProperty(get_font(str(f))) for f in own])
        for known in (fonts.family_with, fonts.warn_of_boxes):
            known.cache_clear()
        yield
        fonts.family_with.cache_clear()

    def drawn_with(self, name):
        group = rows_of(1)._replace(labels=[name], predictions=[[name]])
        figure = figure_rows([group], columns=COLUMNS, caption=f"of {name}")
        png(figure)
        return figure

    def test_one_that_has_the_character_is_found(self, caplog):
        name = "ᶄ"  # in STIX, and not in DejaVu Sans
        figure = self.drawn_with(name)

        assert titles(figure)[:2] == [name, f"{name} ✓"]
        assert caplog.text == ""

    def test_a_family_without_normal_weight_is_left_out(self, monkeypatch):
        """matplotlib would take another weight, with a line at every draw."""
        (light,) = (
            replace(f, name="A", weight=200)
            for f in fontManager.ttflist
            if f.fname.endswith("STIXGeneral.ttf")
        )
        monkeypatch.setattr(fontManager, "ttflist", [light, *fontManager.ttflist])

        assert fonts.drawable("ᶄ")[1][-1].startswith("STIX")

    def test_what_no_font_has_is_a_box_and_one_line(self, caplog):
        figures = [self.drawn_with(name) for name in ("猫", "🐈 cat")]

        assert [titles(figure)[0] for figure in figures] == ["□", "□ cat"]
        assert [(record.name, record.getMessage().count("□")) for record in caplog.records] == [("vitkd", 1)]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: figure_1(torch.rand(2, 1, 8, 8), maps_of(1), maps_of(2)), r"equally many .* \[1, 2\]"),
        (lambda: figure_1(torch.rand(0, 1, 8, 8), maps_of(0), maps_of(0)), "at least one image"),
        (lambda: figure_rows([rows_of(1)], columns=("image", "student")), "2 maps an image for 1 columns"),
    ],
)
def test_what_does_not_belong_together_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
