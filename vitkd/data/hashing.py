"""Random numbers as a pure function: the same inputs give the same bits on every device, in any order.

No generator is used. An image's random numbers depend on (seed, epoch, index) alone: not on its batch, the
number of workers or processes, or other code that draws random numbers. The hash is splitmix64
(Steele, Lea and Flood, 2014), on int64 that wraps around.
"""

import math
from zlib import crc32

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MULTIPLIER_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift; torch's `>>` on int64 copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def fold(key: Tensor, part: Tensor) -> Tensor:
    """A new int64 key: output number `part` of splitmix64 from the state `key`. The two broadcast."""
    bits = key + (part + 1) * _GOLDEN
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def key_of(*parts: int, device: torch.device | str = "cpu") -> Tensor:
    """A 0-dim int64 key from integers such as (seed, epoch), made on `device` without a host sync."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        key = fold(key, torch.full((), part, dtype=torch.int64, device=device))
    return key


def key_named(key: Tensor, name: str) -> Tensor:
    """A key for what `name` says alone, made of `key` without a host sync."""
    return fold(key, torch.full_like(key, crc32(name.encode())))


def random_bits(key: Tensor, index: Tensor, streams: int) -> Tensor:
    """64 independent random bits for every stream and index.

    Args:
        key: 0-dim int64, from `key_of`.
        index: [B] int64.
        streams: how many; a stream's bits do not depend on this number.

    Returns:
        [streams, B] int64.
    """
    stream_keys = fold(key, torch.arange(streams, device=index.device))
    return fold(stream_keys[:, None], index)


def uniform(bits: Tensor) -> Tensor:
    """float32 in [0, 1), from 64 random bits each: a multiple of 2⁻²⁴, which float32 holds exactly."""
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def uniform_int(bits: Tensor, bound: Tensor | int) -> Tensor:
    """int64 in [0, bound), from 64 random bits each; `bound` is at most 2³¹."""
    return (_shift_right(bits, 32) * bound) >> 32


def normal(bits: Tensor) -> Tensor:
    """float32 from the standard normal distribution, two for 64 random bits each: [..., B] → [2, ..., B].

    By Box and Muller (1958), from two uniform numbers of 24 bits.
    """
    radius = torch.sqrt(-2 * torch.log(1 - uniform(bits)))
    angle = 2 * math.pi * uniform(bits << 32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()))
