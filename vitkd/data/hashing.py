"""Randomness as a function: the same inputs give the same bits on every device, in any order.

No generator is consulted or advanced. What an image draws depends on (seed, epoch, image index) alone, so
it cannot change with the batch the image falls into, the number of workers or processes, or what else
draws numbers beside it. The mixing is splitmix64's (Steele, Lea and Flood, 2014), on wrapping int64.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's `>>` on int64 drags the sign bit along."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def fold(key: Tensor, part: Tensor) -> Tensor:
    """A new int64 key from `key` and `part`: splitmix64's output `part` from state `key`. They broadcast."""
    return _mix(key + (part + 1) * _GOLDEN)


def key_of(*parts: int, device: torch.device | str = "cpu") -> Tensor:
    """A 0-dim int64 key from whole numbers such as (seed, epoch); made on `device` without a host sync."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        key = fold(key, torch.full((), part, dtype=torch.int64, device=device))
    return key


def random_bits(key: Tensor, index: Tensor, streams: int) -> Tensor:
    """64 independent bits for every stream and index.

    Args:
        key: 0-dim int64, from `key_of`.
        index: [B] int64.

    Returns:
        [streams, B] int64.
    """
    stream_keys = fold(key, torch.arange(streams, device=index.device))
    return fold(stream_keys[:, None], index)


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), on a grid of 2⁻²⁴, so that every value is exact."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def below(bits: Tensor, bound: Tensor | int) -> Tensor:
    """int64 in [0, bound), for a bound of at most 2³¹."""
    return (_shift_right(bits, 32) * bound) >> 32
