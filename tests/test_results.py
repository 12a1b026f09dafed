"""RESULTS.md is made of the runs' files, and says of them what they say."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import results_page, studies
from benchmarks.few_labels import Result, write
from benchmarks.results_page import FewLabels, Study, sides, source
from benchmarks.studies import EVIDENCE, commands_of, for_each_seed, keep, run
from vitkd.report.statistics import summarise

NOTE = {
    "commands": ["python -m vitkd.explain run=o/seed-{seed}"],
    "commit": "abc",
    "date": "2026-01-01",
    "hardware": "2 cores",
    "versions": {"torch": "2"},
}


def test_the_page_and_the_readme_say_what_the_evidence_says():
    assert results_page.main(["--check"]) == 0, "run `make evidence`, and read what it made"


def test_another_number_in_the_evidence_is_noticed(tmp_path, monkeypatch):
    page, readme = tmp_path / "RESULTS.md", tmp_path / "README.md"
    monkeypatch.setattr(results_page, "make_texts", lambda: {page: "+1.00", readme: "same"})
    page.write_text("+2.00")
    readme.write_text("same")

    assert results_page.main(["--check"]) == 1
    assert page.read_text() == "+2.00"


@pytest.mark.parametrize("place", sorted(EVIDENCE.iterdir()), ids=lambda place: place.name)
def test_each_study_says_where_it_comes_from(place):
    note = yaml.safe_load((place / studies.NOTE).read_text("utf-8"))

    assert all(command.startswith("python -m ") for command in note["commands"])
    assert all([note["commands"], note["commit"], note["hardware"], note["versions"]["torch"]])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return Study(EVIDENCE / "granularities-digits", tmp_path_factory.mktemp("runs"))


def test_the_archive_is_reported_as_its_runs_were(study):
    alone = [run.acc_last for run in study.rows["student alone"].arm.runs.values()]
    taught = [run.acc_last for run in study.rows["block kl, alpha 0.015"].arm.runs.values()]
    row = study.rows["block kl, alpha 0.015"]
    assert row.gain.difference.mean == pytest.approx(np.subtract(taught, alone).mean())
    assert f"| {np.mean(alone):.2f} ± {np.std(alone, ddof=1):.2f} |" in study.table
    assert len(study.arms) == 12
    assert study.count("real") + study.count("hurts") + study.count("no evidence") == 12


def test_the_student_alone_is_found_by_settings_that_only_its_experiment_has(study, monkeypatch):
    assert study.alone(student__embed_dim=32) == study.rows["student alone"].last
    with pytest.raises(KeyError, match="0 experiments"):
        study.alone(student__embed_dim=31)
    monkeypatch.setattr(study, "comparisons", 2 * study.comparisons)
    with pytest.raises(KeyError, match="2 experiments"):
        study.alone(student__embed_dim=32)


def test_lost_images_are_the_teachers_that_the_student_has_wrong(study):
    label = "encoder kl, alpha 0.5"
    taught = study.rows[label].arm.runs[3].path

    with np.load(taught / "test_predictions.npz") as found:
        expected = [
            teacher == right != student
            for teacher, student, right in zip(found["teacher"], found["last"], found["labels"], strict=True)
        ]

    assert study.lost(label)[3] == pytest.approx(100 * np.mean(expected))
    # The student alone knows no teacher: it is that of the other arms.
    assert set(study.lost("student alone")) == set(range(10))


def test_a_study_of_few_labels_is_looked_up_by_arm_and_share(tmp_path):
    runs = [
        Result("main", "0.1", arm, "0.5", seed, accuracy + seed, 0.0, 0.0, float(seed))
        for arm, accuracy in (("student alone", 50.0), ("encoder kl", 60.0))
        for seed in range(4)
    ]
    write([*runs, replace(runs[-1], stage="pilot", seed=9)], 10, tmp_path)
    (tmp_path / studies.NOTE).write_text(yaml.safe_dump({**NOTE, "test images": 10}))

    study = FewLabels(tmp_path)

    assert study.shares == ["0.1"]
    assert study.values("encoder kl", "0.1") == {0: 60.0, 1: 61.0, 2: 62.0, 3: 63.0}
    assert study.values("encoder kl", "0.1", "lost") == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    assert study.gains["encoder kl", "0.1"].difference.mean == 10.0


def test_a_mean_is_above_a_value_only_if_its_interval_is():
    near, far = summarise([0.5, 1.5, 1.0, 1.2]), summarise([5.0, 5.1, 5.2])

    assert (sides(near, 1.0), sides(far, 1.0), sides(far, 6.0)) == ("", "above", "below")


def test_the_source_names_command_commit_and_hardware(tmp_path):
    (tmp_path / studies.NOTE).write_text(yaml.safe_dump({**NOTE, "test images": 10}))
    write([Result("main", "1", "student alone", "0.5", 0, 50.0, 50.0, 50.0, 0.0)], 10, tmp_path)

    text = source(FewLabels(tmp_path))

    assert "2 cores, vitkd abc, torch 2, 2026-01-01" in text
    assert "```bash\npython -m vitkd.explain run=o/seed-$seed\n```" in text


# Running a study.


def test_commands_of_a_seed_are_run_for_each(monkeypatch, tmp_path):
    commands = commands_of("granularities-digits", Path("o"))
    every = [*for_each_seed(commands)]

    assert all("{" not in command for command in every)
    assert len(every) == sum(10 if "{seed}" in command else 1 for command in commands)
    assert any("run=o/digits/alpha-0.5_granularity-block_loss-kl_seed-7 " in command for command in every)


def test_what_is_done_is_not_run_again_and_a_failure_ends_the_study(monkeypatch, tmp_path):
    ran = []

    def fake(command, **_):
        ran.append(command[1:])
        return type("Ended", (), {"returncode": int("bad" in command)})

    monkeypatch.setattr(studies.subprocess, "run", fake)
    done = tmp_path / "o" / "done.txt"
    run(["python -m good"], done)
    with pytest.raises(SystemExit):
        run(["python -m good", "python -m bad"], done)

    assert ran == [["-m", "good"], ["-m", "bad"]]


def test_what_is_kept_of_a_study_are_its_small_files(tmp_path):
    place = tmp_path / "o" / "digits" / "run"
    (place / "explain").mkdir(parents=True)
    (place / "config.yaml").write_text("paths: {data: /home/someone/images}")
    (place / "student.safetensors").write_bytes(b"large")
    (place / "explain" / "fidelity.json").write_text("{}")
    (place / "status.json").write_text(json.dumps({"state": "done", "time": "", "pid": 1}))
    facts = {"hardware/cpu_count": 2, "hardware/device": "cpu", "versions/torch": "2.9"}
    (place / "metrics.json").write_text(json.dumps({**facts, "test/acc_last": 0.5}))

    keep(["python -m vitkd.train"], tmp_path / "o", tmp_path / "kept", "abc")

    with tarfile.open(tmp_path / "kept" / "runs.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        assert archive.extractfile("digits/run/config.yaml").read() == b"paths: {data: data}"
    assert names == {"config.yaml", "fidelity.json", "status.json", "metrics.json"}
    note = yaml.safe_load((tmp_path / "kept" / studies.NOTE).read_text("utf-8"))
    assert (note["hardware"], note["versions"]["torch"], note["commit"]) == ("2 cores, cpu", "2.9", "abc")


def test_an_unknown_study_is_one_line(capsys):
    with pytest.raises(SystemExit):
        studies.main(["granularity-digits"])

    assert "granularity-digits: no such study; there are granularities-digits" in capsys.readouterr().err
