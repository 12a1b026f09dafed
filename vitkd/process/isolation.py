"""The process's memory, and jobs in it: each starts from the state in which the process itself started."""

import atexit
import ctypes
import gc
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NoReturn

import numpy as np
import torch

from vitkd.errors import RunError
from vitkd.process.signals import set_signal_handlers, signal_handlers

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

_device_lost: list[str] = []
"""Why this process cannot use its GPU any more."""


@contextmanager
def isolated() -> Iterator[None]:
    """Run a job, then restore what it, Lightning or a user's class changed in the process.

    As a decorator, `@isolated()`, it also frees what the job's variables held. What a library reads only once
    a process stays as the first job set it: cuBLAS and CUBLAS_WORKSPACE_CONFIG.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(free_memory)
        for owner, name in FLAGS:
            stack.callback(setattr, owner, name, getattr(owner, name))
        for read, write in SETTINGS:
            stack.callback(write, read())
        yield


def set_environment(variables: Mapping[str, str]) -> None:
    """Make `variables` the whole environment."""
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Set how exact products and convolutions of float32 are: "highest", "high" or "medium".

    "auto" is "high" on an NVIDIA GPU, whose products of small factors are several times faster then.
    """
    if precision == "auto":
        precision = "high" if device.type == "cuda" else "highest"
    torch.set_float32_matmul_precision(precision)
    # By default cuDNN rounds to TF32 whatever is set for products.
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    # Its attention makes a plan for every shape, which small models do not earn back.
    torch.backends.cuda.enable_cudnn_sdp(False)


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


def free_memory() -> None:
    """Free what the job held: images, models, a GPU's memory."""
    # A Trainer, its module and its data refer to each other: without this, those of several jobs pile up.
    gc.collect()
    if torch.cuda.is_initialized() and not _device_lost:
        torch.cuda.empty_cache()


def lose_device(reason: str) -> NoReturn:
    """Raise a RunError: this process cannot use its GPU any more, nor can its later jobs."""
    _device_lost.append(reason)
    raise RunError(reason)


def check_device(device: torch.device) -> None:
    """RunError if this process cannot use `device` any more."""
    if device.type == "cuda" and _device_lost:
        raise RunError(f"an earlier job of this process has lost the GPU: {_device_lost[0]}")


# For mypy these are modules; in fact they are objects with properties.
backends: Any = torch.backends
# Restored after SETTINGS, from the last to the first: the older TF32 settings (the precision of matrix
# products, `allow_tf32`) change `fp32_precision` as well.
FLAGS: tuple[tuple[Any, str], ...] = (
    *((backend, "fp32_precision") for backend in (backends, backends.cudnn, backends.cuda.matmul)),
    *((getattr(backends.mkldnn, op), "fp32_precision") for op in ("matmul", "conv", "rnn")),
    *((backends.cudnn, name) for name in ("allow_tf32", "benchmark", "deterministic")),
    (torch.utils.deterministic, "fill_uninitialized_memory"),
)
# Not PyTorch's generators of other devices: `seed_generators` seeds those again in every job.
SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp),
    (torch.get_rng_state, torch.set_rng_state),
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
    (lambda: dict(os.environ), set_environment),
    (signal_handlers, set_signal_handlers),
)
