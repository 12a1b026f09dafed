"""The gallery's cells, its choice, and the classes that are over-represented, against scipy and by hand."""

import json
from dataclasses import asdict
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from vitkd.errors import ConfigError
from vitkd.explain.gallery.cells import CELLS, cells, choose, over_represented
from vitkd.explain.job import choose_images

NAMES = ("cat", "dog", "horse", "ship")


def answers(count=200, teacher_errors=0.3, student_errors=0.4, seed=0, classes=4):
    """Labels, and what teacher and student predict."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)

    def predicted(errors):
        wrong = random.random(count) < errors
        return np.where(wrong, (labels + random.integers(1, classes, size=count)) % classes, labels)

    return labels, predicted(teacher_errors), predicted(student_errors)


def by_hand():
    # In turn: both right, teacher only, student only, both wrong (agreeing), both wrong.
    return np.array([0, 1, 2, 3, 0]), np.array([0, 1, 0, 1, 1]), np.array([0, 0, 2, 1, 2])


def chosen_of(predictions, **changes):
    """What `choose_images` chooses of these."""
    settings = SimpleNamespace(**{"images": 5, "seed": 0, "of_class": None} | changes)
    return choose_images(cells(*predictions), predictions[0], NAMES, settings)


class TestCells:
    def test_by_hand(self):
        found = cells(*by_hand())
        assert {name: indices.tolist() for name, indices in found.items()} == {
            "both right": [0],
            "student wrong": [1],
            "teacher wrong": [2],
            "both wrong": [3, 4],
        }

    def test_each_image_is_in_one_cell(self):
        found = cells(*answers())
        assert tuple(found) == CELLS
        assert sorted(np.concatenate([*found.values()])) == [*range(200)]


class TestChoice:
    def test_is_of_the_cell_without_repeats(self):
        for cell in cells(*answers()).values():
            chosen = choose(cell, 8, seed=0)
            assert len({*chosen.tolist()}) == 8
            assert {*chosen.tolist()} <= {*cell.tolist()}

    def test_is_all_there_are(self):
        assert sorted(choose(cells(*by_hand())["both wrong"], 8, seed=0)) == [3, 4]

    def test_depends_on_the_seed_alone(self):
        found = cells(*answers())
        first = [choose(cell, 8, seed=5).tolist() for cell in found.values()]
        np.random.default_rng().random(3)
        backwards = [choose(cell, 8, seed=5).tolist() for cell in reversed(found.values())]
        assert first == backwards[::-1]
        assert first[0] != choose(found["both right"], 8, seed=6).tolist()

    def test_a_larger_one_adds_to_a_smaller(self):
        cell = cells(*answers())["both right"]
        assert choose(cell, 20, seed=1)[:5].tolist() == choose(cell, 5, seed=1).tolist()

    def test_is_stable_when_other_cells_change(self):
        """Another student that errs on other images leaves what it shares with this one chosen."""
        labels, teacher, student = answers()
        before = cells(labels, teacher, student)
        moved = before["both right"][:30]
        student[moved] = (labels[moved] + 1) % 4
        after = cells(labels, teacher, student)
        for name in ("teacher wrong", "both wrong"):
            chosen = [choose(each[name], 8, seed=0).tolist() for each in (before, after)]
            assert chosen[0] == chosen[1]
        kept = [i for i in choose(before["both right"], 20, seed=0).tolist() if i not in moved]
        assert choose(after["both right"], len(kept), seed=0).tolist() == kept

    def test_is_even(self):
        """Over seeds, each image of a cell is chosen about as often."""
        cell = cells(*answers(count=60))["both right"]
        times = np.zeros(60)
        for seed in range(2000):
            times[choose(cell, 5, seed)] += 1
        expected = 2000 * 5 / len(cell)
        np.testing.assert_allclose(times[cell], expected, rtol=0.25)

    def test_of_every_cell_by_name(self):
        chosen, notes = chosen_of(answers())
        assert [name for _, name in chosen] == [name for name in CELLS for _ in range(5)]
        assert all(position in cells(*answers())[name] for position, name in chosen)
        assert notes == []

    def test_of_one_class(self):
        given = answers()
        chosen, _ = chosen_of(given, images=3, of_class="horse")
        assert [NAMES[given[0][position]] for position, _ in chosen] == ["horse"] * 12

    def test_an_unknown_class_is_named_with_near_ones(self):
        with pytest.raises(ConfigError, match=r"class hose: the data set has none .* did you mean horse"):
            chosen_of(by_hand(), of_class="hose")
        with pytest.raises(ConfigError, match=r"class zzz: .* there are cat, dog, horse, ship"):
            chosen_of(by_hand(), of_class="zzz")

    def test_an_empty_cell_says_so(self):
        chosen, notes = chosen_of(answers(teacher_errors=0.5, student_errors=0))
        assert {name for _, name in chosen} == {"both right", "teacher wrong"}
        assert notes == [
            "There is no image among 200 where only the student is wrong.",
            "There is no image among 200 where both are wrong.",
        ]
        chosen, notes = chosen_of(by_hand(), of_class="dog")
        assert chosen == [(1, "student wrong")]
        assert notes[-1] == "There is no image of class dog among 5 where both are wrong."

    def test_a_class_without_images_is_refused(self):
        none = np.zeros(3, int)
        with pytest.raises(ConfigError, match="of_class=dog: no image of that class is in the test split"):
            chosen_of((none, none, none), of_class="dog")


class TestOverRepresented:
    def test_the_chance_of_as_many_by_counting(self):
        # Ten images, four of class a; of the three in the cell all are a. Sets of three: 120, of a alone: 4.
        labels = np.array([0] * 4 + [1] * 6)
        wrong = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
        cell = cells(labels, labels, np.where(wrong, 1 - labels, labels))["student wrong"]
        (found,) = over_represented(cell, labels, ("a", "b"), level=1)
        sets = [{*each} for each in combinations(range(10), 3)]
        assert found.label == "a"
        assert found.count == 3
        assert found.expected == pytest.approx(3 * 4 / 10)
        assert found.ratio == pytest.approx(2.5)
        assert found.p == pytest.approx(sum(each <= {0, 1, 2, 3} for each in sets) / len(sets))
        assert found.p_holm == pytest.approx(2 * found.p)
        assert over_represented(cell, labels, ("a", "b")) == []

    def test_a_planted_class_is_named_alone(self):
        labels, teacher, student = answers(count=2000, student_errors=0.2, teacher_errors=0)
        student[np.flatnonzero(labels == 0)[::2]] = 1
        (found,) = over_represented(cells(labels, teacher, student)["student wrong"], labels, NAMES)
        assert found.label == "cat"
        assert found.ratio > 1.5
        assert found.p_holm < 1e-6
        json.dumps(asdict(found))

    def test_chance_names_hardly_any(self):
        many = tuple(f"class {i}" for i in range(50))
        given = [answers(count=1000, seed=seed, classes=50) for seed in range(100)]
        named = [over_represented(cells(*each)["student wrong"], each[0], many) for each in given]
        assert sum(map(bool, named)) <= 10, "0.05 a family, so five or fewer are expected of 100"

    def test_classes_the_test_set_lacks_are_not_counted_as_tests(self):
        given = answers()
        cell = cells(*given)["both wrong"]
        found = over_represented(cell, given[0], NAMES, level=1)
        assert found
        assert found == over_represented(cell, given[0], (*NAMES, "plane", "frog"), level=1)

    def test_an_empty_cell_has_none(self):
        given = answers(teacher_errors=0, student_errors=0)
        assert over_represented(cells(*given)["both wrong"], given[0], NAMES, level=1) == []
