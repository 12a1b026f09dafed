"""What a process does about its memory shows in no figure and is never heard of."""

import subprocess
import sys

PROGRAM = """
import gc
gc.disable()
gc.enable = lambda: print("collects again", flush=True)
from vitkd import train
from vitkd.runs.memory import pass_over_what_is_imported

pass_over_what_is_imported()
frozen = gc.get_freeze_count()
cycle = []
cycle.append(cycle)
pass_over_what_is_imported()
assert gc.get_freeze_count() == frozen > 100_000
del cycle
assert gc.collect() > 0
"""


def test_imports_are_passed_over_once_and_the_end_is_silent():
    """Garbage that a second call passed over would stay for good; extensions complain of what stays."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr) == (0, "collects again\n", "")
