"""What experiment trackers hold of a run, read by MLflow's client and from an offline wandb's files."""

import json
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7


class Tracked(NamedTuple):
    """A run as a tracker holds it."""

    curves: dict[str, list[tuple[int, float]]]
    """name → (step, value) in the order of logging"""
    pictures: list[tuple[str, int]]
    """(tag, step)"""
    settings: dict[str, Any]
    results: dict[str, float]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log in LevelDB's format, of blocks with pieces of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record = file.read_bytes(), FILE_HEADER, b""
    while place + RECORD_HEADER <= len(data):
        if BLOCK - place % BLOCK < RECORD_HEADER:
            place += BLOCK - place % BLOCK
            continue
        size, piece = struct.unpack("<HB", data[place + 4 : place + RECORD_HEADER])
        place += RECORD_HEADER
        record += data[place : place + size]
        place += size
        if piece in (1, 4):  # whole, or the last one
            yield Record.FromString(record)
            record = b""


def wait_for_end(file: Path) -> None:
    """Until wandb's own process, which writes the file, has written a run's end."""
    deadline = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file)):
        assert time.monotonic() < deadline, f"{file}: has no end"
        time.sleep(0.1)


def in_wandb(run: Path) -> Tracked:
    """What the offline runs in a run's folder hold together, the last of which has ended."""
    curves, pictures, settings, results = defaultdict(list), [], {}, {}
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    wait_for_end(files[-1])
    for file in files:
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                keys = [[*item.nested_key] or [item.key] for item in record.history.item]
                values = [json.loads(item.value_json) for item in record.history.item]
                row = {tuple(key): value for key, value in zip(keys, values, strict=True)}
                step = row.pop(("trainer/global_step",), None)
                pictures += [(key[0], step) for key in row if key[1:] == ("_type",)]
                for (name, *inner), value in row.items():
                    if not inner and not name.startswith("_"):
                        curves[name].append((step, value))
            changed = {"run": record.run.config, "config": record.config}.get(kind)
            for item in changed.update if changed else ():
                settings[item.key or item.nested_key[0]] = json.loads(item.value_json)
            for item in record.summary.update if kind == "summary" else ():
                results["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return Tracked(dict(curves), pictures, settings, results)


def in_mlflow(store: Path, run_id: str) -> Tracked:
    """A run in a store that is a folder."""
    from mlflow.tracking import MlflowClient

    with mock.patch.dict(os.environ, MLFLOW_ALLOW_FILE_STORE="true"):
        client = MlflowClient(store.as_uri())
    run = client.get_run(run_id)
    history = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    curves = {name: [(m.step, m.value) for m in metrics] for name, metrics in history.items()}
    results = {name: curves.pop(name)[-1][1] for name in [*curves] if name.startswith("test/")}
    images = {Path(file.path).name for file in client.list_artifacts(run_id, "images")}
    names = [name.replace("~", "/").replace("+", "%").split("%") for name in images if name.endswith(".png")]
    pictures = sorted((name[0], int(name[name.index("step") + 1])) for name in names)
    return Tracked(curves, pictures, run.data.params, results)
