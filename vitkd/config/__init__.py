"""The typed configuration of a run, its schema, and what each setting is for.

`vitkd.config.roles` is imported without PyTorch: `vitkd.config.run` is loaded when a name of it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitkd.config.run import CONF_DIR, GROUPS, LONGEST_NAME, Config, Teacher, parse, teacher_run

__all__ = ["CONF_DIR", "GROUPS", "LONGEST_NAME", "Config", "Teacher", "parse", "teacher_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("vitkd.config.run"), name)
