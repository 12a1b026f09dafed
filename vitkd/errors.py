"""User-fixable errors; each message is one line."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType


class ConfigError(ValueError):
    """A mistake in a setting, a path or a file.

    Its message is one line: the value found, what is allowed, the fix. The commands print that line alone. It
    does not depend on Hydra, so data sets and models raise it in a notebook as well.
    """


class MissingPackageError(ConfigError):
    """A package that an extra installs is needed and not there."""


class RunError(RuntimeError):
    """A run that cannot continue: a full disk, a loss that is not finite.

    Its message is one line, as a `ConfigError`'s is; every checkpoint written before is valid.
    """


def check(settings: object, name: str, holds: bool, rule: str) -> None:
    """ConfigError with the value of the setting `name` and its `rule`, unless that `holds`."""
    if not holds:
        raise ConfigError(f"{name}={getattr(settings, name)}: {rule}")


def check_choice(settings: object, name: str, choices: Iterable[str | None]) -> None:
    """ConfigError if the setting `name` is none of `choices`; None is null."""
    allowed = [*choices]
    *others, last = ("null" if choice is None else choice for choice in allowed)
    check(settings, name, getattr(settings, name) in allowed, f"choose {', '.join(others)} or {last}")


def check_positive(settings: object, *names: str) -> None:
    """ConfigError if one of the settings `names` is not a finite number above 0."""
    for name in names:
        check(settings, name, 0 < getattr(settings, name) < math.inf, "must be a finite number above 0")


def check_fraction(settings: object, name: str) -> None:
    """ConfigError if the setting `name` is no share of something, above 0 and at most 1."""
    check(settings, name, 0 < getattr(settings, name) <= 1, "must be above 0 and at most 1")


def check_at_least(least: int, settings: object, *names: str, most: int = 10**9) -> None:
    """ConfigError if one of the settings `names` is below `least`, or above `most`."""
    for name in names:
        check(settings, name, getattr(settings, name) >= least, f"must be at least {least}")
        check(settings, name, getattr(settings, name) <= most, f"must be at most {most:,}")


@contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Let a ConfigError begin with `prefix`: a setting and "=", or its group and "."."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def one_line(error: Exception) -> str:
    """An exception's message without line breaks and final full stop; its type if the message is empty."""
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest known one, or all of them."""
    close = get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def from_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional `extra` installs; MissingPackageError, with the fix, without it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackageError(
            f"{package} cannot be imported ({one_line(error)}): pip install 'vitkd[{extra}]'"
        ) from error
