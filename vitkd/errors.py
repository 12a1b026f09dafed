"""The exceptions for what a person can mend, each told in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(ValueError):
    """A mistake in a setting, a path or a file.

    Its message is one line: the value found, what is allowed, the fix. The entry points print that line
    and nothing else; it lives here, free of Hydra, so that data and models can raise it in a notebook too.
    """


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a loss that is not finite.

    Its message is one line, as a `ConfigError`'s is; every checkpoint written before is good.
    """


def one_line(error: Exception) -> str:
    """What somebody else's exception says, without line breaks and last full stop; else what it is."""
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def suggest(name: str, known: Iterable[str]) -> str:
    """Words that lead from a mistyped name to the right one."""
    close = get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
