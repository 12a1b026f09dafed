"""From a node of the configuration to the object it describes, checked against its class."""

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vitkd.errors import ConfigError, suggest


def build(key: str, node: Mapping[str, Any], base: type) -> Any:
    """The object that a group's node describes, an instance of `base`.

    Raises ConfigError if `_target_` is not a class of vitkd's of that kind, or a setting does not fit it.
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
        is_kind = inspect.isclass(found) and issubclass(found, base) and not inspect.isabstract(found)
        if is_kind and found.__module__.startswith("vitkd."):
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
        raise ConfigError(f"{prefix}{error.full_key}: is missing, and nothing can do without it") from error
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def type_of(cls: type, name: str) -> str:
    """The type of a dataclass's field, in a person's words."""
    kind = get_type_hints(cls)[name]
    text = kind.__name__ if inspect.isclass(kind) and not get_args(kind) else str(kind)
    for code, words in {"None": "null", "float": "a number", "int": "a whole number", "str": "text"}.items():
        text = re.sub(rf"\b{code}\b", words, text)
    return text.replace(" | ", " or ")
