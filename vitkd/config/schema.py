"""From a node of the configuration to the object it describes, checked against its class."""

import importlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, cast, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitkd.errors import ConfigError, suggest

# What Hydra's own node may name: a sweep's record, launchers, sweepers and their samplers, log handlers.
ALLOWED_TO_HYDRA = (
    *("vitkd.cli.jobs.Sweep", "hydra._internal.core_plugins.", "hydra_plugins."),
    *("optuna.samplers.", "logging.", "colorlog."),
)
# Types in plain English, for error messages.
IN_WORDS = {
    **{"None": "null", "bool": "true or false", "str": "text"},
    **{"float": "a number", "int": "a whole number"},
}
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def build(key: str, node: Mapping[str, Any], base: type) -> Any:
    """The object that a group's node describes, an instance of `base`.

    Raises ConfigError if `_target_` is not such a class of vitkd's, or a setting does not fit it.
    """
    settings = {str(name): node[name] for name in node if name != "_target_"}
    return instantiate(key, allowed_class(key, str(node.get("_target_")), base), settings)


def allowed_class(key: str, target: str, base: type) -> type:
    """The subclass of `base` that `target` names.

    Only vitkd's own modules are ever imported, so a configuration file cannot name code to run.
    """
    module, _, name = target.rpartition(".")
    if module.split(".")[0] == "vitkd":
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
        is_subclass = inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found)
        if is_subclass and found.__module__.startswith("vitkd."):
            return cast(type, found)
    raise ConfigError(f"{key}._target_={target}: only vitkd's own {base.__name__} classes are allowed")


def instantiate(key: str, cls: type, settings: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls`, every setting checked against its field's name and type."""
    prefix = f"{key}." if key else ""
    known = [f.name for f in fields(cls)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"{prefix}{name}: no such setting; {suggest(name, known)}")
    schema = OmegaConf.structured(cls)
    for name, value in settings.items():
        try:
            schema = OmegaConf.merge(schema, {name: value})
        except OmegaConfBaseException as error:
            raise ConfigError(f"{prefix}{name}={value}: must be {type_of(cls, name)}") from error
    try:
        return OmegaConf.to_object(schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: is missing and required") from error
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def type_of(cls: type, name: str) -> str:
    """The type of a dataclass's field in plain English."""
    hint = get_type_hints(cls)[name]
    text = hint.__name__ if inspect.isclass(hint) and not get_args(hint) else str(hint)
    for code, words in IN_WORDS.items():
        text = re.sub(rf"\b{code}\b", words, text)
    return text.replace(" | ", " or ")


def refuse_foreign_code(hydra: DictConfig) -> None:
    """ConfigError if Hydra's own node names code to run that is neither ours, Hydra's nor its plugins'.

    Hydra instantiates its launcher, sweeper and callbacks, and logging its handlers, by names that any file
    in a `--config-dir` may set. So may it set environment variables, such as PYTHONPATH, by which the next
    process that a job starts would run code.
    """
    for key, value in _leaves(OmegaConf.to_container(hydra, resolve=False), "hydra"):
        setting = key.rpartition(".")[2]
        if key.startswith("hydra.job.env_set.") and value != os.environ.get(setting):
            raise ConfigError(f"{key}={value}: is not allowed; set {setting} in the shell")
        logs = "_logging." in key
        names_code = setting == "_target_" or (logs and setting in ("class", "()"))
        if names_code and not str(value).startswith(ALLOWED_TO_HYDRA):
            raise ConfigError(f"{key}={value}: only vitkd's own code and Hydra's plugins are allowed")
        if logs and str(value).startswith(("ext://", "cfg://")) and value not in STREAMS:
            raise ConfigError(f"{key}={value}: choose {' or '.join(STREAMS)}")


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if isinstance(value, dict | list):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value
