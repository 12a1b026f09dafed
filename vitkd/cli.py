"""From the command line to a checked configuration, and from a person's mistake to one clear line."""

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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

USAGE_ERROR = 2
# They stand elsewhere in the path, or do not change what is computed.
NOT_NAMED = {
    "experiment",
    "dataset",
    "name",
    "paths.data",
    "paths.outputs",
    "log_every_n_steps",
    "pictures_every_n_epochs",
}


def entry_point(
    config_name: str,
    prologue: Callable[[], None] = lambda: None,
    epilogue: Callable[[], None] = lambda: None,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a function of the composed configuration into a command.

    A `ConfigError`, or anything that Hydra finds wrong, is printed as one line and ends with exit code 2.
    `prologue` runs before the first job, `epilogue` when all have ended, whether or not one failed.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def job(composed: DictConfig) -> Any:
            try:
                return task(composed)
            except (OmegaConfBaseException, ConfigError) as error:
                # In a multirun the other jobs go on; alone, Hydra would print more than the line.
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                fail(explain(error, config_name, sys.argv[1:]))

        def main() -> None:
            # Otherwise Hydra prints what is wrong itself, on many lines, and exits.
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            prologue()
            try:
                check_arguments(sys.argv[1:])
                try:
                    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)()
                finally:
                    epilogue()
            except (HydraException, OmegaConfBaseException, ConfigError) as error:
                fail(explain(error, config_name, sys.argv[1:]))

        return main

    return decorate


def check_arguments(arguments: Sequence[str]) -> None:
    """ConfigError for what Hydra's own parser trips over."""
    for argument in arguments:
        if argument.startswith("="):
            raise ConfigError(f"{argument}: has no key; write KEY=VALUE")


def fail(message: str) -> None:
    """End the program with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


def overridden() -> dict[str, str]:
    """What this job's command line set, as text: {"alpha": "0.5", "loss": "kl"}."""
    parsed = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    return {o.get_key_element().lstrip("+~"): o.get_value_element_as_str() for o in parsed}


def run_path(config: Config) -> Path:
    """Where this job's run folder goes: outputs/<experiment or data set>/<its overrides>."""
    hydra_config = HydraConfig.get()
    group = hydra_config.runtime.choices.get("experiment") or config.dataset.name
    return Path(config.paths.outputs, group, config.name or folder_name(overridden()))


def folder_name(settings: dict[str, str]) -> str:
    """One readable, safe folder name for the settings that tell a job from its neighbours."""
    told = {key: value for key, value in settings.items() if key not in NOT_NAMED}
    name = re.sub(r"[^\w.,=\[\]-]+", "_", ",".join(f"{key}={told[key]}" for key in sorted(told))) or "default"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def warn_of_ignored_settings(method: Method) -> None:
    """Say so when the command line sets something that the chosen method does not look at."""
    for key in overridden():
        if key.split("@")[0].split(".")[0] in method.ignores:
            log.warning(
                "warning: %s has no effect with method=%s", key, HydraConfig.get().runtime.choices["method"]
            )
