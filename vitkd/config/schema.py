"""From a node of the configuration to the object it describes, checked against its class."""

import importlib
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf, StringNode
from omegaconf.errors import ValidationError

from vitkd.errors import ConfigError, suggest
from vitkd.process.plugins import GROUP as PLUGINS
from vitkd.process.plugins import import_plugin, is_plugin

# What Hydra's own node may name: a sweep's record, launchers, sweepers and their samplers, log handlers.
ALLOWED_TO_HYDRA = (
    *("vitkd.cli.jobs.Sweep", "hydra._internal.core_plugins.", "hydra_plugins."),
    *("optuna.samplers.", "logging.", "colorlog."),
)
# Types in plain English, for error messages.
IN_WORDS: dict[Any, str] = {
    **{NoneType: "null", bool: "true or false", str: "text"},
    **{float: "a number", int: "a whole number", Any: "anything"},
}
SCALARS: dict[Any, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}
# What file systems take: bytes of a name, and characters of a path.
LONGEST_PART, LONGEST_TEXT = 255, 4096
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def build(key: str, node: Mapping[str, Any] | None, base: type) -> Any:
    """The object that a group's node describes, an instance of `base`.

    Raises ConfigError if `_target_` is not such a class of vitkd's, or a setting does not fit it.
    """
    if node is None:
        raise ConfigError(f"{key}: is missing and required")
    check_group(key, node)
    settings = {str(name): node[name] for name in node if name != "_target_"}
    return instantiate(key, allowed_class(key, str(node.get("_target_")), base), settings)


def check_group(key: str, node: Any) -> None:
    """ConfigError unless `node` holds settings by their names."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={node}: holds several settings; write {key}.KEY=VALUE")


def allowed_class(key: str, target: str, base: type) -> type:
    """The subclass of `base` that `target` names.

    Only vitkd's own modules and those of installed plugins are ever imported, so a configuration file cannot
    name code to run.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(allowed_module(module), name, None)
    except ConfigError as error:
        raise ConfigError(f"{key}._target_={error}") from error
    is_subclass = inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found)
    if is_subclass and is_allowed(found.__module__):
        return cast(type, found)
    allowed = f"only vitkd's own {base.__name__} classes are allowed, and those of installed plugins"
    raise ConfigError(f"{key}._target_={target}: {allowed} (entry points in the group {PLUGINS})")


def is_allowed(module: str) -> bool:
    """Whether a configuration may name classes of a module."""
    return module.startswith("vitkd.") or is_plugin(module)


def allowed_module(module: str) -> ModuleType | None:
    """A module of vitkd's or of a plugin; None if it is neither, or not there."""
    if is_plugin(module):
        return import_plugin(module)
    try:
        return importlib.import_module(module) if is_allowed(module) else None
    except ImportError:
        return None


def instantiate(key: str, cls: type, settings: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls`, every setting checked against its field's name and type."""
    if isinstance(settings, DictConfig):
        settings = cast(dict[str, Any], OmegaConf.to_container(settings, resolve=True))
    prefix = f"{key}." if key else ""
    known = [f.name for f in fields(cls)]
    settings = with_rest(cls, settings)
    for name in settings:
        if name not in known:
            raise ConfigError(f"{prefix}{name}: no such setting; {suggest(name, known)}")
    for f in fields(cls):
        if settings.get(f.name, f.default) in (MISSING, "???") and f.default_factory is MISSING:
            raise ConfigError(f"{prefix}{f.name}: is missing and required; add {prefix}{f.name}=VALUE")
    hints = get_type_hints(cls)
    rest = getattr(cls, "REST", None)
    keys = {name: key if name == rest else f"{prefix}{name}" for name in settings}
    values = {name: converted(keys[name], value, hints[name]) for name, value in settings.items()}
    try:
        built = cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error
    for name, value in leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{name}={value}: must be finite")
    return built


def with_rest(cls: type, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings, those that are no fields of `cls` in its field that takes all others, if it has one."""
    rest = getattr(cls, "REST", None)
    if rest is None:
        return settings
    own = {f.name for f in fields(cls)} - {rest}
    others = {name: value for name, value in settings.items() if name not in own}
    return {name: value for name, value in settings.items() if name in own} | {rest: others}


def converted(key: str, value: Any, hint: Any) -> Any:
    """The value of the setting `key` as its type `hint` has it: "2" is 2 where a whole number is due.

    Raises ConfigError if it cannot be one.
    """
    if is_dataclass(hint):
        check_group(key, value)
        return instantiate(key, cast(type, hint), value)
    if get_origin(hint) is dict and is_dataclass(base := get_args(hint)[1]):
        return {name: build(f"{key}.{name}", node, cast(type, base)) for name, node in value.items()}
    try:
        return _converted(value, hint)
    except (ValidationError, ValueError, OverflowError) as error:
        raise ConfigError(f"{key}={value}: must be {in_words(hint)}") from error


def _converted(value: Any, hint: Any) -> Any:
    container, inner = get_origin(hint), get_args(hint)
    is_one = type(value) is hint or (container is dict and isinstance(value, dict))
    if hint is Any or is_one or (container is Literal and value in inner):
        return value
    if container in (Union, UnionType):
        exact = [each for each in inner if type(value) is each]
        for each in exact or inner:
            try:
                return _converted(value, each)
            except (ValidationError, ValueError, OverflowError):
                continue
    if container is list and isinstance(value, list):
        return [_converted(each, inner[0]) for each in value]
    # OmegaConf takes every number but 0 for true.
    is_number = hint is bool and re.fullmatch(r"-?\d\d+|-?[2-9]", str(value))
    if hint not in SCALARS or is_number:
        raise ValueError
    return SCALARS[hint](value, is_optional=False)._value()


def unquoted(choice: str) -> str:
    """A choice as text: an unquoted `off` in a YAML file is read as false."""
    return "off" if choice == "False" else choice


def in_words(hint: Any) -> str:
    """A type in plain English."""
    container, inner = get_origin(hint), get_args(hint)
    if container is list:
        return f"list[{in_words(inner[0])}]"
    if container is dict:
        return "a group of settings"
    if container is Literal:
        return " or ".join(map(str, inner))
    if inner:
        return " or ".join(in_words(each) for each in inner)
    return IN_WORDS.get(hint, hint.__name__)


def check_text(settings: Mapping[str, Any]) -> None:
    """ConfigError for a text that no file could hold, or be called."""
    for key, value in leaves(settings):
        if not isinstance(value, str):
            continue
        size = value.encode(errors="replace")
        if re.search(r"[\0-\x1f\x7f\ud800-\udfff]", value):
            raise ConfigError(f"{key}={value!r}: must be UTF-8, without control characters")
        if len(size) > LONGEST_TEXT or max(map(len, size.split(b"/"))) > LONGEST_PART:
            raise ConfigError(f"{key}={value}: is too long; a name takes {LONGEST_PART} bytes at most")


def refuse_foreign_code(hydra: DictConfig) -> None:
    """ConfigError if Hydra's own node names code to run that is neither ours, Hydra's nor its plugins'.

    Hydra instantiates its launcher, sweeper and callbacks, and logging its handlers, by names that any file
    in a `--config-dir` may set. So may it set environment variables, such as PYTHONPATH, by which the next
    process that a job starts would run code.
    """
    for key, value in leaves(OmegaConf.to_container(hydra, resolve=False), "hydra."):
        setting = key.rpartition(".")[2]
        if key.startswith("hydra.job.env_set.") and value != os.environ.get(setting):
            raise ConfigError(f"{key}={value}: is not allowed; set {setting} in the shell")
        logs = "_logging." in key
        names_code = setting == "_target_" or (logs and setting in ("class", "()"))
        if names_code and not str(value).startswith(ALLOWED_TO_HYDRA):
            raise ConfigError(f"{key}={value}: only vitkd's own code and Hydra's plugins are allowed")
        if logs and str(value).startswith(("ext://", "cfg://")) and value not in STREAMS:
            raise ConfigError(f"{key}={value}: choose {' or '.join(STREAMS)}")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The single values in nested mappings and lists, as (`group.key`, value)."""
    for name, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        if isinstance(value, dict | list):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
