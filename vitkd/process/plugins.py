"""Installed packages that add options: their entry points in the group `vitkd.plugins`."""

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType

from vitkd.errors import ConfigError, one_line

GROUP = "vitkd.plugins"


@cache
def plugin_modules() -> frozenset[str]:
    """The modules that entry points name; nothing is imported to find them."""
    return frozenset(point.value for point in entry_points(group=GROUP))


def is_plugin(module: str) -> bool:
    """Whether an entry point names the module, or a package that it is in."""
    return any(f"{module}.".startswith(f"{name}.") for name in plugin_modules())


def import_plugin(module: str) -> ModuleType:
    """A module of a plugin; ConfigError if it cannot be imported."""
    assert is_plugin(module), "code that nobody installed is never run"
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module}: cannot be imported ({one_line(error)}); install it again") from error
