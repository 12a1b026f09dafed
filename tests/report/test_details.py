"""Calibration and the gain of every class: read from small files, computed over seeds, drawn."""

import json
import math
import re
import warnings

import numpy as np
import pytest
from scipy import stats

from vitkd.report.comparison import compare
from vitkd.report.experiments import find_experiments
from vitkd.report.figures.calibration import MIN_IMAGES, pool, reliability_of
from vitkd.report.figures.classes import MAX_CLASSES, gains_by_class
from vitkd.report.pages import plot_groups
from vitkd.report.parsing import Bins, read_details
from vitkd.report.runs import find_runs
from vitkd.runs.folder import RunFolder

BINS = {"images": [0, 30, 70], "confidence": [None, 0.5, 0.9], "accuracy": [None, 0.4, 0.95]}


def details(*accuracies: float | None, names: list[str] | None = None, **changes: object) -> dict:
    """What a run leaves whose classes have these accuracies, in shares of 1."""
    last = {"class_accuracy": [*accuracies], "confidence_bins": BINS}
    images = [0 if accuracy is None else 20 for accuracy in accuracies]
    names = names or [f"class {number}" for number in range(len(accuracies))]
    return {"class_names": names, "class_images": images, "last": last, "best": last} | changes


def comparison_of(runs):
    (experiment,) = find_experiments(find_runs([runs.outputs]))
    return compare(experiment)


def texts_of(group) -> list[str]:
    return [text for plot in group.plots for text in re.findall(r"<text[^>]*>([^<]*)", plot.svg)]


def test_what_a_real_run_leaves_is_read(finished):
    arrays = np.load(finished / "test_predictions.npz")
    right, labels = arrays["last"] == arrays["labels"], arrays["labels"]

    found = read_details(RunFolder(finished).details)

    assert found.class_names == tuple("0123456789")
    assert found.class_images == tuple(np.bincount(labels))
    assert found.class_accuracy == pytest.approx([100 * right[labels == c].mean() for c in range(10)])
    assert sum(found.bins.images) == len(labels)


LAST = details(0.5)["last"]
NONE = {
    "empty": {},
    "a list": [],
    "no classes": details(),
    "other lengths": details(0.5, class_images=[3, 4]),
    "texts": details(0.5, class_images=["3"]),
    "negative": details(0.5, class_images=[-3]),
    "huge": details(0.5, class_images=[10**200]),
    "a share above 1": details(1.5),
    "a share that is none": details(0.5, last=LAST | {"class_accuracy": ["0.5"]}),
    "no bins": details(0.5, last=LAST | {"confidence_bins": None}),
    "empty bins": details(0.5, last=LAST | {"confidence_bins": {key: [] for key in BINS}}),
    "uneven bins": details(0.5, last=LAST | {"confidence_bins": BINS | {"accuracy": [0.1]}}),
    "no epoch": details(0.5, last=3),
    "names that are none": details(0.5, class_names=5),
}


@pytest.mark.parametrize("name", NONE)
def test_anything_else_counts_as_absent(name, tmp_path):
    (tmp_path / "test_details.json").write_text(json.dumps(NONE[name]))

    assert read_details(tmp_path / "test_details.json") is None


def test_bins_are_pooled_as_if_all_images_were_of_one_run():
    random = np.random.default_rng(0)
    confidence = random.beta(4, 2, (3, 400))
    right = (random.random((3, 400)) < confidence**2).astype(float)
    seeds, edges = [], np.linspace(0, 1, 11)
    for sure, hit in zip(confidence, right, strict=True):
        images = np.histogram(sure, edges)[0]
        sums = (np.histogram(sure, edges, weights=weights)[0] for weights in (sure, hit))
        columns = [[100 * t / n if n else None for t, n in zip(total, images, strict=True)] for total in sums]
        seeds.append(Bins(tuple(images), *map(tuple, columns)))

    found = pool(seeds)

    images = np.histogram(confidence, edges)[0]
    enough = images >= MIN_IMAGES
    assert 0 < enough.sum() < 10, "some bins are left out"
    accuracy = np.histogram(confidence, edges, weights=right)[0][enough] / images[enough]
    sure = np.histogram(confidence, edges, weights=confidence)[0][enough] / images[enough]
    assert found.accuracy == pytest.approx(100 * accuracy)
    assert found.confidence == pytest.approx(100 * sure)
    assert found.share.sum() == pytest.approx(1)


def test_the_spread_is_over_seeds():
    """Where all seeds have equally many images it is the usual standard deviation."""
    accuracies = [(40.0, 90.0), (50.0, 80.0), (75.0, 70.0)]
    seeds = [Bins((20, 60), (45.0, 85.0), each) for each in accuracies]

    assert pool(seeds).std == pytest.approx(np.std(accuracies, axis=0, ddof=1))
    assert pool(seeds[:1]).std.tolist() == [0, 0]
    assert pool([Bins((1, 2), (45.0, 85.0), (0.0, 50.0))]) is None


def test_gains_of_classes_are_paired_by_seed(runs):
    random = np.random.default_rng(1)
    alone, arm = random.uniform(0.4, 0.6, (2, 5, 3))
    arm[:, 1] = alone[:, 1] + 0.2 + 0.001 * np.arange(5)
    for seed in range(5):
        runs.add(method="none", seed=seed, details=details(*alone[seed], None))
        runs.add(seed=seed, details=details(*arm[seed], None))
    experiment = comparison_of(runs).experiment

    gains = {gain.name: gain for gain in gains_by_class(experiment.arms[0], experiment.baseline)}

    assert [*gains] == sorted(gains, key=lambda name: -gains[name].mean)
    assert gains.keys() == {"class 0", "class 1", "class 2"}, "an absent class has no gain"
    p_values = [stats.ttest_rel(100 * arm[:, c], 100 * alone[:, c]).pvalue for c in range(3)]
    assert gains["class 1"].p_holm == pytest.approx(3 * min(p_values))
    for c in range(3):
        differences = 100 * (arm[:, c] - alone[:, c])
        assert gains[f"class {c}"].differences == pytest.approx(differences)
    assert [name for name, gain in gains.items() if gain.is_significant] == ["class 1"]


@pytest.mark.parametrize("other", [details(0.5, names=["other"]), None], ids=["other classes", "no file"])
def test_what_cannot_be_paired_has_no_gains(other, runs):
    runs.add(method="none", details=other)
    runs.add(details=details(0.5))
    experiment = comparison_of(runs).experiment

    assert gains_by_class(experiment.arms[0], experiment.baseline) == []


def test_both_are_on_the_page_with_their_names(runs, report):
    names = ["日本 $x$", "<b>&amp;", "a_{b}"]
    for seed, share in enumerate((0.5, 0.6, 0.7)):
        measured = {"test/ece": share / 10, "test/f1_macro": share, "test/acc_top5": None}
        for method in ("none", "attention"):
            found = details(share, 0.5, 0.25, names=names)
            runs.add(method=method, seed=seed, details=found, metrics=measured)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(runs.outputs)

    page = (runs.outputs / "report" / "report.html").read_text()
    assert "Gain of every class" in page
    assert "student alone: ECE 6.00 ± 1.00" in page
    assert "<b>&amp;" not in page
    assert "a_{b} (20)" in page
    (row, _) = json.loads((runs.outputs / "report" / "report.json").read_text())["experiments"][0]["arms"]
    assert (row["f1_macro_mean_pct"], row["ece_mean_pp"]) == pytest.approx((60, 6))
    assert row["acc_top5_mean_pct"] is None


def test_of_many_classes_both_ends_are_shown(runs):
    alone = [0.5] * 100
    for seed in range(3):
        arm = [0.25 + (c + seed / 10) / 200 for c in range(100)]
        runs.add(method="none", seed=seed, details=details(*alone))
        runs.add(seed=seed, details=details(*arm))

    (group,) = (g for g in plot_groups(comparison_of(runs)) if g.title == "Gain of every class")

    shown = [text for text in texts_of(group) if text.startswith("class ")]
    assert len(shown) == MAX_CLASSES
    assert {"class 99 (20)", "class 0 (20)"} <= {*shown}
    assert "class 50 (20)" not in shown


def test_runs_that_left_no_details_are_reported_without(runs):
    for method in ("none", "attention"):
        runs.add(method=method)
    comparison = comparison_of(runs)

    assert reliability_of(comparison.experiment.baseline) is None
    assert not {group.title for group in plot_groups(comparison)} & {"Calibration", "Gain of every class"}


def test_the_student_alone_has_its_calibration(runs):
    runs.add(method="none", details=details(0.5))

    (calibration,) = (g for g in plot_groups(comparison_of(runs)) if g.title == "Calibration")

    assert len(calibration.plots) == 1
    assert not math.isnan(reliability_of(comparison_of(runs).experiment.baseline).std.sum())
