"""The page as text: it holds what was given and asks for nothing, and names cannot break it."""

import json
import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from vitkd.explain.gallery.cells import CELLS
from vitkd.explain.gallery.charts import Curves, HeatMap
from vitkd.explain.gallery.contents import GalleryPage, Table
from vitkd.explain.gallery.render import encode, number, region_colours, render
from vitkd.explain.maps.subjects import Subject

CLASSES = ["oak_tree", "seal", "bed"]


def page_of(count=8, size=16, seed=0, **changed):
    """A page of two models with other grids, blocks and heads; its images lie in every cell but one."""
    random = np.random.default_rng(seed)
    labels = [i % 3 for i in range(count)]
    teacher = [label if i % 4 < 2 else (label + 1) % 3 for i, label in enumerate(labels)]
    student = [label if i % 4 in (0, 2) and i % 8 != 4 else (label + 2) % 3 for i, label in enumerate(labels)]
    right = [(int(t != k), int(s != k)) for t, s, k in zip(teacher, student, labels, strict=True)]
    page = GalleryPage(
        title="Where they look",
        source="Run digits/kl, epoch 3",
        pixels=as_pixels(random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)),
        labels=labels,
        cells=[CELLS[2 * t + s] for t, s in right],
        numbers=[10 + 7 * i for i in range(count)],
        class_names=CLASSES,
        subjects=[
            Subject(
                "teacher",
                teacher,
                random.uniform(0.3, 1, count).tolist(),
                {
                    "attention": random.random((count, 3, 2, 4, 4)) / 16,
                    "relevance": random.random((count, 4, 4)) * 5,
                    "signed_thing": random.normal(size=(count, 3, 4)),
                    "regions": random.integers(0, 3, (count, 4, 4)),
                },
                patches=random.random((count, 3, 2, 16, 4, 4)) / 16,
            ),
            Subject(
                "student",
                student,
                random.uniform(0.3, 1, count).tolist(),
                {
                    "attention": random.random((count, 2, 3, 2, 2)) / 4,
                    "relevance": random.random((count, 2, 2)),
                    "regions": np.ones((count, 2, 2), int),
                },
                first_block=0,
                # Of its three heads the mean.
                patches=random.random((count, 2, 1, 4, 2, 2)) / 4,
            ),
        ],
        counts={"both right": 1200, "student wrong": 30, "teacher wrong": 7, "both wrong": 5},
        notes=["Over-represented: seal."],
        tables=[Table("Fidelity", "of maps", ["block", "KL [nats]"], [["0, 1", 0.123456], ["0, 2", None]])],
        figure_1=png_of(4, 4),
        heat_maps=[
            HeatMap(
                "Heat",
                "of maps",
                "nats",
                {
                    "student": np.array([[0.1, 0.3], [np.nan, 0.2]]),
                    "alone": np.array([[0.5, 0.2], [0.3, 0.4]]),
                },
                ["0", "4"],
            )
        ],
        curves=[Curves("Removal", "", "probability", {"student": {"rollout": ([0, 0.5, 1], [0.9, 0.3, 0])}})],
    )
    return replace(page, **changed)


def png_of(width, height):
    file = BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def as_pixels(images):
    """uint8 [N, H, W, 3] as [N, 3, H, W] in 0..1."""
    return torch.from_numpy(images.copy()).movedim(-1, 1).double() / 255


def with_a_teacher_without_maps(page):
    teacher, student = page.subjects
    return replace(page, subjects=[replace(teacher, maps={}, patches=None), student])


def without_teacher(page):
    return replace(page, cells=[""] * len(page.labels), counts={}, subjects=page.subjects[1:])


def data_of(html):
    """What the page's script would read."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    return json.loads(text)


def decode(maps):
    """As the page's script does it."""
    levels = np.frombuffer(b64decode(maps["data"]), "<u2").reshape(len(maps["low"]), -1)
    values = np.array(maps["low"])[:, None] + np.array(maps["step"])[:, None] * levels
    return values.reshape(maps["shape"])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_maps_survive_to_half_a_step_of_their_own_image(scale):
    # The second image has a thousandth of the first one's range, and loses nothing by it.
    maps = (
        np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * scale * np.array([1, 1e-3])[:, None, None, None]
    )
    spans = np.maximum(maps.reshape(2, -1).max(1), 0) - np.minimum(maps.reshape(2, -1).min(1), 0)
    errors = np.abs(decode(encode(maps)) - maps).reshape(2, -1).max(1)
    assert (errors <= spans * (0.5 / 65535 + 1e-6)).all()


def test_zeros_stay_zeros_and_a_flat_map_stays_flat():
    maps = np.stack([[[0.0, 1.0]], [[0.0, 0.0]], [[0.25, 0.25]]])
    decoded = decode(encode(maps))
    assert decoded[0, 0, 0] == 0
    assert (decoded[1] == 0).all()
    np.testing.assert_allclose(decoded[2], 0.25, rtol=1e-6)


def test_the_page_holds_what_was_given():
    page = page_of()
    data = data_of(render(page))
    assert data["labels"] == page.labels
    assert data["cells"] == page.cells
    assert data["indices"] == page.numbers
    assert [subject["name"] for subject in data["subjects"]] == ["teacher", "student"]
    for given, held in zip(page.subjects, data["subjects"], strict=True):
        for method, maps in given.maps.items():
            decoded = decode(held["maps"][method])
            np.testing.assert_allclose(decoded.round() if method == "regions" else decoded, maps, atol=1e-4)
        np.testing.assert_allclose(decode(held["patches"]), given.patches, atol=1e-5)
        np.testing.assert_allclose(held["confidence"], given.confidence, atol=1e-4)
    assert [subject["firstBlock"] for subject in data["subjects"]] == [2, 0]
    for url, pixels in zip(data["images"], page.pixels, strict=True):
        np.testing.assert_allclose(picture(url) / 255, pixels.movedim(0, -1), atol=1e-12)


def test_large_images_are_jpeg():
    smooth = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None, None], (1, 96, 96, 3))
    page = page_of(1, pixels=as_pixels(smooth))
    (url,) = data_of(render(page))["images"]
    assert url.startswith("data:image/jpeg;")
    assert np.abs(picture(url).astype(int) - smooth[0]).max() < 8


def test_what_the_report_shows_takes_less_than_three_megabytes():
    random = np.random.default_rng(0)
    maps = [{"attention": random.random((128, *shape, 4, 4))} for shape in ((10, 8), (5, 4))]
    others = ["rollout", "gradient_rollout", "relevance", "grad_cam", "integrated_gradients", "random"]
    page = page_of(128, 32)
    subjects = [
        replace(
            subject,
            maps=each | {name: random.random((128, 4, 4)) for name in others},
            patches=random.random((128, each["attention"].shape[1], 1, 16, 4, 4)),
        )
        for subject, each in zip(page.subjects, maps, strict=True)
    ]
    assert len(render(replace(page, subjects=subjects, figure_1=None)).encode()) < 3e6


def test_the_page_is_the_same_each_time_and_names_no_other_place():
    html = render(page_of())
    assert html == render(page_of())
    assert not re.search(r"""(?:src|href)=(?!["']?(?:data:|#))""", html)
    assert not re.search(r"@import|url\((?!data:)|fetch\(|XMLHttpRequest|WebSocket|sendBeacon", html)
    assert "default-src 'none'" in html


def test_names_are_text_whatever_they_say():
    evil = "</script><script>alert(1)</script>"
    page = page_of(class_names=[evil, "<b>", "a & b"], title=evil, source=evil, notes=[evil])
    page = replace(page, subjects=[replace(page.subjects[0], name=evil)])
    html = render(page)
    assert evil not in html
    assert html.count("</script>") == 2
    assert data_of(html)["classes"][0] == evil


def test_counts_stand_in_the_two_by_two_table():
    html = render(page_of())
    cells = re.findall(r'data-cell="(.*?)".*?<b>(.*?)</b>\s*<small>(.*?)</small>', html, flags=re.DOTALL)
    assert cells == [
        ("both right", "1,200", "96.6 % · 1 shown here"),
        ("student wrong", "30", "2.4 % · 3 shown here"),
        ("teacher wrong", "7", "0.6 % · 2 shown here"),
        ("both wrong", "5", "0.4 % · 2 shown here"),
    ]


def test_without_a_teacher_there_is_no_two_by_two_table():
    html = render(without_teacher(page_of()))
    assert "data-cell=" not in html
    assert 'id="cell"' not in html
    assert 'id="answer"' in html


def test_an_image_of_unknown_class_is_no_class_to_choose():
    page = replace(page_of(1), labels=[-1])
    html = render(without_teacher(page))
    assert re.findall(r'<select id="class"><option value="">all classes</option>\s*</select>', html)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (-0.5, "−0.5"),
        (12345, "12,345"),
        (None, "–"),
        (float("nan"), "–"),
        ("0, 1", "0, 1"),
        (np.float32(0.25), "0.25"),
    ],
)
def test_numbers_of_tables(value, text):
    assert number(value) == text


def test_tables_and_pictures_stand_below():
    html = render(page_of())
    assert re.findall(r"<td[^>]*>(.*?)</td>", html[html.index('id="tables"') :]) == [
        "0, 1",
        "0.1235",
        "0, 2",
        "–",
    ]
    assert 'src="data:image/png;base64,' in html
    assert '<a href="#figures">' in html
    bare = render(page_of(tables=(), figure_1=None, heat_maps=(), curves=()))
    assert 'id="tables"' not in bare
    assert 'id="figures"' not in bare


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0]}, "labels: 1 for 8 images"),
        ({"pixels": torch.zeros(8, 16, 16, 3)}, r"\[N, C, H, W\]"),
        ({"pixels": torch.zeros(0, 3, 16, 16)}, "at least one image"),
        ({"cells": ["both great"] * 8}, "both great"),
        ({"counts": {"both great": 1}}, "both great"),
        ({"labels": [3] * 8}, "classes beyond the 3"),
    ],
)
def test_what_does_not_belong_together_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        page_of(**changed)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"attention": np.zeros((8, 2, 2))}, r"attention: finite values on 5 axes, not \[8, 2, 2\]"),
        ({"rollout": np.full((8, 2, 2), np.nan)}, "rollout: finite"),
        ({"rollout": np.zeros((7, 2, 2))}, "rollout: 7 for 8 images"),
    ],
)
def test_maps_of_another_shape_are_refused(maps, message):
    page = page_of()
    with pytest.raises(ValueError, match=message):
        replace(page, subjects=[replace(page.subjects[0], maps=maps, patches=None), page.subjects[1]])


@pytest.mark.parametrize(
    "shape", [(8, 3, 3, 16, 4, 4), (8, 2, 1, 16, 4, 4), (8, 3, 2, 4, 4, 4), (7, 3, 2, 16, 4, 4)]
)
def test_patches_of_other_models_are_refused(shape):
    page = page_of()
    with pytest.raises(ValueError, match="teacher's patches"):
        replace(page, subjects=[replace(page.subjects[0], patches=np.zeros(shape)), page.subjects[1]])


def test_where_no_patch_can_be_asked_there_is_no_such_choice():
    page = page_of()
    bare = replace(page, subjects=[replace(each, patches=None) for each in page.subjects])

    assert 'id="query"' in render(page)
    assert 'id="query"' not in render(bare)


def test_region_colours_go_from_blue_to_red():
    colours = np.array(region_colours(5))
    assert (np.diff(colours[:, 0] - colours[:, 2]) > 0).all()
    assert len(region_colours(1)) == 1


def picture(url):
    return np.asarray(Image.open(BytesIO(b64decode(url.partition(",")[2]))))


@pytest.mark.parametrize(
    ("readers", "unit"),
    [
        (("class token", "class token"), "attention weight of the class token"),
        (("class token", "class and distillation tokens"), "attention weight of the classifying tokens"),
    ],
)
def test_the_unit_says_whose_attention_it_is(readers, unit):
    page = page_of()
    subjects = [replace(each, readers=whose) for each, whose in zip(page.subjects, readers, strict=True)]

    assert data_of(render(replace(page, subjects=subjects)))["units"]["attention"] == unit


def test_of_a_teacher_without_maps_there_are_its_answers_and_the_cells():
    page = with_a_teacher_without_maps(page_of())
    html = render(page)
    teacher, student = data_of(html)["subjects"]

    assert teacher["maps"] == {}
    assert teacher["predicted"] == page.subjects[0].predicted
    assert {*student["maps"]} == {"attention", "relevance", "regions"}
    assert "teacher wrong" in html
    assert "student: block" in html
    assert "teacher: block" not in html
