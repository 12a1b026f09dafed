"""`hydra/launcher=stacked`: train a multirun's jobs together where they can be stacked.

Hydra looks for launchers in this namespace only; the work is done by `vitkd.train.stacked.job`.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from vitkd.errors import ConfigError


class StackedLauncher(Launcher):
    """Trains stackable jobs together, and runs the others one by one.

    Args:
        max_students: the largest stack; None for no limit.
    """

    def __init__(self, max_students: int | None = None) -> None:
        self.max_students = max_students

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._compose_once(hydra_context.config_loader)

    def _compose_once(self, loader: ConfigLoader) -> None:
        """Keep what the sweeper composes to see that each job can be: it takes a tenth of a second a job."""
        compose = loader.load_sweep_config

        def kept(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            composed = compose(master_config, sweep_overrides)
            self._composed[tuple(sweep_overrides)] = composed
            return composed

        loader.load_sweep_config = kept  # type: ignore[method-assign]

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; called by Hydra's sweepers, batch by batch.

        Raises ConfigError if `max_students` is not a whole number of at least 1, or None.
        """
        most = self.max_students
        if most is not None and not (type(most) is int and most >= 1):
            raise ConfigError(
                f"hydra.launcher.max_students={most}: must be a whole number of at least 1, or null"
            )
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        jobs = [self._compose(overrides, n) for n, overrides in enumerate(job_overrides, initial_job_idx)]
        results = self._together(jobs)
        return [
            finished(job, results[job.hydra.job.num]) if job.hydra.job.num in results else self._alone(job)
            for job in jobs
        ]

    def _together(self, jobs: Sequence[DictConfig]) -> dict[int, float | None]:
        """The results by number of those jobs that could be trained together."""
        if self.task_function.command != "train":  # type: ignore[attr-defined]
            return {}
        # Hydra imports every launcher whenever it starts; these imports take seconds.
        from vitkd.train.stacked.job import run_together

        return run_together(jobs, self.max_students, self.task_function.explain)  # type: ignore[attr-defined]

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        key = tuple(overrides)
        if key not in self._composed:
            self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        job = self._composed.pop(key)
        with open_dict(job):
            job.hydra.job.id = job.hydra.job.num = number
        return job

    def _alone(self, job: DictConfig) -> JobReturn:
        result = run_job(
            task_function=self.task_function,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            hydra_context=self.hydra_context,
        )
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return result


def finished(job: DictConfig, result: float | None) -> JobReturn:
    """The return that Hydra's sweepers expect of a job, for one that ran together with others."""
    outcome = JobReturn(overrides=list(job.hydra.overrides.task), cfg=job, status=JobStatus.COMPLETED)
    outcome.return_value = result
    return outcome
