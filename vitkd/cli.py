"""From the command line to a checked configuration, and from a person's mistake to one clear line."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from vitkd.config import CONF_DIR, LONGEST_NAME, Config
from vitkd.distill.methods import Method
from vitkd.errors import ConfigError
from vitkd.messages import explain

log = logging.getLogger("vitkd")

USAGE_ERROR, INTERRUPTED = 2, 130
HYDRA_OPTIONS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun"),
    *("--info", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    "--experimental-rerun",
}
# They stand elsewhere in the path, or do not change what is computed.
NOT_NAMED = {
    *("name", "sweep", "experiment", "paths.data", "paths.outputs", "log_every_n_steps"),
    *("pictures_every_n_epochs", "trainer", "trainer.accelerator"),
}


def run_command(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Compose what the command line asks for and run `task` on it, once or, with -m, once a job.

    A `ConfigError`, or anything that Hydra finds wrong, is printed as one line and ends with exit code 2.
    """

    def job(composed: DictConfig) -> Any:
        try:
            return task(composed)
        except (OmegaConfBaseException, ConfigError) as error:
            # In a multirun the other jobs go on; alone, Hydra would print more than the line.
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            fail(explain(error, config_name, sys.argv[1:]))

    # Otherwise Hydra prints what is wrong itself, on many lines, and exits.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        check_arguments(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        fail(explain(error, config_name, sys.argv[1:]))
    except KeyboardInterrupt:
        fail("stopped by the keyboard", code=INTERRUPTED)


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for what Hydra's own parser trips over."""
    for argument in arguments:
        if argument.startswith("="):
            raise ConfigError(f"{argument}: has no key; write KEY=VALUE")
        flag = argument.partition("=")[0]
        if flag.startswith("--") and not any(option.startswith(flag) for option in HYDRA_OPTIONS):
            raise ConfigError(f"{argument}: no such option; settings go without dashes, as KEY=VALUE")


def fail(message: str, code: int = USAGE_ERROR) -> NoReturn:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def overridden() -> dict[str, str]:
    """What this job's command line set, as text: {"alpha": "0.5", "loss": "kl"}."""
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {o.get_key_element().lstrip("+~"): o.get_value_element_as_str() for o in parsed}


def run_path(config: Config) -> Path:
    """Where this job's run folder goes: outputs/<experiment or data set>/<its overrides>."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    group, in_path = (experiment, "experiment") if experiment else (config.dataset.name, "dataset")
    told = {key: value for key, value in overridden().items() if key not in NOT_NAMED | {in_path}}
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
        if key.split("@")[0].split(".")[0] in method.ignores:
            log.warning(
                "warning: %s has no effect with method=%s", key, HydraConfig.get().runtime.choices["method"]
            )
