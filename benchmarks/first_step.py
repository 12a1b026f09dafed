"""`python -m vitkd.train` up to its student's first training step: prints two times, then is gone.

The times are `time.monotonic()` when everything is imported and when the step's loss is computed, one a line.
The teacher has to be there already.
"""

import os
import time
from typing import Any

from vitkd.train import __main__
from vitkd.train.module import DistillModule

IMPORTED = time.monotonic()


def stop_at_first_step() -> None:
    """Make the first training step of a distilled student the last thing that happens."""
    step = DistillModule.training_step

    def first(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        print(f"{IMPORTED}\n{time.monotonic()}", flush=True)
        os._exit(0)

    DistillModule.training_step = first  # type: ignore[assignment]


if __name__ == "__main__":
    stop_at_first_step()
    __main__.main()
