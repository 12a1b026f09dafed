"""The metrics that are measured again, beside those of the run; and the classes that are the hardest."""

import math

import pytest

from vitkd.cli.console import print_comparison, print_hardest_classes


@pytest.mark.parametrize(
    ("reported", "measured", "equal"),
    [
        (0.5, 0.5, True),
        (0.5, 0.25, False),
        (None, math.nan, True),
        (None, 0.5, False),
        (0.5, math.nan, False),
    ],
)
def test_what_is_not_a_number_is_null_in_a_file(reported, measured, equal, capsys):
    assert print_comparison({"test/ece": reported}, {"test/ece": measured}) == equal
    assert capsys.readouterr().out.splitlines()[1].endswith("equal" if equal else "differs")


def test_a_metric_that_the_run_lacks_differs():
    assert not print_comparison({}, {"test/ece": math.nan})


def test_the_hardest_classes_and_what_they_are_taken_for(capsys):
    confusion = [[9, 1, 0, 0], [0, 0, 0, 0], [4, 1, 1, 2], [0, 0, 0, 3]]

    print_hardest_classes(confusion, ["[red]", "absent", "cat", "dog"])

    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["cat", "8", "12.50%", "[red]", "(4),", "dog", "(2),", "absent", "(1)"],
        ["[red]", "10", "90.00%", "absent", "(1)"],
    ]


def test_where_all_is_right_no_class_is_hard(capsys):
    print_hardest_classes([[9, 0], [0, 3]], ["cat", "dog"])

    assert not capsys.readouterr().out
