"""Triton kernels behind the layers' own functions, which are their reference and stand in for them elsewhere.

Files in here other than this one need Triton, which comes with PyTorch for GPUs alone.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Of float64 there is no kernel: whoever computes in it wants the plain path.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS, MOST_HEAD_DIM = 32, 64
"""Of more a head does not stay on the chip; PyTorch's own attention is made for those."""

MOST_COLUMNS = 1024
"""Of more a row to be normalised does not."""

_allowed = False


def allow_kernels(choice: str) -> None:
    """Use kernels where they can be (`auto`), or nowhere in this process (`off`)."""
    global _allowed
    _allowed = choice == "auto"


def can_compute(x: Tensor) -> bool:
    """Whether kernels may be used on `x`. torch.compile makes its own, of the plain path."""
    if torch.compiler.is_compiling() or not _allowed:
        return False
    return x.is_cuda and x.dtype in DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
