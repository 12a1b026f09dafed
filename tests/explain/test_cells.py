"""The gallery's cells, its choice, and the classes that are over-represented, against scipy and by hand."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
import torch

from vitkd.errors import ConfigError
from vitkd.explain.gallery.cells import (
    CELLS,
    Answers,
    cells,
    choose,
    class_index,
    nothing_in,
    over_represented,
)

NAMES = ("cat", "dog", "horse", "ship")


def answers(count=200, teacher_errors=0.3, student_errors=0.4, seed=0, names=NAMES):
    random = np.random.default_rng(seed)
    labels = random.integers(len(names), size=count)

    def predicted(errors):
        wrong = random.random(count) < errors
        return np.where(wrong, (labels + random.integers(1, len(names), size=count)) % len(names), labels)

    teacher, student = predicted(teacher_errors), predicted(student_errors)
    return Answers(labels, teacher, student, names)


def by_hand():
    # In turn: both right, teacher only, student only, both wrong (agreeing), both wrong.
    return Answers(
        labels=[0, 1, 2, 3, 0],
        teacher_predicted=[0, 1, 0, 1, 1],
        student_predicted=[0, 0, 2, 1, 2],
        class_names=NAMES,
    )


class TestCells:
    def test_by_hand(self):
        found = cells(by_hand())
        assert {name: cell.indices.tolist() for name, cell in found.items()} == {
            "both right": [0],
            "student wrong": [1],
            "teacher wrong": [2],
            "both wrong": [3, 4],
        }
        assert [cell.count for cell in found.values()] == [1, 1, 1, 2]

    def test_each_image_is_in_one_cell(self):
        found = cells(answers())
        assert tuple(found) == CELLS
        assert sorted(np.concatenate([cell.indices for cell in found.values()])) == [*range(200)]

    def test_tensors_are_taken(self):
        given = by_hand()
        names = ("labels", "teacher_predicted", "student_predicted")
        tensors = Answers(*(torch.tensor(getattr(given, name)) for name in names), NAMES)
        assert cells(tensors)["both wrong"].indices.tolist() == [3, 4]

    def test_answers_that_do_not_fit_are_refused(self):
        with pytest.raises(AssertionError, match="one prediction an image"):
            replace(by_hand(), labels=[0, 1])
        with pytest.raises(AssertionError, match=r"student_predicted .* among no 4 class names"):
            replace(by_hand(), student_predicted=[0, 1, 2, 3, 4])


class TestChoice:
    def test_is_of_the_cell_without_repeats(self):
        for cell in cells(answers()).values():
            chosen = choose(cell, 8, seed=0)
            assert len({*chosen.tolist()}) == 8
            assert {*chosen.tolist()} <= {*cell.indices.tolist()}

    def test_is_all_there_are(self):
        assert sorted(choose(cells(by_hand())["both wrong"], 8, seed=0)) == [3, 4]

    def test_depends_on_the_seed_alone(self):
        found = cells(answers())
        first = [choose(cell, 8, seed=5).tolist() for cell in found.values()]
        np.random.default_rng().random(3)
        backwards = [choose(cell, 8, seed=5).tolist() for cell in reversed(found.values())]
        assert first == backwards[::-1]
        assert first[0] != choose(found["both right"], 8, seed=6).tolist()

    def test_a_larger_one_adds_to_a_smaller(self):
        cell = cells(answers())["both right"]
        assert choose(cell, 20, seed=1)[:5].tolist() == choose(cell, 5, seed=1).tolist()

    def test_is_stable_when_other_cells_change(self):
        """Another student that errs on other images leaves what it shares with this one chosen."""
        before = answers()
        student = before.student_predicted.copy()
        moved = cells(before)["both right"].indices[:30]
        student[moved] = (before.labels[moved] + 1) % 4
        after = replace(before, student_predicted=student)
        for name in ("teacher wrong", "both wrong"):
            chosen = [choose(cells(each)[name], 8, seed=0).tolist() for each in (before, after)]
            assert chosen[0] == chosen[1]
        kept = [i for i in choose(cells(before)["both right"], 20, seed=0).tolist() if i not in moved]
        assert choose(cells(after)["both right"], len(kept), seed=0).tolist() == kept

    def test_is_even(self):
        """Over seeds, each image of a cell is chosen about as often."""
        cell = cells(answers(count=60))["both right"]
        times = np.zeros(60)
        for seed in range(2000):
            times[choose(cell, 5, seed)] += 1
        expected = 2000 * 5 / cell.count
        np.testing.assert_allclose(times[cell.indices], expected, rtol=0.25)

    def test_of_one_class(self):
        given = answers()
        chosen = choose(cells(given)["both right"], 5, seed=0, of_class="horse")
        assert [NAMES[label] for label in given.labels[chosen]] == ["horse"] * 5

    def test_an_unknown_class_is_named_with_near_ones(self):
        cell = cells(by_hand())["both right"]
        with pytest.raises(ConfigError, match=r"class hose: the data set has none .* did you mean horse"):
            choose(cell, 5, seed=0, of_class="hose")
        with pytest.raises(ConfigError, match=r"class zzz: .* there are cat, dog, horse, ship"):
            class_index("zzz", NAMES)

    def test_an_empty_cell_says_so(self):
        empty = cells(answers(teacher_errors=0, student_errors=0))["student wrong"]
        assert choose(empty, 5, seed=0).tolist() == []
        assert nothing_in(empty) == "no image among 200: the teacher is right and the student wrong"
        cell = cells(by_hand())["both wrong"]
        assert choose(cell, 5, seed=0, of_class="dog").tolist() == []
        assert nothing_in(cell, "dog") == "no image of class dog among 5: teacher and student are wrong"

    def test_no_images_are_refused(self):
        cell = cells(by_hand())["both right"]
        with pytest.raises(ConfigError, match="count=0: must be at least 1"):
            choose(cell, 0, seed=0)


class TestOverRepresented:
    def test_the_chance_of_as_many_by_counting(self):
        # Ten images, four of class a; of the three in the cell all are a. Sets of three: 120, of a alone: 4.
        labels = np.array([0] * 4 + [1] * 6)
        wrong = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
        given = Answers(labels, labels, np.where(wrong, 1 - labels, labels), ("a", "b"))
        (found,) = over_represented(cells(given)["student wrong"], level=1)
        sets = [{*each} for each in combinations(range(10), 3)]
        assert found.label == "a"
        assert found.count == 3
        assert found.expected == pytest.approx(3 * 4 / 10)
        assert found.ratio == pytest.approx(2.5)
        assert found.p == pytest.approx(sum(each <= {0, 1, 2, 3} for each in sets) / len(sets))
        assert found.p_holm == pytest.approx(2 * found.p)
        assert over_represented(cells(given)["student wrong"]) == []

    def test_a_planted_class_is_named_alone(self):
        given = answers(count=2000, student_errors=0.2, teacher_errors=0)
        cats = np.flatnonzero(given.labels == 0)[::2]
        student = given.student_predicted.copy()
        student[cats] = 1
        (found,) = over_represented(cells(replace(given, student_predicted=student))["student wrong"])
        assert found.label == "cat"
        assert found.ratio > 1.5
        assert found.p_holm < 1e-6
        json.dumps(asdict(found))

    def test_chance_names_hardly_any(self):
        many = tuple(f"class {i}" for i in range(50))
        named = [
            over_represented(cells(answers(count=1000, seed=seed, names=many))["student wrong"])
            for seed in range(100)
        ]
        assert sum(map(bool, named)) <= 10, "0.05 a family, so five or fewer are expected of 100"

    def test_classes_the_test_set_lacks_are_not_counted_as_tests(self):
        given = answers(names=NAMES)
        more = replace(given, class_names=(*NAMES, "plane", "frog"))
        cell, of_more = (cells(each)["both wrong"] for each in (given, more))
        assert over_represented(cell, level=1) == over_represented(of_more, level=1)

    def test_an_empty_cell_has_none(self):
        perfect = answers(teacher_errors=0, student_errors=0)
        assert over_represented(cells(perfect)["both wrong"], level=1) == []
