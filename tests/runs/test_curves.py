"""Curves that are taken up again have every step once: as if the run had never been cut off."""

import csv
import logging
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.server_ingester import ExistingServerDataIngester, get_server_binary
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.util.grpc_util import ChannelCredsType

from tests.runs.foreign import NO_FILE, replace
from vitkd.config.run import CONF_DIR, parse
from vitkd.runs.curves import MetricsFile, TensorBoardCurves


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in rows(path)]


@pytest.fixture
def file(tmp_path) -> Path:
    """Of a run that was cut off after step 3, whose steps 1 and 3 were validated."""
    path = tmp_path / "metrics.csv"
    curves = MetricsFile(path)
    for step in (1, 2, 3):
        curves.log_metrics({"train/acc": step / 8}, step)
        if step != 2:
            curves.log_metrics({"val/acc": step / 4}, step)
    return path


def test_a_step_is_a_row_and_a_curve_is_a_column(file):
    assert file.read_bytes().splitlines() == [
        b"step,train/acc,val/acc", b"1,0.125,0.25", b"2,0.25,", b"3,0.375,0.75",
    ]  # fmt: skip


def test_numbers_come_back_as_they_were(tmp_path):
    values = [0.1 + 0.2, 1e-300, -0.0, float("nan"), float("inf"), 3]
    curves = MetricsFile(tmp_path / "metrics.csv")

    curves.log_metrics({str(number): value for number, value in enumerate(values)}, 7)

    (row,) = rows(tmp_path / "metrics.csv")
    assert [repr(float(row[str(number)])) for number in range(6)] == [repr(float(value)) for value in values]


def test_a_row_is_there_as_soon_as_it_is_known(tmp_path):
    curves = MetricsFile(tmp_path / "metrics.csv")

    for step in (1, 2):
        curves.log_metrics({"a": 1.0}, step)
        assert steps(tmp_path / "metrics.csv")[-1] == step


def test_a_step_can_be_added_to_and_corrected(tmp_path):
    curves = MetricsFile(tmp_path / "metrics.csv")

    curves.log_metrics({"a": 1.23456789, "b": 2.0}, 5)
    curves.log_metrics({"a": 3.0}, 5)

    assert rows(tmp_path / "metrics.csv") == [{"step": "5", "a": "3.0", "b": "2.0"}]


def test_names_are_quoted_where_they_have_to_be(tmp_path):
    names = ["plain", "with, comma", 'with "quotes"', "with é", "val/map_loss/0.1"]
    curves = MetricsFile(tmp_path / "metrics.csv")

    for step in (1, 2):
        curves.log_metrics(dict.fromkeys(names[: step + 1], 1.0), step)
    again = MetricsFile(tmp_path / "metrics.csv", start=2)
    again.log_metrics(dict.fromkeys(names, 1.0), 2)

    assert [*rows(tmp_path / "metrics.csv")[1]] == ["step", *names]
    assert set(rows(tmp_path / "metrics.csv")[1].values()) == {"2", "1.0"}


def test_a_column_may_come_when_there_are_rows(file):
    MetricsFile(file, start=3).log_metrics({"new": 9.0}, 4)

    assert [row["new"] for row in rows(file)] == ["", "", "", "9.0"]
    assert [row["train/acc"] for row in rows(file)] == ["0.125", "0.25", "0.375", ""]


@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_taken_up_it_drops_what_came_after(start, file):
    whole = rows(file)

    MetricsFile(file, start)

    assert rows(file) == [row for row in whole if int(row["step"]) <= start]


def test_a_new_run_starts_an_empty_file(file):
    MetricsFile(file)

    assert file.read_text() == "step\n"


@pytest.mark.parametrize("start", [1, 2, 3])
def test_taken_up_and_gone_on_it_is_the_file_of_a_run_that_was_not_cut_off(start, file):
    whole = file.read_bytes()

    curves = MetricsFile(file, start)
    for step in range(start + 1, 4):
        curves.log_metrics({"train/acc": step / 8}, step)
        if step != 2:
            curves.log_metrics({"val/acc": step / 4}, step)

    assert file.read_bytes() == whole


def test_taken_up_between_a_step_and_its_validation_it_has_one_row(file):
    curves = MetricsFile(file, start=2)

    curves.log_metrics({"val/acc": 0.5}, 2)

    assert rows(file)[1:] == [{"step": "2", "train/acc": "0.25", "val/acc": "0.5"}]


@pytest.mark.parametrize("place", [1, 2, 4])
def test_a_line_of_garbage_costs_no_other_row(place, file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    garbled = b"".join([*lines[:place], b'\xff,"\x00,,\n', *lines[place:]])
    file.write_bytes(garbled)

    MetricsFile(file, start=3)

    assert file.read_bytes() == whole
    assert file.with_name("metrics.csv.damaged").read_bytes() == garbled
    (record,) = caplog.records
    assert str(file) in record.getMessage()


@pytest.mark.parametrize("become", NO_FILE.values(), ids=NO_FILE)
def test_what_is_no_file_does_not_keep_a_run_from_resuming(become, file):
    replace(file, become)

    MetricsFile(file, start=3).log_metrics({"train/acc": 0.5}, 4)

    assert rows(file) == [{"step": "4", "train/acc": "0.5"}]


def test_cut_anywhere_it_is_taken_up_at_the_last_whole_row(file):
    whole = file.read_bytes()
    first_row = b"step,train/acc,val/acc\r\n1,0.125,0.25\r\n"
    for cut in range(len(first_row), len(whole)):
        file.write_bytes(whole[:cut])

        MetricsFile(file, start=3)

        kept = file.read_bytes()
        assert whole.startswith(kept)
        assert len(kept) == whole[:cut].rfind(b"\n") + 1


@pytest.mark.parametrize("left", [b"", b"ste", b"step", b"\0" * 20], ids=repr)
def test_what_is_left_of_its_beginning_is_as_none(left, file):
    file.write_bytes(left)

    MetricsFile(file, start=3).log_metrics({"a": 1.0}, 4)

    assert rows(file) == [{"step": "4", "a": "1.0"}]


def test_a_character_that_was_cut_is_no_obstacle(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes("step,é\n1,2.0\n".encode() + "é".encode()[:1])

    MetricsFile(path, start=5)

    assert rows(path) == [{"step": "1", "é": "2.0"}]


def test_a_process_that_dies_while_it_adds_to_a_row_leaves_the_row(file, monkeypatch):
    """A run that resumes with the step's validation would not write the rest of it again."""
    before = file.read_bytes()
    curves = MetricsFile(file, start=3)

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerow", lambda *_: pytest.exit("killed"))
        with pytest.raises(pytest.exit.Exception):
            curves.log_metrics({"val/acc": 0.875}, 3)

    assert file.read_bytes() == before


def test_a_row_that_becomes_shorter_leaves_nothing_behind(tmp_path):
    curves = MetricsFile(tmp_path / "metrics.csv")

    for value in (1.123456789, 2.0):
        curves.log_metrics({"a": value}, 1)
    curves.log_metrics({"a": 3.0}, 2)

    assert (tmp_path / "metrics.csv").read_bytes() == b"step,a\r\n1,2.0\r\n2,3.0\r\n"


def test_saving_forces_it_to_the_disk(file, monkeypatch):
    forced = []
    curves = MetricsFile(file, start=3)
    monkeypatch.setattr("os.fsync", forced.append)

    curves.save()

    assert len(forced) == 1


def log_steps(folder: Path, start: int, end: int, value: float) -> None:
    """As a run that resumes after `start` and is killed after `end`."""
    curves = TensorBoardCurves(folder, start)
    for step in range(start + 1, end + 1):
        curves.log_metrics({"train/acc": value}, step)
        if step % 5 == 0:
            curves.log_metrics({"val/acc": value}, step)
    curves.save()
    curves.experiment.close()


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Tells later files of events from earlier ones: one attempt a minute."""
    now = [1e9]
    stamps = SimpleNamespace(time=lambda: now[0])
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", stamps)
    return now


@pytest.fixture
def resumed(tmp_path, clock) -> Path:
    """The folder of a run that was killed after step 8 and gone on with after 5, then 12 and 11, to 20."""
    for start, end, value in ((0, 8, 0.25), (5, 12, 0.5), (11, 20, 0.75)):
        log_steps(tmp_path, start, end, value)
        clock[0] += 60
    return tmp_path


EXPECTED = {
    "train/acc": [(step, 0.25 if step <= 5 else 0.5 if step <= 11 else 0.75) for step in range(1, 21)],
    "val/acc": [(5, 0.25), (10, 0.5), (15, 0.75), (20, 0.75)],
}


def test_tensorboard_sees_every_step_once(resumed):
    events = EventAccumulator(str(resumed), size_guidance={"scalars": 0}).Reload()

    assert {*events.Tags()["scalars"]} == {*EXPECTED}
    for name, points in EXPECTED.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == points


def test_an_event_that_was_cut_hides_none_that_came_later(tmp_path, clock):
    log_steps(tmp_path, 0, 8, 0.25)
    (events,) = tmp_path.glob("events.*")
    events.write_bytes(events.read_bytes()[:-5])
    clock[0] += 60

    log_steps(tmp_path, 5, 20, 0.5)

    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload().Scalars("train/acc")
    assert [event.step for event in found] == [*range(1, 21)]


@pytest.fixture
def server(resumed) -> Iterator[ExistingServerDataIngester]:
    """What `tensorboard --load_fast` reads the events with."""
    port = resumed / "port"
    line = [
        get_server_binary().path,
        "--reload=once",
        "--port=0",
        f"--logdir={resumed}",
        f"--port-file={port}",
    ]
    with subprocess.Popen(line) as process:
        while not port.exists() or not port.read_text().endswith("\n"):
            time.sleep(0.01)
        address = f"localhost:{port.read_text().strip()}"
        yield ExistingServerDataIngester(address, channel_creds_type=ChannelCredsType.LOCAL)
        process.kill()


def test_tensorboards_fast_server_sees_every_step_once(server):
    server.start()
    found = {}
    while len(found) < 2 or found["val/acc"][-1][0] < 20 or found["train/acc"][-1][0] < 20:
        (curves,) = server.data_provider.read_scalars(
            RequestContext(), experiment_id="", plugin_name="scalars", downsample=1000
        ).values() or [{}]
        found = {name: [(point.step, point.value) for point in curve] for name, curve in curves.items()}

    assert found == EXPECTED


def test_a_new_run_drops_the_events_of_an_attempt_that_saved_nothing(tmp_path, clock):
    log_steps(tmp_path, 0, 8, 0.25)
    clock[0] += 60
    (tmp_path / "kept.txt").write_text("")

    log_steps(tmp_path, 0, 3, 0.5)

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/acc")] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.5),
    ]
    assert (tmp_path / "kept.txt").exists()
    assert len([*tmp_path.glob("events.*")]) == 1


def conclude(folder: Path, *settings: str) -> None:
    """As a finished run of `python -m vitkd.train SETTINGS`."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = parse(hydra.compose("train", [*settings]))
    TensorBoardCurves(folder).conclude(config.resolved, config.method.ignores, {"test/acc_last": 0.25})


def hparams_page(logs: Path) -> tuple[list[api_pb2.HParamInfo], dict[str, dict[str, object]]]:
    """The columns of TensorBoard's HParams page, in its order, and run → column → cell."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(logs)).Reload()
    backend = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(logs))))
    request = RequestContext(), "", True, backend.hparams_metadata(RequestContext(), "")
    experiment = backend.experiment_from_metadata(*request, data_provider_hparams=[])
    asked = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    for column in experiment.hparam_infos:
        asked.col_params.add(hparam=column.name)
    groups = list_session_groups.Handler(RequestContext(), backend, "", asked).run().session_groups
    cells = {
        group.sessions[0].name: {
            name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()
        }
        for group in groups
    }
    assert all(group.metric_values for group in groups)
    return [*experiment.hparam_infos], cells


def test_the_hparams_page_has_every_runs_columns_whatever_comes_first(tmp_path):
    conclude(tmp_path / "a", "method=none")
    conclude(tmp_path / "b", "alpha=0.25", "loss=mse", "weighting=cosine", "ema_decay=0.5")
    conclude(tmp_path / "c", "alpha=0.75", "granularity=head", "teacher.depth=2", "dataset.batch_size=8")
    conclude(tmp_path / "d", "method=logit", "method.temperature=2", "label_smoothing=0.1", "seed=3")

    columns, cells = hparams_page(tmp_path)

    assert {column.name for column in columns} >= {
        *("alpha", "dataset", "dataset.batch_size", "ema_decay", "granularity", "label_smoothing", "loss"),
        *("method", "method.temperature", "optimizer.lr", "schedule", "seed", "student.depth", "teacher"),
        *("teacher.depth", "teacher.optimizer.lr", "trainer.max_epochs", "weighting"),
    }
    # Numbers can be sorted and filtered as numbers.
    assert {column.name: column.type for column in columns}["alpha"] == api_pb2.DATA_TYPE_FLOAT64
    # What differs stands first.
    assert {"alpha", "loss", "method"} <= {column.name for column in columns[: len(columns) // 2]}
    assert {run: cell.get("alpha") for run, cell in cells.items()} == {
        "a": None,
        "b": 0.25,
        "c": 0.75,
        "d": 0.5,
    }
    assert {run: cell.get("teacher.depth") for run, cell in cells.items()}["c"] == 2
    assert "loss" not in cells["a"]
    assert cells["b"]["loss"] != cells["c"]["loss"]
    assert cells["d"]["method.temperature"] == 2
