"""From the command line to a checked configuration, and from a person's mistake to one clear line."""

import errno
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vitkd.cli.console import Job, print_jobs
from vitkd.cli.jobs import Sweep, as_typed, is_multirun, overridden, recorded
from vitkd.cli.messages import explain, explain_foreign
from vitkd.config import CONF_DIR, LONGEST_NAME, Config
from vitkd.config.roles import names_folder
from vitkd.config.schema import refuse_foreign_code
from vitkd.errors import ConfigError, RunError
from vitkd.methods.base import Method
from vitkd.process.distributed import is_first, rank
from vitkd.process.isolation import isolated
from vitkd.process.memory import keep_freed_memory, pass_over_what_is_imported
from vitkd.process.signals import TERMINATED, exit_on_termination
from vitkd.runs.files import NO_ROOM

log = logging.getLogger("vitkd")

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
HYDRA_OPTIONS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--info", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    "--experimental-rerun",
}
# Commands whose settings come in groups, which Hydra's own help lists.
WITH_CHOICES = {"train"}


def run_command(config_name: str, task: Callable[[DictConfig, Job], float | None]) -> None:
    """Compose what the command line asks for and run `task` on it, once or, with -m, once a job.

    A `ConfigError`, or anything that Hydra finds wrong, is printed as one line and ends with exit code 2, a
    `RunError` with 1. In a multirun it ends only its own job; the command then exits with 1.
    """

    sys.argv[1:] = arguments = flags_first(sys.argv[1:])
    if config_name not in WITH_CHOICES and {"-h", "--help"} & {*arguments}:
        print(commented_settings(config_name))
        return

    def one_line(error: Exception) -> str:
        return explain(error, config_name, arguments)

    def job(composed: DictConfig) -> float | None:
        with isolated():
            if not is_multirun():
                return alone(composed)
            with recorded(one_line, say) as record:
                return task(composed, record)
            return None  # a sweeper that searches takes it for a trial that failed

    def alone(composed: DictConfig) -> float | None:
        try:
            return task(composed, Job(0, overridden()))
        # Hydra would print more than the line.
        except (OmegaConfBaseException, ConfigError) as error:
            fail(one_line(error))
        except RunError as error:
            fail(one_line(error), code=FAILED)

    # For a launcher that runs jobs together.
    vars(job).update(command=config_name, explain=one_line)
    # Otherwise Hydra prints what is wrong itself, on many lines, and exits.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Read once a process, so it has to be there before the first job, should any ask for determinism.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    pass_over_what_is_imported()
    exit_on_termination()
    with summed_up(), ended_by_one_line(one_line), checked_by(refuse_foreign_code):
        check_arguments(arguments)
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()


@contextmanager
def summed_up() -> Iterator[None]:
    """Tell of all jobs of a multirun at the end, however it comes; exit with 1 if one of them failed."""
    Sweep.current = None
    jobs: list[Job] = []
    try:
        yield
    finally:
        if Sweep.current:
            jobs = Sweep.current.jobs()
        if is_first():
            print_jobs(jobs)
    if any(job.state == "failed" for job in jobs):
        sys.exit(FAILED)


@contextmanager
def ended_by_one_line(one_line: Callable[[Exception], str]) -> Iterator[None]:
    """End the program with one line, and the exit code that it stands for, whatever a person can mend."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ConfigError, YAMLError) as error:
        fail(one_line(error))
    except OSError as error:
        if error.errno not in NO_ROOM | {errno.EROFS, errno.EACCES, errno.EPERM}:
            raise
        place = error.filename or "the outputs' disk"
        fail(f"{place}: cannot be written ({error.strerror}); make room or set paths.outputs=DIR", FAILED)
    except (RuntimeError, ValueError) as error:
        if (line := explain_foreign(error)) is None:
            raise
        fail(line, code=FAILED)
    except KeyboardInterrupt:
        fail("stopped by the keyboard", code=INTERRUPTED)
    except SystemExit as end:
        if end.code == TERMINATED:
            say("stopped by SIGTERM")
        raise


@contextmanager
def checked_by(check: Callable[[DictConfig], None]) -> Iterator[None]:
    """Have `check` look at Hydra's own node whenever one is composed, before Hydra acts on it."""
    compose = ConfigLoaderImpl.load_configuration

    def composed_and_checked(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        config = compose(self, *args, **kwargs)
        check(config.hydra)
        return config

    setattr(ConfigLoaderImpl, compose.__name__, composed_and_checked)
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, compose.__name__, compose)


def commented_settings(config_name: str) -> str:
    """What a command can be told: its own file, comments and all, without what is Hydra's."""
    text = (CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")
    about, _, rest = text.partition("defaults:\n")
    settings = rest.partition("\n\n")[2].partition("\nhydra:")[0]
    return f"{about}\n{settings}".rstrip()


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The command line with -m before all settings: Hydra's parser takes no settings on both sides of it."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return flags[:1] + [argument for argument in arguments if argument not in flags]


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for what Hydra's own parser trips over."""
    for argument in arguments:
        if argument.startswith("="):
            raise ConfigError(f"{argument}: has no key; write KEY=VALUE")
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not any(option.startswith(flag) for option in HYDRA_OPTIONS):
            raise ConfigError(f"{argument}: no such option; settings go without dashes, as KEY=VALUE")


def say(message: str) -> None:
    """Tell of an error in one line on stderr."""
    process = "" if is_first() else f" (process {rank()})"
    print(f"error{process}: {message}", file=sys.stderr, flush=True)


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """End the program with one line on stderr."""
    say(message)
    sys.exit(code)


def same_job() -> list[str]:
    """The command line that runs this very job, alone."""
    own = [sys.executable, "-m", "vitkd.train"]
    if not is_multirun():
        return [*own, *sys.argv[1:]]
    hydra = HydraConfig.get()
    given = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    places = [argument for place in given for argument in ("--config-dir", place)]
    return [*own, *places, *as_typed(hydra), "hydra.mode=RUN"]


def goes_on(config: Config) -> bool:
    """Whether a job leaves alone what is done and goes on with what was cut off."""
    return config.resume == "auto" or (is_multirun() and config.sweep.rerun == "missing")


def run_path(config: Config) -> Path:
    """Where this job's run folder goes: outputs/<experiment or data set>/<its overrides>."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    group, in_path = (experiment, "experiment") if experiment else (config.dataset.name, "dataset")
    told = {key: value for key, value in overridden().items() if key != in_path and names_folder(key)}
    return Path(config.paths.outputs, group, config.name or folder_name(told))


def folder_name(settings: dict[str, str]) -> str:
    """One readable folder name, made of what may stand unquoted on a command line.

    So `run=` and `teacher.checkpoint=` take the path as it is printed: no comma, no equals sign.
    """
    words = "_".join(f"{key}-{settings[key]}" for key in sorted(settings))
    name = re.sub(r"[^\w.+-]+", "_", words).strip("_") or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def warn_of_ignored_settings(method: Method) -> None:
    """Say so when the command line sets something that the chosen method does not look at."""
    for key in overridden():
        name = key.split("@")[0]
        if any(f"{name}.".startswith(f"{ignored}.") for ignored in method.ignores):
            others = "the other settings of " if name.startswith("method.") else ""
            choice = HydraConfig.get().runtime.choices["method"]
            log.warning("warning: %s has no effect with %smethod=%s", key, others, choice)
