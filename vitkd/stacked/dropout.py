"""Masks of stacked students that do not depend on who else is in the stack.

Shapes: S stacked students.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor


class GeneratorStreams:
    """One generator a student: on the CPU each draws just what it would draw alone, mask for mask.

    Args:
        seeds: [S].
        device: where masks are drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def drop(self, x: Tensor, p: float) -> Tensor:
        """`x` [S, …] with each value zeroed with probability `p`, the others scaled by 1/(1 − p)."""
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        for own, generator in zip(mask, self.generators, strict=True):
            own.bernoulli_(1 - p, generator=generator)
        return x * mask.div_(1 - p)

    def state_dict(self) -> dict[str, Any]:
        """Where each stream is: [S, bytes]."""
        return {"states": torch.stack([generator.get_state() for generator in self.generators])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for generator, own in zip(self.generators, state["states"], strict=True):
            generator.set_state(own.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Generators cannot be copied, and whoever copies a module (an average of the weights) draws nothing.
        return self
