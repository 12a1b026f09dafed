"""The picture of a confusion matrix: what is written into it, whatever the classes are and are called."""

import warnings

import numpy as np
import pytest

from vitkd.train.confusion import confusion_figure
from vitkd.train.pictures import rendered


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_every_cell_with_images_has_their_number():
    confusion = np.array([[30, 2, 0], [0, 0, 0], [1, 0, 1234]])

    figure = confusion_figure(confusion, ["cat", "dog", "axolotl"])

    assert texts(figure) == ["30", "2", "1", "1,234"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "axolotl"]
    shares = figure.axes[0].images[0].get_array()
    assert np.allclose(shares, [[30 / 32, 2 / 32, 0], [0, 0, 0], [1 / 1235, 0, 1234 / 1235]])


@pytest.mark.parametrize(("classes", "named"), [(1, True), (40, True), (200, False)])
def test_of_many_classes_there_are_colours_only(classes, named):
    figure = confusion_figure(np.eye(classes, dtype=int), [f"class {c}" for c in range(classes)])

    assert len(texts(figure)) == (1 if classes == 1 else 0)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ("class 0" in labels) == named
    assert max(rendered(figure).shape) < 1500


def test_names_are_no_mathematics_and_may_be_long_or_chinese():
    names = ["$x^", "日本の猫", "a name that nobody would like to read to its end"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion_figure(np.ones((3, 3), int), names)
        rendered(figure)

    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0] == "$x^"
    assert labels[2].endswith("…")
