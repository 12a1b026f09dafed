"""The files of an explanation: which there are, that they are plain, and that they hold what was found."""

import json
from base64 import b64encode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vitkd.explain.gallery.cells import (
    BOTH_RIGHT,
    BOTH_WRONG,
    CELLS,
    STUDENT_WRONG,
    TEACHER_WRONG,
    OverRepresented,
)
from vitkd.explain.gallery.contents import heat_map, page_of, removal_curves
from vitkd.explain.gallery.explanation import Explanation
from vitkd.explain.gallery.files import (
    FILES,
    as_json,
    fidelity_of,
    figure_of_cells,
    figures_of,
    files_of,
    first_figure,
    metrics_of,
    on_one_grid,
)
from vitkd.explain.gallery.render import render
from vitkd.explain.maps.subjects import subject_of, with_regions
from vitkd.explain.measures.correctness import correctness_correlation
from vitkd.explain.measures.faithfulness import faithfulness
from vitkd.explain.measures.fidelity import MapPair
from vitkd.explain.measures.survey import Comparison, TokenAlignment, survey
from vitkd.report.runs import read_fidelity

ALWAYS = {"maps.npz", "metrics.json", "index.html"}
WITH_TEACHER = {"figure_1.png", "figure_2.png", "figure_3.png", "gallery.png"}
CLASSES = ["ape", "bee <b>", "cat", "dog", "eel"]
METHODS = ["attention", "rollout", "relevance"]
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def make(tiny, names, channels=3, **changes) -> Explanation:
    """The explanation of untrained models, its metrics computed as the command does it."""
    models = {name: tiny(channels=channels, num_heads=3).build().eval() for name in names}
    pixels = torch.rand(6, channels, 8, 8)
    looked = {
        name: subject_of(name, models[name], pixels, METHODS, -1 if name == "teacher" else 1)
        for name in names
    }
    subjects = [with_regions(*each, 3) for each in looked.values()]
    plain = {
        "title": "Where they look",
        "source": "run of untrained models",
        "epoch": "last",
        "pixels": pixels,
        "labels": LABELS.tolist(),
        "cells": [""] * 6,
        "numbers": [7, 3, 11, 5, 2, 30],
        "class_names": CLASSES,
        "subjects": subjects,
    }
    if "teacher" in names:
        # Of three heads, so that each set of them has others beside it.
        pairs = [MapPair(1, 0, 2, (0,)), MapPair(2, 0, 2, (0, 1)), MapPair(1, 1, 2, (1,))]
        alone = "student B" if "student B" in names else None
        comparisons = {
            name: Comparison("teacher", pairs, (True, False, True), 4, alone if name != alone else None)
            for name in names[1:]
        }
        seen = survey(models, [(pixels, LABELS, torch.arange(6))], comparisons)
        plain |= {
            "cells": [BOTH_RIGHT, BOTH_RIGHT, STUDENT_WRONG, STUDENT_WRONG, BOTH_WRONG, BOTH_WRONG],
            "counts": dict(zip(CELLS, (900, 20, 0, 4), strict=True)),
            "over_represented": {STUDENT_WRONG: [OverRepresented("bee <b>", 9, 2.0, 4.5, 1e-4, 5e-4)]},
            "other_block": 0,
            "reach": seen.reach,
            "fidelity": seen.fidelity,
            "correlations": {
                name: {"all test images": correctness_correlation(each.divergence, LABELS > 1)}
                for name, each in seen.fidelity.items()
            },
        }
    return Explanation(**(plain | changes))


def curves_of(tiny):
    """Model → faithfulness of one image, whose standard error is none."""
    model, pixels, maps = tiny().build(), torch.rand(1, 3, 8, 8), torch.rand(1, 2, 2)
    predicted = model(pixels).logits.argmax(-1)
    return {"student": faithfulness(model, pixels, lambda x: x, {"rollout": maps}, predicted, LABELS[:1])}


@pytest.fixture(scope="module")
def small():
    """The factory of `tiny`, for the whole module."""
    from vitkd.models import ViTConfig

    def build(**changes):
        shape = {"image_size": 8, "channels": 3, "num_classes": 5, "patch_size": 4, "embed_dim": 12}
        shape |= {"depth": 3, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
        return ViTConfig(**(shape | changes))

    return build


@pytest.fixture(scope="module")
def whole(small) -> Explanation:
    torch.manual_seed(0)
    names = ["teacher", "student A", "student B"]
    return make(small, names, faithfulness=curves_of(small), notes=["A note."])


@pytest.fixture(scope="module")
def files(whole) -> dict[str, bytes]:
    return files_of(whole)


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the drawing, which takes long."""
    monkeypatch.setattr("vitkd.explain.gallery.files.figure_rows", lambda *_, **__: Figure())


def strict(content: bytes):
    """JSON as other languages read it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(content, parse_constant=refuse)


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


def arrays_of(content: bytes):
    with np.load(BytesIO(content), allow_pickle=False) as found:
        return dict(found)


def tables_by_title(explanation):
    return {table.title: table for table in page_of(explanation, None).tables}


class TestFiles:
    def test_of_two_students_and_their_teacher(self, files):
        assert files.keys() == ALWAYS | WITH_TEACHER | {"fidelity.json"} == FILES

    def test_without_a_teacher(self, tiny):
        assert files_of(make(tiny, ["student"], channels=1)).keys() == ALWAYS

    def test_what_was_not_measured_has_no_file(self, whole, files, undrawn):
        found = files_of(replace(whole, fidelity={}))

        assert files.keys() - found.keys() == {"fidelity.json"}

    def test_every_picture_is_one(self, files):
        for name, content in files.items():
            if name.endswith(".png"):
                with Image.open(BytesIO(content)) as picture:
                    picture.load()
                assert min(picture.size) > 200, name


class TestFigures:
    @pytest.mark.parametrize(
        ("cell", "figures"),
        [
            (BOTH_RIGHT, {"figure_1", "gallery"}),
            (STUDENT_WRONG, {"figure_1", "figure_2", "gallery"}),
            (TEACHER_WRONG, {"figure_1", "figure_3", "gallery"}),
            (BOTH_WRONG, {"figure_1", "figure_3", "gallery"}),
            ("", {"figure_1"}),
        ],
    )
    def test_of_empty_cells_are_left_out(self, cell, figures, whole, undrawn):
        drawn = figures_of(replace(whole, cells=[cell] * 6)).keys()

        assert drawn & {name.removesuffix(".png") for name in WITH_TEACHER} == figures

    def test_of_one_cell_beside_an_empty_one_are_drawn(self, whole):
        figure = figure_of_cells(replace(whole, cells=[BOTH_WRONG] * 6), "figure_3")

        assert "teacher wrong" in texts(figure)

    @pytest.mark.parametrize(
        ("draw", "shown"),
        [
            (first_figure, [0, 1]),
            (lambda whole: figure_of_cells(whole, "figure_2"), [2, 3]),
            (lambda whole: figure_of_cells(whole, "figure_3"), [4, 5]),
            (lambda whole: figure_of_cells(whole, "gallery"), [0, 1, 2, 3, 4, 5]),
        ],
    )
    def test_show_the_images_of_their_cells(self, draw, shown, whole):
        titles = [axes.get_title() for axes in draw(whole).axes]

        expected = [CLASSES[whole.labels[i]] for i in shown]
        # Of an image and its maps the image alone has a bare class for its title.
        assert [title for title in titles if title in CLASSES] == expected

    def test_figure_1_shows_the_block_that_was_not_distilled_where_there_is_one(self, whole):
        figure = first_figure

        assert "block 0, not distilled" in texts(figure(whole))
        for subject in (whole.teacher, whole.student):
            assert f"{100 * subject.confidence[0]:.0f} %" in texts(figure(whole))
        assert "student A, block" not in texts(figure(whole))
        assert "not distilled" not in texts(figure(replace(whole, other_block=None)))

    def test_beside_a_teacher_without_maps_the_student_stands_alone_in_the_cells(self, whole):
        teacher, student, _ = whole.subjects
        subjects = [replace(teacher, maps={}, patches=None), student]
        figure = figure_of_cells(replace(whole, subjects=subjects), "figure_2")

        assert "student A, block 1" in texts(figure)
        assert "teacher, block" not in texts(figure)

    def test_of_a_teacher_without_maps_are_those_that_need_none(self, whole, undrawn):
        teacher, student, _ = whole.subjects
        explanation = replace(
            whole,
            subjects=[replace(teacher, maps={}, patches=None), student],
            fidelity={},
            faithfulness={},
        )

        assert {*figures_of(explanation)} == {"figure_2", "figure_3", "gallery"}
        arrays = arrays_of(files_of(explanation)["maps.npz"])
        assert arrays["teacher/predicted"].tolist() == teacher.predicted
        assert "teacher/attention" not in arrays

    def test_figure_1_says_whose_attention_it_is(self, whole):
        teacher, student, _ = whole.subjects
        both = replace(student, readers="class and distillation tokens")

        assert "Attention of the class token, heads averaged" in texts(first_figure(whole))
        mixed = first_figure(replace(whole, subjects=[teacher, both]))
        assert "attention weight\nof the classifying tokens" in texts(mixed)

    def test_maps_of_other_grids_are_brought_to_the_finest(self):
        coarse, fine = torch.rand(2, 2, 2), torch.rand(2, 4, 4)
        coarse, fine = (each / each.sum((-2, -1), keepdim=True) for each in (coarse, fine))

        resized, same = on_one_grid([coarse, fine])

        torch.testing.assert_close(same, fine)
        assert resized.shape == (2, 4, 4)
        torch.testing.assert_close(resized.sum((-2, -1)), torch.ones(2))
        # The corners of a doubled grid lie within the corners of the old one.
        corner = coarse[:, 0, 0] / coarse[:, 1, 1]
        torch.testing.assert_close(resized[:, 0, 0] / resized[:, 3, 3], corner)


class TestMetrics:
    def test_are_strict_json_with_all_there_is(self, whole, files):
        found = strict(files["metrics.json"])

        assert found.keys() == {
            *("title", "source", "cells", "over_represented", "correctness", "attention_distance"),
            *("faithfulness", "images"),
        }
        assert found["cells"] == dict(whole.counts)
        assert found["images"] == whole.numbers
        assert found["over_represented"][STUDENT_WRONG][0]["label"] == "bee <b>"
        np.testing.assert_allclose(found["attention_distance"]["teacher"], whole.reach["teacher"])
        curve = found["faithfulness"]["student"]["rollout"]["positive"]["predicted"]
        assert curve["gap_error"] is None
        assert curve["fractions"] == [0, 0.25, 0.5, 0.75, 1]

    def test_what_is_undefined_is_null(self, whole):
        always_right = correctness_correlation([0.1, 0.2, 0.3], [True] * 3)
        reach = torch.full((3, 2), torch.nan)
        explanation = replace(
            whole, correlations={"student A": {"all test images": always_right}}, reach={"teacher": reach}
        )

        found = strict(as_json(metrics_of(explanation)))

        assert found["correctness"]["student A"]["all test images"]["r"] is None
        assert "right on all 3" in found["correctness"]["student A"]["all test images"]["reason"]
        assert found["attention_distance"]["teacher"] == [[None, None]] * 3

    def test_an_undefined_fidelity_is_null_and_left_out_of_the_mean(self, whole):
        result = whole.fidelity["student A"]
        first, *others = result.rows
        rows = [replace(first, metrics=first.metrics | {"spearman": None}, permuted=None), *others]
        nan = float("nan")
        cka = dict.fromkeys(result.cka, TokenAlignment(nan, None, nan))
        explanation = replace(whole, fidelity={"student A": replace(result, rows=rows, cka=cka)})

        found = strict(as_json(fidelity_of(explanation)))

        assert found["rows"][0]["metrics"]["spearman"] is None
        undefined = {"value": None, "alone": None, "other_images": None}
        assert all(each == undefined for each in found["cka"].values())
        # Of the distilled first and last rows the last alone has one.
        assert found["summary"]["spearman_distilled"] == pytest.approx(rows[2].metrics["spearman"])
        assert "–" in render(page_of(explanation, None))

    @pytest.mark.parametrize("measure", ["js", "kl", "spearman", "top_k_iou", "cls_overlap"])
    @pytest.mark.parametrize("part", ["metrics", "alone", "permuted"])
    def test_the_summary_is_the_mean_over_rows(self, measure, part, whole, files):
        found = strict(files["fidelity.json"])
        rows, suffix = found["rows"], "" if part == "metrics" else f"_{part}"

        assert [row["distilled"] for row in rows] == [True, False, True]
        own = [getattr(row, part)[measure] for row in whole.fidelity["student A"].rows]
        assert [row[part][measure] for row in rows] == pytest.approx(own)
        mean = sum(row[part][measure] for row in (rows[0], rows[2])) / 2
        assert found["summary"][f"{measure}_distilled{suffix}"] == pytest.approx(mean)
        mean = sum(row[part][measure] for row in rows) / 3
        assert found["summary"][f"{measure}_all{suffix}"] == pytest.approx(mean)

    def test_the_report_reads_the_divergence_of_distilled_maps(self, whole, files, tmp_path):
        (tmp_path / "fidelity.json").write_bytes(files["fidelity.json"])

        rows = whole.fidelity["student A"].rows
        expected = (rows[0].metrics["js"] + rows[2].metrics["js"]) / 2
        found = read_fidelity(tmp_path / "fidelity.json")
        assert found is not None
        assert found.divergence == pytest.approx(expected)
        assert found.epoch == "last"

    def test_where_no_map_was_distilled_the_report_finds_none(self, whole, tmp_path):
        result = replace(whole.fidelity["student A"], distilled=[False] * 3)
        found = fidelity_of(replace(whole, fidelity={"student A": result}))
        (tmp_path / "fidelity.json").write_text(json.dumps(found))

        assert "js_all" in found["summary"]
        assert read_fidelity(tmp_path / "fidelity.json") is None


class TestArrays:
    def test_are_the_subjects_maps_without_pickle(self, whole, files):
        found = arrays_of(files["maps.npz"])

        for subject in whole.subjects:
            for method, maps in subject.maps.items():
                assert np.array_equal(found[f"{subject.name}/{method}"], maps)
            assert found[f"{subject.name}/predicted"].tolist() == subject.predicted
            assert found[f"{subject.name}/confidence"].tolist() == subject.confidence
            assert np.array_equal(found[f"{subject.name}/patches"], subject.patches)
            assert f"{subject.name}/regions" in found
        assert np.array_equal(found["pixels"], whole.pixels)
        assert found["labels"].tolist() == whole.labels
        assert found["numbers"].tolist() == whole.numbers
        assert found["cells"].tolist() == whole.cells


class TestPage:
    def test_says_what_was_found(self, files):
        html = files["index.html"].decode()

        for text in ("A note.", "Over-represented where only the student is wrong", "correlate by"):
            assert text in html
        for title in ("Fidelity of student A", "Fidelity of student B", "Attention distance by block"):
            assert title in html
        assert "Faithfulness, student" in html
        assert "bee <b>" not in html

    def test_baselines_stand_in_the_table_where_there_are_any(self, whole):
        tables = tables_by_title(whole)

        ours, theirs = (tables[f"Fidelity of student {name}, block.head"] for name in "AB")
        assert "… alone" in ours.columns
        assert "… alone" not in theirs.columns
        for table in tables.values():
            assert {len(row) for row in table.rows} == {len(table.columns)}
        first = dict(zip(ours.columns, ours.rows[0], strict=False))
        assert (first["student map"], first["teacher map"], first["distilled"]) == ("1.0", "2.0", "yes")
        assert ours.rows[1][:3] == ["2.0", "2.0+1", ""]

    def test_the_fidelity_table_holds_each_metric_beside_its_baselines(self, whole):
        result = whole.fidelity["student A"]
        table = tables_by_title(whole)["Fidelity of student A, block.head"]

        for values, row in zip(table.rows, result.rows, strict=True):
            expected = [row.metrics, row.alone, row.permuted]
            for metric, title in (
                ("js", "Jensen–Shannon, nats"),
                ("spearman", "rank correlation, class row"),
                ("cls_overlap", "overlap of the class rows"),
            ):
                place = table.columns.index(title)
                assert table.columns[place + 1 : place + 3] == ["… alone", "… permuted"]
                assert values[place : place + 3] == [each[metric] for each in expected]
            assert values[table.columns.index("entropy, nats")] == row.metrics["entropy"]
            assert values[table.columns.index("distance, px")] == row.metrics["mean_distance"]
            cka = result.cka[row.student_block, row.teacher_block]
            assert values[-3:] == [cka.value, cka.alone, cka.other_images]

    def test_the_faithfulness_table_has_an_order_and_a_class_a_column(self, whole):
        table = tables_by_title(whole)["Faithfulness, student"]

        for method, *values in table.rows:
            orders = whole.faithfulness["student"][method]
            found = dict(zip(table.columns[1::3], zip(values[::3], values[1::3], strict=True), strict=True))
            for order in ("positive", "negative"):
                for target, words in (("predicted", "predicted"), ("target", "true")):
                    each = orders[order][target]
                    assert found[f"{order}, {words}: AUC"] == (each.auc, each.gap)

    def test_the_distance_table_has_the_mean_over_heads(self, whole):
        reach = {
            "teacher": torch.tensor([[0.2, 0.4], [0.1, torch.nan]]),
            "student A": torch.tensor([[0.6, 0.8]]),
        }
        table = tables_by_title(replace(whole, reach=reach))["Attention distance by block"]

        assert table.columns == ["block", "teacher", "student A"]
        assert table.rows == [[0, pytest.approx(0.3), pytest.approx(0.7)], [1, pytest.approx(0.1), None]]

    def test_heat_maps_hold_the_divergence_of_every_map(self, whole):
        result = whole.fidelity["student A"]

        chart = heat_map("student A", result)

        assert [*chart.panels] == ["student A", "student alone", "permuted heads"]
        assert chart.blocks == ["1", "2"]
        for (title, values), part in zip(chart.panels.items(), ("metrics", "alone", "permuted"), strict=True):
            # The pairs of `make` are of the maps 1.0, 2.0 and 1.1; there is none of 2.1.
            found = [values[0, 0], values[1, 0], values[0, 1]]
            assert found == [getattr(row, part)["js"] for row in result.rows], title
            assert np.isnan(values[1, 1])
        assert [*heat_map("student B", whole.fidelity["student B"]).panels] == ["student B", "permuted heads"]

    def test_curves_are_those_of_the_class_predicted(self, whole):
        chart = removal_curves(whole)

        (of_model,) = whole.faithfulness.values()
        for order, words in (("positive", "most"), ("negative", "least")):
            lines = chart.panels[f"student, {words} relevant first"]
            assert [*lines] == ["rollout", "random"]
            for method, (fractions, values) in lines.items():
                assert fractions == of_model[method][order]["predicted"].fractions
                assert values == of_model[method][order]["predicted"].probability

    @pytest.mark.parametrize("left_out", ["fidelity", "faithfulness"])
    def test_what_was_not_measured_has_no_chart(self, left_out, whole):
        page = page_of(replace(whole, **{left_out: {}}), None)

        assert bool(page.heat_maps) == (left_out != "fidelity")
        assert bool(page.curves) == (left_out != "faithfulness")

    def test_shows_figure_1_where_there_is_one(self, files, whole):
        html = files["index.html"].decode()
        shown = [name for name in WITH_TEACHER if b64encode(files[name]).decode() in html]

        assert shown == ["figure_1.png"]
        assert "Where teacher and student look" in html
        assert "Where teacher and student look" not in render(page_of(whole, None))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_of_pictures_whose_class_nobody_knows(self, channels, tiny, undrawn):
        html = files_of(make(tiny, ["student"], channels, labels=[-1] * 6))["index.html"].decode()

        assert "Where they look" in html
        assert "http://" not in html.replace("http://www.w3.org", "")

    def test_of_images_in_one_cell(self, whole):
        html = render(page_of(replace(whole, cells=[STUDENT_WRONG] * 6), None))

        assert "student wrong" in html.lower()
