"""How this process asks the system for memory, and looks for what it no longer needs."""

import atexit
import ctypes
import gc
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next step wants as much again.

    glibc hands tensors of some megabytes back and asks for them anew, page by zeroed page, at every step.
    Elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # Before 2.35 glibc takes no more than 32 MiB.
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


def pass_over_what_is_imported() -> None:
    """Spare the garbage collector all that lives by now: a collection takes 0.2 s less.

    For programs: whatever else a caller has made before would stay until the process ends.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        # Extension modules complain at the end of whatever nobody collects.
        atexit.register(gc.unfreeze)
