"""The study of few labels: what it trains, how it chooses, and what its table says."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from benchmarks import few_labels
from benchmarks.few_labels import (
    ALONE,
    ALPHAS,
    ARMS,
    CONTROLS,
    LEARN,
    Result,
    chosen_alphas,
    folder_of,
    markdown,
    read_arguments,
    read_results,
)


def result(arm: str = ALONE, alpha: str = "0.5", seed: int = 0, **own) -> Result:
    percent = dict.fromkeys(("test_last", "test_best", "val_last", "lost"), 50.0)
    values = {"stage": "main", "share": "1", **percent, **own}
    return Result(arm=arm, alpha=alpha, seed=seed, **values)


def finished(folder: Path, accuracy: float, wrong: int = 0) -> None:
    """A run's folder, as far as the study reads it; of 4 test images the first `wrong` are wrong."""
    folder.mkdir(parents=True)
    metrics = dict.fromkeys(("test/acc_last", "test/acc_best", "val/acc_last"), accuracy)
    versions = dict.fromkeys(("hardware/cpu_count", "hardware/device", "versions/torch"), "1")
    (folder / "metrics.json").write_text(json.dumps(metrics | versions))
    (folder / "config.yaml").write_text("{}")
    labels = np.arange(4)
    teacher = {} if "student-alone" in folder.name else {"teacher": np.array([0, 1, 2, 0])}
    last = np.where(labels < wrong, -1, labels)
    np.savez(folder / "test_predictions.npz", last=last, labels=labels, **teacher)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Commands of the study, whose runs are written at once: at alpha 0.15 all are best on validation."""
    commands = []

    def run(command, **_):
        settings = dict(each.split("=", 1) for each in command if "=" in each)
        commands.append(settings)
        folder = Path(settings["paths.outputs"], settings["dataset"])
        for alpha, seed in product(settings["alpha"].split(","), settings["seed"].split(",")):
            name = settings["name"].replace("${alpha}", alpha).replace("${seed}", seed)
            accuracy = 0.6 if alpha == "0.15" else 0.5
            finished(folder / name, accuracy)
        return type("Ended", (), {"returncode": 0})

    monkeypatch.setattr(few_labels.subprocess, "run", run)
    return commands


def test_trains_all_arms_by_the_alpha_that_validation_chose(trained, tmp_path, capsys):
    arguments = ["digits", "--seeds", "2", "--shares", "0.1,1", "--steps", "40", "--pilots", "3"]
    arguments += ["--outputs", str(tmp_path / "runs"), "--export", str(tmp_path / "kept"), "--commit", "c"]

    assert few_labels.main([*arguments, "dataset.batch_size=32"]) == 0
    before = len(trained)
    assert few_labels.main([*arguments, "dataset.batch_size=32"]) == 0

    assert len(trained) == before == 2 * (len(LEARN) + len(ARMS)), "what is there is not trained again"
    # 129 of digits' training images are four batches of 32, all 1,294 are 40.
    assert {c["dataset.train_fraction"]: c["trainer.max_epochs"] for c in trained} == {"0.1": "10", "1": "1"}
    alphas = {c["alpha"] for c in trained if c["name"].startswith("main")}
    assert alphas == {"0.15", "0.5"}
    with (tmp_path / "kept" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (len(LEARN) * len(ALPHAS) * 3 + 2 * len(ARMS))
    assert {row["alpha"] for row in rows if row["arm"] in CONTROLS} == {"0.15"}
    note = yaml.safe_load((tmp_path / "kept" / "study.yaml").read_text("utf-8"))
    assert (note["commit"], note["test images"]) == ("c", 359)
    table = (tmp_path / "kept" / "table.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    assert "| student alone | 50.00 ± 0.00 | 50.00 ± 0.00 |" in table


def test_runs_of_other_settings_are_not_mixed(trained, tmp_path, capsys):
    arguments = ["digits", "--seeds", "1", "--shares", "1", "--commit", "c"]
    arguments += ["--outputs", str(tmp_path / "runs")]
    assert few_labels.main([*arguments, "--steps", "40"]) == 0

    assert few_labels.main([*arguments, "--steps", "80"]) == 2

    assert "holds runs of --steps 40, not of --steps 80; name another" in capsys.readouterr().err


def test_alphas_are_chosen_by_validation_alone():
    pilot = [
        result(arm, alpha, seed, stage="pilot", val_last=90.0 if alpha == "0.5" else 80.0, test_last=0.0)
        for arm, alpha, seed in product(LEARN, ALPHAS, range(1000, 1003))
    ]
    others = [result(arm, "0.015", 3, val_last=100.0, test_last=100.0) for arm in LEARN]

    assert chosen_alphas([*pilot, *others], "1") == dict.fromkeys(LEARN, "0.5")


def test_a_runs_folder_says_what_it_is(tmp_path):
    options = read_arguments(["digits", "--outputs", str(tmp_path)])
    for number, arm in enumerate(ARMS):
        folder = tmp_path / "digits" / folder_of("main", "0.1", arm, "0.15", str(number))
        finished(folder, number / 100, wrong=4 if arm == ALONE else 1)

    found = read_results(options)

    assert {(r.arm, r.seed) for r in found} == {(arm, number) for number, arm in enumerate(ARMS)}
    assert sorted(r.test_last for r in found) == pytest.approx(range(len(ARMS)))
    # The teacher has three of four images right; the student alone knows no teacher.
    assert {r.arm: r.lost for r in found} == {arm: 75.0 if arm == ALONE else 25.0 for arm in ARMS}
    few_labels.write(found, 4, tmp_path / "kept")
    assert few_labels.read_csv(tmp_path / "kept" / "results.csv") == found


def test_the_table_corrects_over_all_its_cells():
    gaps = {"block kl": [3.0, 4.0, 5.0, 3.5], "logit": [0.5, -0.5, 0.7, -0.2]}
    alone = [result(seed=seed, test_last=50.0 + seed) for seed in range(4)]
    arms = [
        result(arm, "0.15", seed, test_last=50.0 + seed + gap)
        for arm, own in gaps.items()
        for seed, gap in enumerate(own)
    ]

    table = markdown([*alone, *arms], test_images=359)

    p = stats.ttest_1samp(gaps["block kl"], 0).pvalue
    assert f"+3.88 [2.52, 5.23], 14 images, p {2 * p:.3f}" in table
    assert "`block kl` 0.15" in table
