"""Run folders are never shared, and a file is never seen half written."""

import json
import logging
import threading
from pathlib import Path

import pytest

from vitkd.errors import ConfigError
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder


def state_of(folder: RunFolder) -> dict[str, str]:
    return json.loads(folder.status.read_text())


def test_the_first_gets_the_name_and_the_next_ones_numbers(tmp_path):
    names = [RunFolder.claim(tmp_path / "group" / "alpha=0.5").path.name for _ in range(3)]

    assert names == ["alpha=0.5", "alpha=0.5-2", "alpha=0.5-3"]


def test_many_at_once_never_share_a_folder(tmp_path):
    start, claimed = threading.Barrier(16), []

    def claim() -> None:
        start.wait()
        claimed.append(RunFolder.claim(tmp_path / "run").path)

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({*claimed}) == len([*tmp_path.iterdir()]) == 16


def test_a_place_that_cannot_be_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="file"):
        RunFolder.claim(tmp_path / "file" / "run")


def test_writing_replaces_the_whole_file(tmp_path):
    file = tmp_path / "status.json"

    write_atomically(file, "old, and longer than the new one")
    write_atomically(file, "new: é")

    assert file.read_text(encoding="utf-8") == "new: é"
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_the_old_file_outlives_a_failure(step, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    file = tmp_path / "status.json"
    write_atomically(file, "old")

    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(OSError, match="no space"):
            write_atomically(file, "new")

    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_status_follows_the_run(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")

    with folder.running({"paths": {}, "name": "é"}):
        assert state_of(folder)["state"] == "running"

    assert state_of(folder)["state"] == "done"
    assert folder.read_config() == {"paths": {}, "name": "é"}


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (RuntimeError("no luck"), "failed", "RuntimeError: no luck"),
        (KeyboardInterrupt(), "stopped", None),
        # What Lightning makes of Ctrl-C.
        (SystemExit(1), "stopped", None),
    ],
    ids=["error", "Ctrl-C", "Lightning's Ctrl-C"],
)
def test_status_tells_how_it_ended(error, state, told, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")

    with pytest.raises(type(error)), folder.running({}):
        raise error

    assert state_of(folder)["state"] == state
    assert state_of(folder).get("error") == told


def test_the_log_holds_the_runs_lines_and_no_other(tmp_path):
    log = logging.getLogger("vitkd")
    handlers, level = [*log.handlers], log.level
    log.setLevel(logging.INFO)
    folder = RunFolder.claim(tmp_path / "run")
    try:
        log.info("before")
        with folder.running({}):
            log.info("during: é")
        log.info("after")
    finally:
        log.setLevel(level)

    (line,) = folder.log.read_text(encoding="utf-8").splitlines()
    assert line.endswith(" during: é")
    assert log.handlers == handlers


def test_metrics_come_back_as_they_were_written(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    metrics = {"test/acc_last": 0.1 + 0.2, "val/acc_best": None, "seed": 3}

    folder.write_metrics(metrics)

    assert folder.read_metrics() == metrics


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_folder_is_told(name, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(ConfigError, match=f"{name}: not a run folder"):
        RunFolder.existing(Path(tmp_path / name))
