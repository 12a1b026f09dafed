"""From the command line to a checked configuration, and from a user's mistake to one clear line."""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vitkd.cli.console import Job, print_jobs
from vitkd.cli.jobs import Sweep, as_typed, is_multirun, overridden, recorded
from vitkd.cli.messages import explain, explain_foreign, is_group, no_such_option
from vitkd.config.roles import names_folder
from vitkd.config.run import CONF_DIR, LONGEST_NAME, Config
from vitkd.config.schema import LONGEST_PART, check_text, refuse_foreign_code
from vitkd.data import Augment
from vitkd.errors import ConfigError, RunError
from vitkd.methods.base import Method
from vitkd.process.distributed import is_first, rank
from vitkd.process.isolation import freeze_gc, isolated, keep_freed_memory
from vitkd.process.signals import orderly_stops
from vitkd.process.streams import protect_streams
from vitkd.runs.files import write_problem

FAILED, USAGE_ERROR = 1, 2
# Not --experimental-rerun, which unpickles a file.
HYDRA_OPTIONS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--info", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
}
# The paths among the settings of all commands.
PATHS = (
    "paths.data",
    "paths.outputs",
    "dataset.root",
    "teacher.checkpoint",
    "teacher.weights",
    "student.weights",
    "root",
    "run",
    "image",
    "out",
)
# Commands whose settings come in groups, which Hydra's own help lists.
WITH_CHOICES = {"train"}


def run_command(config_name: str, task: Callable[[DictConfig, Job], float | None]) -> None:
    """Compose what the command line asks for and run `task` on it, once or, with -m, once a job.

    A `ConfigError`, or anything that Hydra finds wrong, is printed as one line and ends with exit code 2, a
    `RunError` with 1. In a multirun it ends only its own job; the command then exits with 1.
    """

    protect_streams()
    sys.argv[1:] = arguments = swept_with_group(flags_first(map(with_home, sys.argv[1:])))
    if config_name not in WITH_CHOICES and {"-h", "--help"} & {*arguments}:
        print(commented_settings(config_name))
        return

    def one_line(error: Exception) -> str:
        return explain(error, config_name, arguments)

    def job(composed: DictConfig) -> float | None:
        protect_streams()  # a launcher may have started another process
        with isolated():
            if not is_multirun():
                return only_job(composed)
            with recorded(one_line, say) as record:
                return task(composed, record)
            return None  # a sweeper that searches counts it as a failed trial

    def only_job(composed: DictConfig) -> float | None:
        try:
            return task(composed, Job(0, overridden()))
        # Hydra would print more than the line.
        except (OmegaConfBaseException, ConfigError) as error:
            fail(one_line(error))
        except (RunError, OSError) as error:
            if isinstance(error, OSError) and not write_problem(error):
                traceback.print_exc()
                sys.exit(FAILED)
            fail(one_line(error), code=FAILED)

    # For a launcher that runs jobs together.
    vars(job).update(command=config_name, explain=one_line)
    # Otherwise Hydra prints what is wrong itself, on many lines, and exits.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    # Read once a process, so it has to be there before the first job, should any ask for determinism.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    keep_freed_memory()
    freeze_gc()
    with orderly_stops(say), job_table(), one_line_errors(one_line), checked_by(check_composed):
        check_arguments(arguments)
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()


@contextmanager
def job_table() -> Iterator[None]:
    """List all jobs of a multirun at the end, however it ends; exit with 1 if one of them failed."""
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
def one_line_errors(one_line: Callable[[Exception], str]) -> Iterator[None]:
    """End the program with one line and an exit code for any error that the user can fix."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ConfigError, YAMLError) as error:
        fail(one_line(error))
    except OSError as error:  # of Hydra's: a job's are caught there
        if write_problem(error):
            fail(one_line(error), code=FAILED)
        if not error.filename:
            raise
        fail(f"{error.filename}: {error.strerror}; set hydra.run.dir or, with -m, hydra.sweep.dir to another")
    except (RuntimeError, ValueError) as error:
        if (line := explain_foreign(error)) is None:
            raise
        fail(line, code=FAILED)


@contextmanager
def checked_by(check: Callable[[DictConfig], None]) -> Iterator[None]:
    """Have `check` look at every configuration that is composed, before Hydra acts on it.

    Hydra has no public place for that: its callbacks, whose errors it turns into warnings, are built from the
    very node, and a check before `hydra.main` would miss what a job of a sweep composes.
    """
    compose = ConfigLoaderImpl.load_configuration

    def composed_and_checked(self: ConfigLoaderImpl, **kwargs: Any) -> DictConfig:
        try:
            config = compose(self, **kwargs)
        except (TypeError, ValueError) as error:  # of a group's option that is no text
            raise ConfigError(no_such_option(kwargs["overrides"]) or str(error)) from error
        check(config)
        return config

    setattr(ConfigLoaderImpl, compose.__name__, composed_and_checked)
    try:
        yield
    finally:
        setattr(ConfigLoaderImpl, compose.__name__, compose)


def check_hydra(hydra: DictConfig) -> None:
    """ConfigError for settings of Hydra's own that would run foreign code, or scatter or hide runs."""
    refuse_foreign_code(hydra)
    if hydra.job.chdir:
        raise ConfigError("hydra.job.chdir=true: each run has its folder in paths.outputs; leave it out")
    if "sweep" not in hydra.callbacks:
        raise ConfigError("hydra.callbacks.sweep: lists the jobs of a sweep; leave it as it is")


def commented_settings(config_name: str) -> str:
    """A command's settings: its own file with its comments, without Hydra's part."""
    text = (CONF_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")
    about, _, rest = text.partition("defaults:\n")
    settings = rest.partition("\n\n")[2].partition("\nhydra:")[0]
    return f"{about}\n{settings}".rstrip()


def check_composed(config: DictConfig) -> None:
    """Check Hydra's own node, refuse texts that nothing takes, and put the home folder for a path's ~."""
    check_hydra(config.hydra)
    settings = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    check_text(cast(dict[str, Any], OmegaConf.to_container(settings, resolve=False)))
    for key in PATHS:
        place = OmegaConf.select(config, key)
        if isinstance(place, str) and with_home(place) != place:
            OmegaConf.update(config, key, with_home(place))


def with_home(text: str) -> str:
    """A path, or KEY=~/x and KEY=[~/x,~/y], where no shell does so, with the home folder for the ~."""
    return re.sub(r"(?<![^=,\[])~(?=/|$)", lambda _: str(Path.home()), text)


def swept_with_group(arguments: Sequence[str]) -> list[str]:
    """A multirun's command line, where `method=token,logit method.temperature=2` sets it in all jobs.

    Hydra would first set it for the group's default option, unless it is swept as well.
    """
    if not {"-m", "--multirun"} & {*arguments}:
        return [*arguments]
    pairs = [argument.partition("=") for argument in arguments]
    swept = {key for key, _, value in pairs if "," in value and is_group(key)}
    return [
        f"{key}=choice({value})"
        if key.partition(".")[0] in swept - {key} and re.fullmatch(r"[^,()]+|\[[^()]*\]", value)
        else key + equals + value
        for key, equals, value in pairs
    ]


def flags_first(arguments: Iterable[str]) -> list[str]:
    """The command line with -m before all settings: Hydra's parser takes none on both sides of it."""
    arguments = [*arguments]
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return flags[:1] + [argument for argument in arguments if argument not in flags]


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for what Hydra's own parser cannot handle."""
    for argument in arguments:
        if number := re.search(r"\d{300}", argument):
            raise ConfigError(f"{argument[: number.start()]}…: is a number of too many digits")
        flag = argument.partition("=")[0]
        if not flag:
            raise ConfigError(f"{argument}: has no key; write KEY=VALUE")
        if max(map(len, os.fsencode(flag).split(b"/"))) > LONGEST_PART and not flag.startswith("--"):
            raise ConfigError(f"{flag[:40]}…: no such setting, it is too long a name")
        if flag.startswith("--") and not any(option.startswith(flag) for option in HYDRA_OPTIONS):
            raise ConfigError(f"{argument}: no such option; write settings as KEY=VALUE, without dashes")


def say(message: str) -> None:
    """Print an error as one line on stderr."""
    process = "" if is_first() else f" (process {rank()})"
    print(f"error{process}: {message}", file=sys.stderr, flush=True)


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """End the program with one line on stderr."""
    say(message)
    sys.exit(code)


def job_command() -> list[str]:
    """The command line that runs just this job."""
    own = [sys.executable, "-m", "vitkd.train"]
    if not is_multirun():
        return [*own, *sys.argv[1:]]
    hydra = HydraConfig.get()
    sources = hydra.runtime.config_sources
    folders = [source.path for source in sources if source.provider == "command-line"]
    options = [argument for folder in folders for argument in ("--config-dir", folder)]
    return [*own, *options, *as_typed(hydra), "hydra.mode=RUN"]


def should_resume(config: Config) -> bool:
    """Whether a job skips a run that is done and resumes one that was interrupted."""
    wants_to = config.resume == "auto" or (is_multirun() and config.sweep.rerun == "missing")
    return wants_to and not config.debug  # a mistake is looked for by trying again


def run_path(config: Config) -> Path:
    """Where this job's run folder goes: outputs/<experiment or data set>/<its overrides>."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    group, in_path = (experiment, "experiment") if experiment else (config.dataset.name, "dataset")
    named = {key: value for key, value in overridden().items() if key != in_path and names_folder(key)}
    return Path(config.outputs, group, config.name or folder_name(named))


def folder_name(settings: dict[str, str]) -> str:
    """One readable folder name, of characters that need no quotes on a command line.

    So `run=` and `teacher.checkpoint=` take the path as it is printed: no comma, no equals sign.
    """
    words = "_".join(f"{key}-{settings[key]}" for key in sorted(settings))
    name = re.sub(r"[^\w.+-]+", "_", words).strip("_") or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def ignored_settings(method: Method, augment: Augment) -> list[str]:
    """What the command line sets although nothing reads it, each as a sentence."""
    choice = HydraConfig.get().runtime.choices["method"]
    ignored = []
    for key in overridden():
        augmentation = re.match(r"dataset\.augment\.(\w+)\.", key)
        if augmentation and augmentation[1] not in augment.augmentations:
            ignored.append(f"{key} has no effect without {augmentation[1]} in dataset.augment.then")
        name = key.split("@")[0]
        if any(f"{name}.".startswith(f"{unread}.") for unread in method.ignores):
            others = "the other settings of " if name.startswith("method.") else ""
            ignored.append(f"{key} has no effect with {others}method={choice}")
    return ignored
