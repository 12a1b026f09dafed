"""Run folders are never shared, a file is never seen half written, and what was cut off is found again."""

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

import vitkd
from tests.crashes import SERVER
from tests.runs.foreign import NO_FILE, NO_JSON, replace
from vitkd.config.roles import first_difference
from vitkd.errors import ConfigError, RunError
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder
from vitkd.runs.results import read_pairs, read_teacher_predictions


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
    ("error", "state", "reported"),
    [
        (RuntimeError("no luck"), "failed", "RuntimeError: no luck"),
        (KeyboardInterrupt(), "stopped", None),
        # What Lightning makes of Ctrl-C.
        (SystemExit(1), "stopped", None),
    ],
    ids=["error", "Ctrl-C", "Lightning's Ctrl-C"],
)
def test_status_tells_how_it_ended(error, state, reported, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")

    with pytest.raises(type(error)), folder.running({}):
        raise error

    assert state_of(folder)["state"] == state
    assert state_of(folder).get("error") == reported


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


PREDICTED = {
    "another data set's": [0, 1, 2],
    "of no class": [0, 1, 2, 10],
    "below zero": [0, 1, 2, -1],
    "a table": [[0, 1, 2, 3]],
    "shares": [0.0, 1.0, 2.0, 3.0],
    "words": ["0", "1", "2", "3"],
    "too many": [0] * 10_000_000,
}


def test_predictions_come_back_as_they_were_written(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    predicted = torch.tensor([0, 9, 3, 3])
    folder.write_predictions({"last": predicted, "teacher": predicted})

    assert read_teacher_predictions(folder.predictions, 4, 10).tolist() == predicted.tolist()
    folder.write_predictions({"last": predicted})
    assert read_teacher_predictions(folder.predictions, 4, 10) is None


@pytest.mark.parametrize("predicted", PREDICTED.values(), ids=PREDICTED)
def test_predictions_of_other_images_or_classes_are_refused(predicted, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    np.savez_compressed(folder.predictions, teacher=np.array(predicted))

    with pytest.raises(ConfigError, match=r"test_predictions\.npz") as error:
        read_teacher_predictions(folder.predictions, 4, 10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("become", (NO_FILE | NO_JSON).values(), ids=NO_FILE | NO_JSON)
@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "pairs.json", "test_predictions.npz"])
def test_what_is_no_file_of_a_run_s_is_one_line(name, become, tmp_path):
    path = left(tmp_path / "run", CONFIG)
    replace(path / name, become)
    folder = RunFolder(path)
    read = {
        "config.yaml": folder.read_config,
        "metrics.json": folder.read_metrics,
        "pairs.json": lambda: read_pairs(folder.pairs, [1], [1], "outer"),
        "test_predictions.npz": lambda: read_teacher_predictions(folder.predictions, 4, 10),
    }

    with pytest.raises(ConfigError, match=name) as error:
        read[name]()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_folder_is_reported(name, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(ConfigError, match=f"{name}: not a run folder"):
        RunFolder.existing(Path(tmp_path / name))


CONFIG = {"paths": {"data": "data", "outputs": "outputs"}, "name": None, "alpha": 0.5, "loss": {"t": 1.0}}
OURS = {"version": vitkd.__version__} | CONFIG


def left(path: Path, config: Mapping[str, Any] | str | None) -> Path:
    """The folder that a run of this configuration has left at `path`."""
    path.mkdir(parents=True)
    if config is not None:
        text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False)
        (path / "config.yaml").write_text(text, encoding="utf-8")
    return path


def latest(path: Path, **changes: Any) -> Path | None:
    found = RunFolder.latest(path, {**CONFIG, **changes})
    return found.path if found else None


def test_where_no_run_was_none_is_found(tmp_path):
    assert latest(tmp_path / "run") is None


def test_of_several_runs_of_a_configuration_the_newest_is_found(tmp_path):
    for name in ("run", "run-2", "run-3"):
        left(tmp_path / name, OURS)

    assert latest(tmp_path / "run") == tmp_path / "run-3"


def test_runs_of_another_configuration_are_passed_over(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)
    caplog.set_level(logging.INFO)
    left(tmp_path / "run", OURS)
    left(tmp_path / "run-2", OURS | {"alpha": 0.9})

    assert latest(tmp_path / "run") == tmp_path / "run"
    assert latest(tmp_path / "run", alpha=0.9) == tmp_path / "run-2"
    assert not caplog.messages
    assert latest(tmp_path / "run", alpha=0.1) is None
    (message,) = set(caplog.messages)
    assert "run-2 has another alpha: starting a new run" in message


def test_a_folder_that_a_run_did_not_come_to_fill_is_passed_over(tmp_path):
    """It was killed between making the folder and writing its configuration."""
    left(tmp_path / "run", None)
    left(tmp_path / "run-2", OURS)
    left(tmp_path / "run-3", None)

    assert latest(tmp_path / "run") == tmp_path / "run-2"


def test_a_run_of_a_longer_name_is_no_run_of_this_one(tmp_path):
    left(tmp_path / "run-2", OURS)
    left(tmp_path / "run-more", OURS)

    assert latest(tmp_path / "run") is None


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1", "alpha: 0.5", "\0", "a: !!python/object:os.system {}"], ids=repr
)
def test_a_configuration_that_is_cut_or_foreign_is_one_line(text, tmp_path):
    left(tmp_path / "run", text)

    with pytest.raises(ConfigError, match=r"run.config\.yaml: cannot be read") as raised:
        latest(tmp_path / "run")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("made_by", "says"),
    [
        ({"version": "0.0.9"}, f"made by vitkd 0.0.9, this is {vitkd.__version__}; install that version"),
        ({}, f"made by a vitkd that left no version, this is {vitkd.__version__}; train it again"),
    ],
    ids=repr,
)
def test_a_run_of_another_version_is_refused_in_one_line(made_by, says, tmp_path):
    left(tmp_path / "run", made_by | CONFIG)

    with pytest.raises(ConfigError, match=says) as raised:
        RunFolder(tmp_path / "run").read_config()

    assert str(raised.value).startswith(f"run={tmp_path / 'run'}: ")
    assert "\n" not in str(raised.value)


def test_a_run_of_another_version_is_not_resumed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)
    caplog.set_level(logging.INFO)
    left(tmp_path / "run", {"version": "0.0.9"} | CONFIG)

    assert latest(tmp_path / "run") is None

    (line,) = caplog.messages
    both = f"run was made by vitkd 0.0.9, this is {vitkd.__version__}"
    assert line.endswith(f"{both}: starting a new run in a folder beside it")


def test_a_configuration_comes_back_from_disk_without_a_difference(tmp_path):
    config = CONFIG | {
        "tiny": 1e-5, "huge": 1e22, "text": "1e-3", "yes": "yes", "null": "null", "date": "2024-01-01",
        "é": ["é", "\U0001f600", "a: b", "", " "], "none": None, "inf": float("inf"), "long": "x" * 500,
        "int": 2**70, "float": 0.1 + 0.2, "octal": "0o17", "colon": "12:30:00", "lines": "a\nb\r\n",
    }  # fmt: skip
    folder = RunFolder.claim(tmp_path / "run")

    with folder.running(config):
        pass

    assert folder.read_config() == config
    assert first_difference(folder.read_config(), config) is None


def run_until_asked_to_stop(path: Path, starter: Any) -> None:
    with RunFolder(path).running(CONFIG):
        starter.send("at work")
        with suppress(EOFError):
            starter.recv()


@pytest.fixture
def elsewhere(tmp_path) -> Iterator[Callable[[], Any]]:
    """Starts another process's run in tmp_path / "run", and returns that process."""
    started = []

    def start() -> Any:
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=run_until_asked_to_stop, args=(tmp_path / "run", theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
        assert ours.poll(60)
        ours.recv()
        return process

    yield start
    for process, pipe in started:
        pipe.close()
        process.join(60)


def test_where_another_process_is_at_work_nobody_else_may_be(elsewhere, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    elsewhere()
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.name != ".lock"}

    assert folder.is_locked
    assert folder.state == "running"
    with pytest.raises(ConfigError, match="run: another process is at work there"), folder.running({}):
        pytest.fail("two at work in one folder")

    assert {path: path.read_bytes() for path in folder.path.iterdir() if path.name != ".lock"} == before


def test_a_killed_run_is_stopped_and_its_folder_free(elsewhere, tmp_path):
    """Whatever process has its number now: status.json names this one's own."""
    folder = RunFolder.claim(tmp_path / "run")
    process = elsewhere()
    process.kill()
    process.join()
    status = state_of(folder)
    assert status["state"] == "running"
    assert status["pid"] == process.pid
    folder.status.write_text(json.dumps(status | {"pid": os.getpid()}))

    assert not folder.is_locked
    assert folder.state == "stopped"
    with folder.running(CONFIG):
        assert folder.state == "running"
    assert folder.state == "done"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"running"', '{"state": 1', "{}", '{"pid": 3}', "\xff\xfe"], ids=repr
)
def test_a_status_that_cannot_be_read_is_that_of_a_run_that_was_cut_off(text, elsewhere, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    folder.status.write_bytes(text.encode("latin-1"))

    assert folder.state == "stopped"


def test_a_status_that_cannot_be_read_while_a_process_is_at_work_is_running(elsewhere, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    elsewhere()

    for text in ("", "{", "[]"):
        folder.status.write_text(text)
        assert folder.state == "running"


@pytest.mark.parametrize("state", ["done", "failed", "stopped"])
def test_looking_at_a_run_that_has_ended_leaves_no_trace(state, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    folder.status.write_text(json.dumps({"state": state}))

    assert folder.state == state
    assert [*folder.path.iterdir()] == [folder.status]


def test_a_lock_is_no_hindrance_to_its_own_process(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    assert not folder.is_locked

    with folder.running(CONFIG):
        assert folder.is_locked
        assert RunFolder(folder.path).is_locked

    assert not folder.is_locked
    with folder.running(CONFIG):
        pass


def test_a_lock_file_that_was_left_locks_nothing(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")
    (folder.path / ".lock").write_text("12345")

    with folder.running(CONFIG):
        assert folder.is_locked


def listening() -> list[logging.Handler]:
    return [*logging.getLogger("vitkd").handlers]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("nth", [1, 2, 3], ids=["config.yaml", "status.json", "status.json at the end"])
def test_a_full_disk_is_one_line_that_says_how_to_go_on(nth, number, tmp_path, monkeypatch):
    folder, handlers = RunFolder.claim(tmp_path / "run"), listening()
    calls = 0

    def full(path: Path, content: str) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(number, os.strerror(number), str(path))
        write_atomically(path, content)

    monkeypatch.setattr("vitkd.runs.folder.write_atomically", full)

    with pytest.raises(RunError, match=r"make room.*resume=auto") as raised, folder.running(CONFIG):
        pass

    assert f"cannot be written ({os.strerror(number)})" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert listening() == handlers
    assert not folder.is_locked
    assert folder.state == "stopped"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_folder_that_may_not_be_written_is_not_taken_for_a_full_disk(number, tmp_path, monkeypatch):
    def refuse(path: Path, content: str) -> None:
        raise OSError(number, os.strerror(number), str(path))

    folder = RunFolder.claim(tmp_path / "run")
    monkeypatch.setattr("vitkd.runs.folder.write_atomically", refuse)

    with pytest.raises(RunError, match="make that writable") as raised, folder.running(CONFIG):
        pass

    assert f"{folder.config}: cannot be written ({os.strerror(number)})" in str(raised.value)
    assert "make room" not in str(raised.value)


def remove_all(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)
    folder.write_metrics({"acc": 0.5})


def remove_all_before_a_checkpoint(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)
    folder.checkpoints.mkdir(parents=True)


def remove_a_file(folder: RunFolder) -> None:
    """As TensorBoard reports it."""
    (folder.path / "events").touch()
    (folder.path / "events").unlink()
    os.close(os.open(os.fsencode(folder.path / "events"), os.O_RDONLY))


@pytest.mark.parametrize("remove", [remove_all, remove_all_before_a_checkpoint, remove_a_file])
def test_a_folder_that_is_removed_during_the_run_is_one_line(remove, tmp_path):
    folder = RunFolder.claim(tmp_path / "run")

    says = "run: was removed.* lost, the same command"
    with pytest.raises(RunError, match=says) as raised, folder.running(CONFIG):
        remove(folder)

    assert "\n" not in str(raised.value)
    assert folder.state != "done"


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tmp_path):
    folder = RunFolder.claim(tmp_path / "run")

    with pytest.raises(FileNotFoundError), folder.running(CONFIG):
        (tmp_path / "nowhere").read_text()

    assert folder.state == "failed"


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, RunError])
def test_what_ended_a_run_is_reported_even_where_its_state_cannot_be_written(end, tmp_path, monkeypatch):
    folder = RunFolder.claim(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run() -> None:
        with folder.running(CONFIG):
            monkeypatch.setattr("vitkd.runs.folder.write_atomically", full)
            raise end("this")

    with pytest.raises(end, match="this"):
        run()

    assert folder.state == "stopped"


def test_a_file_system_that_fills_up_during_a_run_is_one_line(small_disk, capsys):
    disk = small_disk(64)
    folder = RunFolder.claim(disk / "run")
    log = logging.getLogger("vitkd")

    def run() -> None:
        with folder.running(CONFIG):
            with suppress(OSError):
                (disk / "full").write_bytes(bytes(100_000))
            for _ in range(40):
                log.warning("a line for run.log, which may take it or not: %s", "x" * 100)
            folder.write_metrics({"acc": 0.5})

    with pytest.raises(RunError, match="No space left on device"):
        run()

    assert "Traceback" not in capsys.readouterr().err
    assert folder.state in ("stopped", "failed")
    assert not folder.metrics.exists()


def test_looking_whether_a_run_is_at_work_keeps_none_from_starting(tmp_path):
    """Whoever looks holds the lock for an instant, as several jobs of a sweep may do."""
    folder = RunFolder.claim(tmp_path / "run")
    look = FileLock(folder.path / ".lock", thread_local=False)
    look.acquire()
    end = threading.Timer(0.1, look.release)
    end.start()

    with folder.running(CONFIG):
        pass

    end.join()
    assert folder.state == "done"
