"""What a process does about its memory shows in no figure and is never heard of."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
import sys

if sys.argv[1] == "off":
    gc.disable()
import vitkd.train.__main__
from vitkd.process.isolation import freeze_gc

assert gc.isenabled() == (sys.argv[1] == "on")
# Importing as ever makes it look a thousand times.
assert sum(generation["collections"] for generation in gc.get_stats()) < 200
freeze_gc()
frozen = gc.get_freeze_count()
cycle = []
cycle.append(cycle)
freeze_gc()
assert gc.get_freeze_count() == frozen > 100_000
del cycle
assert gc.collect() > 0
"""


@pytest.mark.parametrize("collector", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_imports_are_frozen_once_and_the_exit_is_silent(collector):
    """Garbage that a second call passed over would stay for good; extensions complain of what stays."""
    line = [sys.executable, "-c", PROGRAM, collector]
    done = subprocess.run(line, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
