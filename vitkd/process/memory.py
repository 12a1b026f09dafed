"""How this process allocates memory and collects garbage."""

import atexit
import ctypes
import gc
import sys
from functools import cache

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next step needs as much again.

    glibc returns tensors of some megabytes to the system and requests them again, page by zeroed page, at
    every step. Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # Before 2.35 glibc takes no more than 32 MiB.
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


@cache
def freeze_gc() -> None:
    """Exempt what exists at the first call from garbage collection, which takes 0.2 s less each time.

    For programs: objects that a library's caller has made before would stay until the process ends.
    """
    gc.freeze()
    # Extension modules complain at exit about objects that were not collected.
    atexit.register(gc.unfreeze)
