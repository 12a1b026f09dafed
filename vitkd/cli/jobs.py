"""The jobs of one command: the settings of each, how each ended, and that no failure stops the others.

In a multirun every job leaves a record in `hydra.sweep.dir`, whichever process it ran in, so that the
command can list all of them at its end, those that never ran as well.
"""

import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vitkd.cli.console import Job
from vitkd.errors import ConfigError, RunError
from vitkd.process.distributed import is_first
from vitkd.runs.files import read_mapping, write_atomically, write_problem


class Sweep(Callback):
    """A multirun; Hydra calls it (`hydra.callbacks`) when one begins."""

    current: ClassVar["Sweep | None"] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember where records go and, where Hydra knows beforehand, which jobs there will be."""
        self.folder = Path(config.hydra.sweep.dir)
        for earlier in records_in(self.folder):
            earlier.unlink()  # of a sweep before this one, where the folder is always the same
        self.here: dict[int, Job] = {}
        self.planned = planned_jobs(config)
        Sweep.current = self

    @classmethod
    def known(cls) -> list[Job]:
        """The jobs of this process, in order; none outside a multirun."""
        return [job for _, job in sorted(cls.current.here.items())] if cls.current else []

    def jobs(self) -> list[Job]:
        """All jobs in order: those of this process, those on record, and those planned that never ran."""
        known = {job.number: job for job in self.planned}
        for job in records_in(self.folder).values():
            # The command is over, so the process that wrote this was killed.
            known[job.number] = replace(job, state="stopped") if job.state == "running" else job
        known |= self.here  # whatever has become of their records
        return [known[number] for number in sorted(known)]


def records_in(folder: Path) -> dict[Path, Job]:
    """The jobs that have a record in `folder`, by its file; another file of such a name is none."""
    contents = {path: read_mapping(path) for path in folder.glob("job-*.json")}
    names = {field.name for field in fields(Job)}
    return {path: Job(**content) for path, content in contents.items() if content.keys() == names}


def planned_jobs(config: DictConfig) -> list[Job]:
    """The jobs of Hydra's own sweeper; other sweepers choose theirs as they run."""
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return []
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    # `glob` looks at the options that there are.
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*params, *as_typed(config.hydra)])
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [Job(number, as_settings(job)) for number, job in enumerate(batch)]


def is_multirun() -> bool:
    """Whether this job is one of several."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def overridden() -> dict[str, str]:
    """What this job's command line set, as text: {"alpha": "0.5", "loss": "kl"}."""
    return as_settings(as_typed(HydraConfig.get()))


def as_typed(hydra: Any) -> list[str]:
    """The overrides of a job or sweep as they were typed; `${…}` in them is left for the job to resolve."""
    return cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False))


def as_settings(overrides: Sequence[str]) -> dict[str, str]:
    """["alpha=0.5", "+x=1"] as {"alpha": "0.5", "x": "1"}."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {o.get_key_element().lstrip("+~"): o.get_value_element_as_str() for o in parsed}


@contextmanager
def as_job(composed: DictConfig) -> Iterator[DictConfig]:
    """The job's own configuration, with Hydra's global state as it is while that job runs."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    own = composed.copy()
    with open_dict(own):
        del own["hydra"]
    try:
        yield own
    finally:
        HydraConfig.instance().cfg = before


@contextmanager
def recorded(explain: Callable[[Exception], str], say: Callable[[str], None]) -> Iterator[Job]:
    """Run a multirun's job in the body, which fills in the record; an error ends the job, not the others.

    Args:
        explain: turns an error into one line.
        say: prints that line.
    """
    job = Job(HydraConfig.get().job.num, overridden(), state="running")
    folder = Path(HydraConfig.get().sweep.dir)
    with all_recorded([job], folder, explain, say):
        yield job
        job.state = "done" if job.state == "running" else job.state


@contextmanager
def all_recorded(
    jobs: Sequence[Job], folder: Path, explain: Callable[[Exception], str], say: Callable[[str], None]
) -> Iterator[None]:
    """As `recorded`, for jobs that run together: what ends the body ends all that are still running."""

    def write() -> None:
        for job in jobs if is_first() else ():
            record = folder / f"job-{job.number}.json"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(record, json.dumps(asdict(job), indent=2) + "\n")
            except OSError as error:
                say(f"{record}: cannot be written ({error.strerror})")

    if Sweep.current:
        Sweep.current.here |= {job.number: job for job in jobs}
    write()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        end(jobs, "stopped")
        raise
    except Exception as error:
        line = explain(error)
        is_known = isinstance(error, OmegaConfBaseException | ConfigError | RunError)
        if not is_known and not write_problem(error):
            traceback.print_exc()
            line = f"{type(error).__name__}: {line}"
        for job in end(jobs, "failed"):
            same = next((other for other in Sweep.known() if other.error == line), None)
            job.error = line
            say(f"job {job.number} failed: {f'as job {same.number}' if same else line}")
    finally:
        write()


def end(jobs: Sequence[Job], state: str) -> list[Job]:
    """Set the state of those of `jobs` that were still running; returns them."""
    running = [job for job in jobs if job.state == "running"]
    for job in running:
        job.state = state
    return running
