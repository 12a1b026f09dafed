"""One clear line for each of Hydra's and OmegaConf's long messages."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vitkd.config.run import CONF_DIR
from vitkd.errors import ConfigError
from vitkd.models import ModelConfig
from vitkd.runs.files import write_problem

# Hydra finds these by itself once they are installed.
PLUGINS = {
    *("hydra/launcher=joblib", "hydra/launcher=submitit_local", "hydra/launcher=submitit_slurm"),
    "hydra/sweeper=optuna",
}


LONGEST_LINE = 1000


def explain(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    """What is wrong and what would be right, on one line that a terminal can show."""
    line = " ".join(re.split(r"[\s\x00-\x1f\x7f]+", _explanation(error, config_name, arguments)))
    if config_name != "train" and isinstance(error, ConfigError):
        # Of the run, as these commands call it; a folder that is named after this setting is no setting.
        line = re.sub(r"(?<![\w./-])dataset\.root(?![\w.-])", "root", line)
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


def _explanation(error: Exception, config_name: str, arguments: Sequence[str]) -> str:
    text = str(error)
    if problem := write_problem(error):
        return f"{problem} or set paths.outputs=DIR"
    if isinstance(error, OverrideParseException):
        if "=" not in (override := str(error.override)):
            return f"{override}: has no value; write KEY=VALUE"
        return f"{override}: cannot be parsed; write KEY=VALUE, odd values as 'KEY=\"VALUE\"'"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: is required; write {error.full_key}=VALUE"
    if missing := re.search(r"Could not (?:find|load) '((?:hydra/)?[^'/]+)/([^']*)'", text):
        return _no_such_option(missing[1], missing[2], text)
    if present := re.search(r"An item is already at '([^']+)'", text):
        return f"{present[1]}: exists already; set it without the plus"
    if "Error resolving interpolation" in text and (line := no_such_option(arguments)):
        return line
    if unlike := re.search(r"Error merging override ([^=]+)=", text):
        if unlike[1].startswith("hydra.") and isinstance(error.__cause__, OmegaConfBaseException):
            return explain(error.__cause__, config_name, arguments)  # Hydra's own settings have types
        return f"{unlike[1]}: holds several settings; write {unlike[1]}.KEY=VALUE"
    if several := re.search(r"Ambiguous value for argument '(.+?)'\s", text):
        return f"{several[1]}: has several values; add -m to run a job for each, or write a list as [a,b]"
    if unknown := re.search(r"Could not (?:override|delete|append to config)[^']*'([^']+)'", text):
        return _no_such_key(unknown[1], config_name, arguments)
    plain = re.sub(r"\s*(full_key|object_type|reference_type)[:=] ?\S*", "", text)
    place = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
    return place + " ".join(plain.split()) or type(error).__name__


def explain_foreign(error: Exception) -> str | None:
    """One line for a launcher's or sweeper's error, or None if the user cannot fix it."""
    text = str(error)
    if "Could not detect" in text and "srun" in text:
        return "hydra/launcher=slurm: there is no SLURM on this machine; choose hydra/launcher=local"
    if "No trials are completed" in text:
        return "no trial of the search has succeeded; run one of its jobs by itself to see why"
    return None


def is_group(name: str) -> bool:
    """Whether options in a folder of conf/ are chosen by this name."""
    return os.path.isdir(CONF_DIR / name)  # noqa: PTH112, Path.is_dir raises for a name that is too long


def no_such_option(arguments: Sequence[str]) -> str | None:
    """What is wrong with the first argument that sets a group to something other than a name, if any does."""
    for argument in arguments:
        key, _, option = argument.partition("=")
        group = key.lstrip("+").partition("@")[0]
        is_null = option in ("null", "nan", "inf", "-inf", "true", "false")
        if is_group(group) and (is_null or not re.fullmatch(r"[A-Za-z_][\w/,-]*", option)):
            return _no_such_option(group, option, "")
    return None


def _no_such_option(group: str, option: str, text: str) -> str:
    if f"{group}={option}" in PLUGINS:
        return f"{group}={option}: is a plugin that is not installed; pip install 'vitkd[sweep]'"
    listed = re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE)
    folder = CONF_DIR / group
    own = [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
    options = sorted({*listed, *own})
    close = get_close_matches(option, options, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{group}={option}: no such option; {hint}choose one of {', '.join(options)}"


def _no_such_key(key: str, config_name: str, arguments: Sequence[str]) -> str:
    group, _, setting = key.partition(".")
    if key == "augment":
        return "augment: no such setting; write dataset.augment.then=[NAME,…], in the order to be applied"
    owners = [
        path.stem for path in sorted((CONF_DIR / group).glob("*.yaml")) if setting in _settings_of(path)
    ]
    if setting and owners and config_name == "train":
        chosen = [o for a in arguments if a.startswith(f"{group}=") for o in a[len(group) + 1 :].split(",")]
        if lacking := [option for option in chosen if option not in owners and {*chosen} & {*owners}]:
            return f"{key}: is no setting of {group}={','.join(lacking)}; leave out one of the two"
        return (
            f"{key}: is a setting of {' or '.join(f'{group}={owner}' for owner in owners)}; choose that too"
        )
    known = list(_keys(_composed(config_name, arguments)))
    if key in known:
        inside = [name for name in known if name.startswith(f"{key}.")]
        return f"{key}: holds several settings; write {' or '.join(f'{name}=VALUE' for name in inside)}"
    same_ending = sorted((k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]), key=len)
    close = get_close_matches(key, known, n=1) or same_ending
    hint = f"did you mean {close[0]}?" if close else "`--help` lists them all"
    return f"{key}: no such setting; {hint}"


def _settings_of(option: Path) -> set[str]:
    """The names of the settings in an option's file and in the files that it inherits from."""
    content = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(option)))
    bases = [base.partition("@")[0] for base in content.get("defaults", []) if isinstance(base, str)]
    files = [CONF_DIR / base[1:] if base[0] == "/" else option.parent / base for base in bases]
    inherited = [_settings_of(file.with_suffix(".yaml")) for file in files if file.name != "_self_"]
    return {*_keys(content)}.union(*inherited)


def _composed(config_name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration with just the options chosen on the command line, to see which keys there are."""
    choices = [
        argument
        for argument in arguments
        if is_group(argument.partition("=")[0]) and re.search(r"=(\[.*\]|[^,]*)$", argument)
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            composed = compose(config_name, choices)
        except HydraException:
            composed = compose(config_name)  # one of them is of a group that another command has
    return cast(dict[str, Any], OmegaConf.to_container(composed))


def _keys(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


@contextmanager
def calling_by_option(models: Mapping[str, ModelConfig]) -> Iterator[None]:
    """Let a ConfigError call a model without a name by its option: `student=small (2×4 blocks×heads, …)`.

    Args:
        models: group → the model that its option describes.
    """
    try:
        yield
    except ConfigError as error:
        message = str(error)
        chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        for group, model in models.items():
            if not model.is_named and group in chosen:
                message = message.replace(f"{group}={model}", f"{group}={chosen[group]} ({model})")
        raise ConfigError(message) from error
