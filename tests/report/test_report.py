"""The command from end to end: what it prints and writes, and its errors."""

import contextlib
import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from scipy import stats

from tests.report.conftest import Runs
from vitkd import __version__
from vitkd.report.__main__ import main
from vitkd.report.comparison import compare
from vitkd.report.experiments import find_experiments
from vitkd.report.figures.fidelity import distances_of
from vitkd.report.figures.lines import spaced
from vitkd.report.figures.plots import VARIABLES
from vitkd.report.pages import plot_groups
from vitkd.report.runs import Fidelity, Run, find_runs
from vitkd.report.statistics import BOOTSTRAP_COVERAGE

FILES = {"report.md", "report.csv", "report.json", "report.html"}
VOID = {"meta", "link", "br", "hr", "img", "input"}


def curves(final: float) -> str:
    lines = ["step,train/gradient_ratio,val/acc,val/transfer_loss"]
    lines += [f"{10 * n},{0.1 * n},{final * n / 3},{1 / n}" for n in (1, 2, 3)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def grid(finished, tmp_path_factory):
    """Three seeds of two granularities, two losses, three alphas over decades, and the student alone."""
    runs = Runs(tmp_path_factory.mktemp("grid"), finished)
    random = np.random.default_rng(0)
    shared = {seed: random.normal(0, 0.01) for seed in range(3)}
    cells = [*product(("head", "block"), ("kl", "mse"), (0, 0.001, 0.5))]
    for seed, luck in shared.items():
        acc = 0.9 + luck
        runs.add(acc=acc, seed=seed, method="none", curves=curves(acc))
        for granularity, loss, alpha in cells:
            acc = 0.92 + luck + random.normal(0, 0.002)
            runs.add(acc=acc, seed=seed, granularity=granularity, loss=loss, alpha=alpha, curves=curves(acc))
    runs.add(state="failed", alpha=0.3)
    return runs


class Written(NamedTuple):
    printed: str
    out: Path

    def read(self, name: str) -> str:
        return (self.out / name).read_text("utf-8")


@pytest.fixture(scope="module")
def written(grid) -> Written:
    """What one call of the command prints and writes."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(grid.outputs)])
    return Written(printed.getvalue(), grid.outputs / "report")


class Page(HTMLParser):
    """Checks that tags close as they open, and notes every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]


def test_everything_is_written_and_nothing_else(grid, written):
    assert {path.name for path in written.out.iterdir()} == FILES
    assert "12 arms against the student alone" in written.printed
    assert "failed, left out" in written.printed
    assert str(grid.outputs / "report" / "report.html") in written.printed


def test_metrics_are_those_of_scipy_in_all_files(written):
    rows = csv.DictReader(written.read("report.csv").splitlines())
    (csv_row,) = [row for row in rows if row["arm"] == "block mse, alpha 0.5"]
    content = json.loads(written.read("report.json"))
    (json_row,) = [arm for arm in content["experiments"][0]["arms"] if arm["arm"] == csv_row["arm"]]
    facts = {run["path"]: run for run in content["runs"]}
    arm = [facts[json_row["runs"][str(seed)]]["test_last_pct"] for seed in range(3)]
    baseline = content["experiments"][0]["arms"][0]
    alone = [facts[baseline["runs"][str(seed)]]["test_last_pct"] for seed in range(3)]
    expected = stats.ttest_rel(arm, alone)
    ends = [json_row["gain_low_pp"], json_row["gain_high_pp"]]

    assert json_row["p"] == pytest.approx(expected.pvalue)
    assert float(csv_row["p"]) == json_row["p"]
    assert json_row["last_mean_pct"] == pytest.approx(np.mean(arm))
    assert json_row["last_std_pct"] == pytest.approx(np.std(arm, ddof=1))
    assert json_row["gain_mean_pp"] == pytest.approx(np.mean(arm) - np.mean(alone))
    assert ends == pytest.approx(list(expected.confidence_interval(0.95)))
    gain, mean = f"{json_row['gain_mean_pp']:+.2f}", f"{np.mean(arm):.2f} ± {np.std(arm, ddof=1):.2f}"
    for text in (written.read("report.md"), written.read("report.html"), written.printed):
        assert gain in text.replace("−", "-")
        assert mean in text


def test_the_coverage_of_the_bootstrap_is_said_beside_it(written):
    intervals = json.loads(written.read("report.json"))["intervals"][
        "gain_bootstrap_low_pp, gain_bootstrap_high_pp"
    ]

    for n, coverage in BOOTSTRAP_COVERAGE.items():
        for text in (intervals, written.read("report.md"), written.read("report.html")):
            assert f"{100 * coverage:.0f} % with {n}" in text


def test_the_same_runs_give_the_same_files(grid, written, report):
    """The second time the first report is there too."""
    before = {name: written.read(name) for name in FILES}

    assert report(grid.outputs) == written.printed
    assert {name: written.read(name) for name in FILES} == before


def test_the_page_is_complete_and_loads_nothing(written):
    text = written.read("report.html")

    page = Page(text)

    assert page.open == []
    loading = ("src", "href", "xlink:href", "srcset", "data")
    requests = [value for _, name, value in page.attributes if name in loading]
    assert all(value.startswith(("#", "data:")) for value in requests)
    assert not re.search(r"@import|url\((?!#|data:)|<script|<!DOCTYPE svg", text)
    # XML's names of names are no addresses.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= {
        *("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"),
    }


def test_plots_take_every_colour_from_the_page(grid):
    (experiment,) = find_experiments(find_runs([grid.outputs]))
    groups = plot_groups(compare(experiment))

    assert [(group.title, len(group.plots)) for group in groups] == [
        *(("Gain of every arm", 1), ("Heat map of the gains", 1), ("Accuracy over alpha", 2)),
        *(("Learning curves", 4), ("Gradient norms of the two losses", 2)),
        ("Attention fidelity against accuracy", 2),
    ]
    for group in groups:
        for plot in group.plots:
            ET.fromstring(plot.svg)
            assert not any(colour in plot.svg for colour in VARIABLES)
            assert "var(--ink)" in plot.svg
            assert "digits" in group.caption


def test_no_two_plots_share_an_identifier(written):
    plots = re.findall(r"<svg.*?</svg>", written.read("report.html"), flags=re.DOTALL)

    paths = [set(re.findall(r'<(?:clipPath|path) id="(\w{11})"', plot)) for plot in plots]

    assert sum(map(len, paths)) == len(set().union(*paths))


def test_units_are_never_mixed_on_one_axis(grid):
    (experiment,) = find_experiments(find_runs([grid.outputs]))
    fidelity = plot_groups(compare(experiment))[-1]

    texts = [" ".join(re.findall(r"<text[^>]*>([^<]*)", plot.svg)) for plot in fidelity.plots]

    assert "KL(teacher ‖ student), nats a row" in texts[0]
    assert "mean squared difference of scores" not in texts[0]
    assert "mean squared difference of scores" in texts[1]


def test_explained_runs_are_in_a_plot_of_their_own_and_in_that_of_their_loss(runs):
    runs.add(method="none")
    epochs = {0: None, 1: "best", 2: "best", 3: "last"}
    for seed, epoch in epochs.items():
        path = runs.add(seed=seed, acc=0.9 + 0.01 * seed, best=0.8, curves=curves(0.9))
        (path / "explain").mkdir()
        fidelity = {"summary": {"js_distilled": 0.2}} | ({"epoch": epoch} if epoch else {})
        (path / "explain" / "fidelity.json").write_text(json.dumps(fidelity))
    (experiment,) = find_experiments(find_runs([runs.outputs]))

    fidelity = plot_groups(compare(experiment))[-1]

    texts = [" ".join(re.findall(r"<text[^>]*>([^<]*)", plot.svg)) for plot in fidelity.plots]
    assert ["Jensen–Shannon" in text for text in texts] == [True, True, False]
    assert ["(best epoch)" in text for text in texts] == [True, False, False]
    assert ["2 runs" in texts[0], "1 run" in texts[1], "4 runs" in texts[2]] == [True, True, True]
    assert len({plot.description for plot in fidelity.plots}) == 3


def test_runs_on_labels_alone_are_hollow_dots(runs):
    for seed in range(3):
        runs.add(seed=seed, alpha=1.0, curves=curves(0.8 + 0.01 * seed))
    for seed in range(2):
        runs.add(seed=seed, alpha=0.5, curves=curves(0.9 + 0.01 * seed))
    (experiment,) = find_experiments(find_runs([runs.outputs]))

    (plot,) = plot_groups(compare(experiment))[-1].plots

    dots = re.findall(r'<use [^>]*style="([^"]*) stroke: var\(--series-0\)', plot.svg)
    # The last is the legend's.
    assert dots == ["fill-opacity: 0;"] * 3 + ["fill: var(--series-0); fill-opacity: 0.8;"] * 3


@pytest.mark.parametrize(("epoch", "accuracy"), [("best", 80.0), ("last", 91.0)])
def test_an_explained_run_stands_at_the_accuracy_of_its_epoch(epoch, accuracy):
    run = Run(Path("nowhere"), "done", acc_last=91.0, acc_best=80.0, fidelity=Fidelity(0.2, epoch))

    ((distance, value, at_epoch),) = distances_of(run)

    assert (distance.epoch, value, at_epoch) == (epoch, 0.2, accuracy)
    assert f"{epoch} epoch" in distance.axis_label


def test_text_from_runs_is_text(runs, report):
    runs.add(method="none")
    runs.add(alpha=0.5, dataset__name="<b>|bold|</b>", name="x")
    runs.add(alpha=0.5, teacher__checkpoint="<script>alert(1)</script>")
    runs.add(alpha=0.5)

    report(runs.outputs)

    page = (runs.outputs / "report" / "report.html").read_text("utf-8")
    assert "<b>" not in page
    assert "<script" not in page
    assert "\\|bold\\|" in (runs.outputs / "report" / "report.md").read_text("utf-8")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r+", "\n\r\n-", " \t@"])
def test_no_cell_is_a_formula_and_numbers_stay_numbers(start, runs, report):
    name = f"{start}HYPERLINK(1)"
    for seed in range(2):
        for acc, method in ((0.9, "none"), (0.8, "attention")):
            path = runs.add(acc=acc, seed=seed, method=method)
            config = yaml.safe_load((path / "config.yaml").read_text())
            config["dataset"]["name"] = name
            (path / "config.yaml").write_text(yaml.safe_dump(config))

    report(runs.outputs)

    with (runs.outputs / "report" / "report.csv").open(newline="", encoding="utf-8") as file:
        _, row = csv.DictReader(file)
    assert row["dataset"] == row["experiment"] == f"'{name.strip()}"
    assert float(row["gain_mean_pp"]) == pytest.approx(-10)


def test_many_runs_in_one_state_are_counted(runs, report):
    runs.add(method="none")
    for n in range(7):
        runs.add(state="failed", seed=n)
    runs.add("cut", state="stopped")

    printed = report(runs.outputs)

    assert "7 runs failed: left out" in printed
    assert "cut: stopped, left out" in printed


def test_runs_of_another_version_are_named_in_one_line(runs, report):
    runs.add(method="none")
    for n in range(7):
        runs.add(version="0.0.9", seed=n)

    printed = report(runs.outputs)

    (line,) = [line for line in printed.splitlines() if "0.0.9" in line]
    assert line.startswith("7 runs incompatible")
    assert __version__ in line


def test_nothing_finished_yet_is_no_error(runs, report):
    runs.add("cut", state="stopped")

    printed = report(runs.outputs)

    assert "cut: stopped" in printed
    assert "No run has finished yet" in (runs.outputs / "report" / "report.html").read_text("utf-8")
    assert (runs.outputs / "report" / "report.csv").read_text() == ""


@pytest.mark.parametrize("alone", [True, False])
def test_one_run_is_enough_for_a_report(runs, report, alone):
    runs.add(method="none" if alone else "attention", alpha=0.5, curves=curves(0.9))

    printed = report(runs.outputs)

    assert "90.00" in printed
    assert "real" not in printed


def test_a_best_epoch_chosen_on_the_test_images_is_called_so(runs, report):
    runs.add(method="none", dataset__validate_on="test")

    printed = report(runs.outputs)

    assert "optimistic" in printed
    assert "best on test (optimistic)" in (runs.outputs / "report" / "report.md").read_text("utf-8")


def test_a_folder_without_runs_among_others_is_named(runs, report):
    runs.add(method="none")
    (runs.outputs / "empty").mkdir()

    assert f"{runs.outputs / 'empty'}: no runs in it" in report(runs.outputs, runs.outputs / "empty")


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_errors_are_one_line(runs, tmp_path, capsys):
    runs.add(method="none")
    (tmp_path / "file").write_text("")

    assert fails(capsys, tmp_path / "nowhere").startswith("error: ")
    assert "--out" in fails(capsys, runs.outputs, "--out", tmp_path / "file")
    assert "--out" in fails(capsys, runs.outputs, "--out", tmp_path / "file" / "below")


def test_an_empty_folder_is_one_line(tmp_path, capsys):
    assert "no runs in it" in fails(capsys, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written(runs, tmp_path, capsys):
    runs.add(method="none")
    (tmp_path / "locked").mkdir(mode=0o500)

    assert "--out" in fails(capsys, runs.outputs, "--out", tmp_path / "locked")


def test_a_full_disk_is_one_line(runs, capsys, monkeypatch):
    runs.add(method="none")

    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitkd.report.__main__.write_atomically", full)

    assert "No space left" in fails(capsys, runs.outputs)


def test_labels_keep_apart():
    assert spaced([0.0, 0.01, 0.5, 0.98, 1.0], 0.1) == [1, 2, 4]


@pytest.mark.slow
def test_a_real_grid(command, tmp_path, report):
    """What training leaves is what the report reads: nothing in between is invented."""
    arguments = ["student.depth=1", "teacher.depth=1", "trainer=cpu", "trainer.max_epochs=2"]
    arguments += ["teacher.max_epochs=1", "trainer.limit_train_batches=3", f"paths.outputs={tmp_path}"]
    arguments += ["teacher.trainer.limit_train_batches=3"]
    arguments += ["granularity=head,block", "loss=mse,kl", "alpha=0.1,1", "seed=0,1,2"]
    done = command("train", "-m", "hydra/launcher=stacked", *arguments)
    assert done.code == 0, done.err

    printed = report(tmp_path)

    assert "4 arms against the student alone" in printed
    content = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    (experiment,) = content["experiments"]
    assert [arm["seeds"] for arm in experiment["arms"]] == [3] * 5
    assert sum(run["is_teacher"] for run in content["runs"]) == 1
    assert (tmp_path / "report" / "report.html").read_text("utf-8").count("<svg") == 1 + 2 + 1 + 4 + 2 + 2 + 8
