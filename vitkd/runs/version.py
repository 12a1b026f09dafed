"""Which version of vitkd made a run folder: no other reads it.

Nothing here imports PyTorch, for the report asks too.
"""

from collections.abc import Mapping
from typing import Any

import vitkd

KEY = "version"


def stamped(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration as its folder holds it, with the version that made it."""
    return {KEY: vitkd.__version__, **config}


def version_problem(config: Mapping[str, Any]) -> str | None:
    """Why the run of a stamped configuration cannot be read, or None if this version made it."""
    made_by = config.get(KEY)
    if made_by == vitkd.__version__:
        return None
    if made_by is None:
        return f"made by a vitkd that left no version, this is {vitkd.__version__}; train it again to read it"
    made_by = " ".join(str(made_by).split())[:20]
    return f"made by vitkd {made_by}, this is {vitkd.__version__}; install that version to read it"
