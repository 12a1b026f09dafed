"""The page's charts, read back from its HTML and compared with the numbers given."""

import math
import re

import numpy as np
import pytest

from tests.explain.test_page import page_of
from vitkd.explain.gallery import charts
from vitkd.explain.gallery.charts import Curves, HeatMap
from vitkd.explain.gallery.figures import COLOURS
from vitkd.explain.gallery.render import render

NUMBER = r"-?\d+(?:\.\d+)?"


def luminance(colour):
    """WCAG 2's relative luminance of "#rrggbb"."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def shown(**charts_given):
    return render(page_of(**{"figure_1": None, "heat_maps": (), "curves": (), "tables": ()} | charts_given))


STUDENT = np.array([[0.1, 0.2], [0.3, math.nan]])
HEAT = {"student": STUDENT, "student alone": STUDENT + 0.5, "permuted heads": STUDENT + 0.2}
LINES = {
    "positive": {"rollout": ([0, 0.25, 1], [0.9, 0.5, 0.1]), "random": ([0, 1], [0.9, 0.1])},
    "negative": {"grad cam": ([0, 1], [0.2, 0.1]), "random": ([0, 1], [0.9, 0.2])},
}


def texts_of(svg):
    """[(x, y, anchor, text)] of what is written on horizontal lines."""
    found = re.findall(rf'<text x="({NUMBER})" y="({NUMBER})" text-anchor="(\w+)">(.*?)</text>', svg)
    return [(float(x), float(y), anchor, text) for x, y, anchor, text in found]


def axes_of(svg):
    """((x of 0 %, x of 100 %), (y of 0, y of 1)), by what is written beside the grid's lines."""
    places = {text: (x, y) for x, y, _, text in texts_of(svg)}
    rows = [float(y) for y in re.findall(rf'<path class="grid" d="M{NUMBER} ({NUMBER})H', svg)]
    zero, one = (min(rows, key=lambda y, tick=tick: abs(y - places[tick][1])) for tick in ("0", "1"))
    return (places["0 %"][0], places["100 %"][0]), (zero, one)


class TestHeatMap:
    @pytest.fixture
    def html(self):
        return shown(heat_maps=[HeatMap("Fidelity", "of maps", "JS [nats]", HEAT, ["0", "5"])])

    def test_stands_beside_its_baselines(self, html):
        tables = re.findall(r'<table class="heat"><caption>(.*?)</caption>(.*?)</table>', html, re.DOTALL)

        assert [title for title, _ in tables] == [*HEAT]
        headings = re.findall(r">(block .*?|head .*?)</th>", tables[0][1])
        assert headings == ["head 0", "head 1", "block 0", "block 5"]
        texts = re.findall(r'<td style="[^"]*">(.*?)</td>', tables[0][1])
        assert texts == ["0.1", "0.2", "0.3", "–"]
        assert "JS [nats]" in html

    def test_all_panels_share_one_scale(self, html):
        found = re.findall(r'<td style="background: (#\w{6}); color: (#\w{6})">(.*?)</td>', html)

        assert len(found) == 3 * 3
        for background, _, text in found:
            wanted = COLOURS((float(text) - 0.1) / 0.7)[:3]
            painted = [int(background[place : place + 2], 16) / 255 for place in (1, 3, 5)]
            np.testing.assert_allclose(painted, wanted, atol=1 / 255)
        assert re.search(r'<div class="bar"><span>0.1</span>.*<span>0.8</span></div>', html)

    def test_an_undefined_value_has_no_colour(self, html):
        assert len(re.findall(r'<td style="">–</td>', html)) == 3

    def test_every_value_can_be_read(self):
        chart = HeatMap("", "", "", {"all": np.linspace(0, 1, 101)[None]}, ["0"])
        for value in chart.panels["all"][0]:
            ground, ink = re.findall(r"#\w{6}", chart.style(value))
            low, high = sorted([luminance(ground), luminance(ink)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, value

    @pytest.mark.parametrize(("values", "limits"), [([[math.nan]], (0, 1)), ([[0.2, 0.2]], (0.2, 0.2))])
    def test_where_there_is_no_scale_it_is_drawn_all_the_same(self, values, limits):
        chart = HeatMap("", "", "", {"student": np.array(values)}, ["0"])

        assert chart.limits == limits
        assert "Heat of nothing" in shown(heat_maps=[HeatMap("Heat of nothing", "", "", chart.panels, ["0"])])


class TestCurves:
    @pytest.fixture
    def html(self):
        return shown(curves=[Curves("Removal", "", "probability", LINES)])

    def test_points_are_the_values_on_the_axes_that_are_drawn(self, html):
        for panel, lines in zip(html.split("<h4>")[1:], LINES.values(), strict=True):
            svg = panel[: panel.index("</svg>")]
            (left, right), (zero, one) = axes_of(svg)
            drawn = re.findall(r'<polyline class="line (\w+)" points="(.*?)"><title>(.*?)</title>', svg)
            assert [title for *_, title in drawn] == [*lines]
            for _, points, title in drawn:
                xs, ys = zip(*(map(float, point.split(",")) for point in points.split()), strict=True)
                fractions, values = lines[title]
                np.testing.assert_allclose((np.array(xs) - left) / (right - left), fractions, atol=1e-3)
                np.testing.assert_allclose((np.array(ys) - zero) / (one - zero), values, atol=1e-3)

    def test_a_method_has_one_line_style_everywhere_and_random_its_own(self, html):
        styles = {}
        for style, title in re.findall(r'<polyline class="line (\w+)".*?<title>(.*?)</title>', html):
            styles.setdefault(title, set()).add(style)
        legend = re.findall(r'<path class="line (\w+)" .*?</svg> (.*?)</li>', html)

        assert styles == {"rollout": {"s0"}, "grad cam": {"s1"}, "random": {"random"}}
        assert {title: {style} for style, title in legend} == styles

    def test_every_style_is_in_the_style_sheet(self):
        lines = {f"method {i}": ([0, 1], [1, 0]) for i in range(charts.SERIES + 1)}
        chart = Curves("", "", "", {"": lines})
        html = shown(curves=[chart])

        assert [chart.series(name) for name in lines] == [*(f"s{i}" for i in range(charts.SERIES)), "s0"]
        for i in range(charts.SERIES):
            assert re.search(rf"\.s{i} {{ stroke: var\(--s{i}\)", html)
            assert len(re.findall(rf"--s{i}: #\w{{6}};", html)) == 2, "light and dark"

    @pytest.mark.parametrize("highest", [1.0, 0.36, 0.11, 0.02, 1e-3, 1e-6, 0.0])
    def test_ticks_are_round_and_reach_the_highest(self, highest):
        ticks = Curves("", "", "", {"": {"rollout": ([0, 1], [highest, 0])}}).ticks

        assert ticks[0] == 0
        assert ticks[-1] >= highest - 1e-12
        assert 2 <= len(ticks) <= 6
        assert {f"{ticks[1]:e}"[0]} <= set("125")

    def test_every_text_lies_inside_its_picture(self, html):
        for x, y, anchor, text in texts_of(html):
            width = 6 * len(text) * {"middle": 0.5, "end": 1}[anchor]
            assert x - width >= 0, text
            assert anchor == "end" or x + width <= charts.WIDTH, text
            assert 0 <= y <= charts.HEIGHT, text
