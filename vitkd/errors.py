"""The one exception for what a person can mend."""


class ConfigError(ValueError):
    """A mistake in a setting, a path or a file.

    Its message is one line: the value found, what is allowed, the fix. The entry points print that line
    and nothing else; it lives here, free of Hydra, so that data and models can raise it in a notebook too.
    """
