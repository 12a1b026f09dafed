"""The options of conf/logger/: TensorBoard, Weights & Biases and MLflow.

The last two are experiment trackers. They get what TensorBoard gets: curves, pictures, settings and the test
metrics. A run that is resumed continues its run there, whose id is kept in loggers.json, with each step once.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from filelock import FileLock
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from vitkd.config.loggers import LoggedRun, LoggerOption, check_installed
from vitkd.errors import ConfigError, check, check_choice, one_line
from vitkd.runs.curves import CurveLogger, TensorBoardCurves
from vitkd.runs.files import read_mapping, write_atomically

log = logging.getLogger("vitkd")

IDS = "loggers.json"
"""The file in a run's folder that keeps the ids of its runs in trackers."""
STEP = "trainer/global_step"
"""The horizontal axis of Lightning's curves in Weights & Biases."""
LONGEST_PROJECT = 128


@dataclass
class TensorBoard(LoggerOption):
    """TensorBoard's events in the run's folder."""

    def open(self, run: LoggedRun) -> TensorBoardCurves:
        """As `LoggerOption.open`."""
        return TensorBoardCurves(run.folder, run.start)


@dataclass
class Wandb(LoggerOption):
    """A run in Weights & Biases; its own files lie in the run's folder."""

    project: str
    entity: str | None
    mode: str
    """`online`, `offline` (to be uploaded later by `wandb sync`) or `disabled`"""
    group: str | None
    tags: list[str]

    def __post_init__(self) -> None:
        is_name = re.fullmatch(r"[^/\\#?%:]+", self.project) and len(self.project) <= LONGEST_PROJECT
        rule = f"must be a name of at most {LONGEST_PROJECT} characters, none of / \\ # ? % :"
        check(self, "project", bool(is_name), rule)
        check_choice(self, "mode", ("online", "offline", "disabled"))

    def check_ready(self) -> None:
        """As `LoggerOption.check_ready`; nothing is sent to find out."""
        check_installed("wandb", "wandb")
        import wandb

        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise ConfigError("logger=wandb: is not logged in; wandb login, or logger.wandb.mode=offline")

    def open(self, run: LoggedRun) -> "Tracker":
        """As `LoggerOption.open`; an offline run that is resumed is written once more, from its beginning."""
        rewrites = self.mode == "offline" and set_aside(run.folder / "wandb")
        resumed = run._replace(logged={}) if rewrites else run
        tracker = Tracker("wandb", lambda run_id: WandbRun(self, run, run_id), resumed)
        for step, values in run.rows.items() if rewrites else ():
            tracker.log_metrics(values, step)
        return tracker


@dataclass
class MLflow(LoggerOption):
    """A run in an MLflow store: a folder, a server, or a database if SQLAlchemy is there."""

    tracking_uri: str
    experiment_name: str

    def __post_init__(self) -> None:
        check(self, "tracking_uri", self.tracking_uri != "", "name a folder or a server")
        check(self, "experiment_name", self.experiment_name.strip() != "", "name an experiment")

    @property
    def store(self) -> Path | None:
        """The folder that is the store; None if that is something else."""
        place = urlparse(self.tracking_uri)
        return Path(place.path).resolve() if place.scheme in ("", "file") else None

    def check_ready(self) -> None:
        """As `LoggerOption.check_ready`; no server is asked."""
        check_installed("mlflow", "mlflow")
        is_database = re.match(r"(sqlite|mysql|postgresql|mssql)\b", self.tracking_uri)
        if is_database and find_spec("sqlalchemy") is None:
            what = f"logger.mlflow.tracking_uri={self.tracking_uri}: a database needs SQLAlchemy"
            raise ConfigError(f"{what}; pip install mlflow, or name a folder")

    def open(self, run: LoggedRun) -> "Tracker":
        """As `LoggerOption.open`."""
        return Tracker("mlflow", lambda run_id: MLflowRun(self, run, run_id), run)


class WandbRun(WandbLogger):
    """One run in Weights & Biases, the one with the id `run_id` if that is given."""

    def __init__(self, option: Wandb, run: LoggedRun, run_id: str | None) -> None:
        import wandb

        # Runs of several students are open at a time; what they print would be in the way of ours.
        opened = wandb.init(
            project=option.project,
            entity=option.entity,
            mode=option.mode,  # type: ignore[arg-type]  # checked
            group=option.group,
            tags=option.tags,
            name=run.name,
            dir=run.folder,
            id=run_id,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        opened.define_metric(STEP)
        opened.define_metric("*", step_metric=STEP, step_sync=True)
        super().__init__(project=option.project, experiment=opened)
        self.log_hyperparams(dict(run.settings))
        folder = str(run.folder).removesuffix(".unfinished")
        self.place = opened.url if option.mode == "online" else f"wandb sync {folder}/wandb/offline-run-*"

    def log_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Log a picture [H, W, 3] uint8."""
        self.log_image(tag, [picture], step)

    def log_results(self, metrics: Mapping[str, float]) -> None:
        """Log what was measured at the end."""
        self.experiment.summary.update(dict(metrics))

    def end(self, status: str) -> None:
        """Close the run, as "success" or something else."""
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def set_aside(folder: Path) -> bool:
    """Rename the offline runs of earlier attempts, so that they are not uploaded; returns if there were any.

    Of an attempt that was killed, Weights & Biases may have written nothing yet.
    """
    earlier = [*folder.glob("offline-run-*")]
    for attempt in earlier:
        attempt.rename(attempt.with_name(f"replaced-{attempt.name}"))
    return bool(earlier)


class MLflowRun(MLFlowLogger):
    """One run in an MLflow store, the one with the id `run_id` if that is given."""

    def __init__(self, option: MLflow, run: LoggedRun, run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # A server that is gone would hold training up for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        uri, store = option.tracking_uri, option.store
        if store is not None:
            # The only store that mlflow-skinny can use; newer versions ask for this.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            store.mkdir(parents=True, exist_ok=True)
            uri = store.as_uri()
            with FileLock(store / ".lock"):
                make_experiment(uri, option.experiment_name)
        super().__init__(option.experiment_name, run.name, uri, run_id=run_id)
        if run_id is None:  # MLflow refuses values that have changed, such as a path
            self.log_hyperparams(dict(run.settings))
        # Newer versions ask for that of whoever reads a folder, too.
        folder = "MLFLOW_ALLOW_FILE_STORE=true " if store else ""
        self.place = f"{folder}mlflow ui --backend-store-uri {store or uri}"

    def log_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """Log a picture [H, W, 3] uint8."""
        self.experiment.log_image(self.run_id, picture, key=tag, step=step)

    def log_results(self, metrics: Mapping[str, float]) -> None:
        """Log what was measured at the end."""
        self.log_metrics(metrics)

    def end(self, status: str) -> None:
        """Close the run, as "success" or something else."""
        self.finalize(status if status == "success" else "failed")


def make_experiment(uri: str, name: str) -> None:
    """Make the experiment `name` in a store, unless it is there."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    if client.get_experiment_by_name(name) is None:
        client.create_experiment(name)


class Tracker(CurveLogger):
    """A run in an experiment tracker, which gets each value once and never ends training.

    If the tracker fails, one line says so and training continues without it.

    Args:
        name: the option in conf/logger/.
        connect: opens the tracker's run of the given id, or a new one.
        run: the run to log.
    """

    def __init__(
        self, name: str, connect: Callable[[str | None], WandbRun | MLflowRun], run: LoggedRun
    ) -> None:
        super().__init__()
        self._name, self._run = name, run
        self._logged_until = max(run.logged, default=run.start)
        self._tracked: WandbRun | MLflowRun | None = None
        self._try(lambda: self._connect(connect))

    def _connect(self, connect: Callable[[str | None], WandbRun | MLflowRun]) -> None:
        file = self._run.folder / IDS
        ids = read_mapping(file)
        tracked = connect(ids.get(self._name))
        if self._name not in ids:
            write_atomically(file, json.dumps(ids | {self._name: tracked.version}, indent=2) + "\n")
        self._tracked = tracked
        log.info("%s: %s", self._name, tracked.place)

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: they were logged when the run was opened."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the values that an interrupted attempt has not logged."""
        before = self._run.logged.get(step, ()) if step is not None else ()
        values = {name: value for name, value in metrics.items() if name not in before}
        if values and (tracked := self._tracked):
            self._try(lambda: tracked.log_metrics(values, step))

    def log_picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """As `CurveLogger.log_picture`, unless an interrupted attempt has come as far."""
        is_new = not self._run.start < step <= self._logged_until
        if is_new and (tracked := self._tracked):
            self._try(lambda: tracked.log_picture(tag, picture, step))

    def finalize(self, status: str) -> None:
        """Close the run if training failed; else its test metrics are still to come."""
        if status != "success":
            self._end(status)

    def conclude(
        self, settings: Mapping[str, Any], ignored: Collection[str], metrics: Mapping[str, float]
    ) -> None:
        """As `CurveLogger.conclude`; closes the run."""
        if tracked := self._tracked:
            self._try(lambda: tracked.log_results(metrics))
        self._end("success")

    def _end(self, status: str) -> None:
        if tracked := self._tracked:
            self._try(lambda: tracked.end(status))
        self._tracked = None

    def _try(self, action: Callable[[], None]) -> None:
        """Whatever goes wrong with a network, a server or another library ends the logging alone."""
        try:
            action()
        except Exception as error:
            self._tracked = None
            log.warning("warning: logger=%s: %s; training continues without it", self._name, one_line(error))
