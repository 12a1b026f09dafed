"""User-fixable errors; each message is one line."""

import math
from collections.abc import Collection, Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A mistake in a setting, a path or a file.

    Its message is one line: the value found, what is allowed, the fix. The commands print that line alone. It
    does not depend on Hydra, so data sets and models raise it in a notebook as well.
    """


class RunError(RuntimeError):
    """A run that cannot continue: a full disk, a loss that is not finite.

    Its message is one line, as a `ConfigError`'s is; every checkpoint written before is valid.
    """


def check_choice(settings: object, name: str, choices: Collection[str]) -> None:
    """ConfigError if the setting `name` is none of `choices`."""
    if getattr(settings, name) not in choices:
        known = " or ".join(choices) if len(choices) < 3 else f"one of {', '.join(choices)}"
        raise ConfigError(f"{name}={getattr(settings, name)}: choose {known}")


def check_positive(settings: object, *names: str) -> None:
    """ConfigError if one of the settings `names` is not a finite number above 0."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be a finite number above 0")


def one_line(error: Exception) -> str:
    """An exception's message without line breaks and final full stop; its type if the message is empty."""
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: the closest known one, or all of them."""
    close = get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
