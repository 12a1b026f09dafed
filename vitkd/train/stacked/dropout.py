"""Masks of stacked students that do not depend on who else is in the stack.

Shapes: S stacked students.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor

from vitkd.models.dropout import Masks, quick_mask


def streams_on(device: torch.device, seeds: Sequence[int]) -> "GeneratorStreams | KeyedStreams":
    """The streams of students with `seeds` [S] on `device`."""
    return GeneratorStreams(seeds) if device.type == "cpu" else KeyedStreams(seeds, device)


def has_streams(device: torch.device) -> bool:
    """Whether stacked students can have dropout there: a GPU's kernel needs Triton, which knows no MPS."""
    return device.type == "cpu" or (device.type == "cuda" and find_spec("triton") is not None)


class GeneratorStreams:
    """One generator a student: on the CPU each draws just what it would draw alone, mask for mask.

    Args:
        seeds: [S].
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.step = 0
        self.next_masks = None

    def drop(self, x: Tensor, p: float) -> Tensor:
        """`x` [S, …] with each value zeroed with probability `p`, the others scaled by 1/(1 − p)."""
        return x * quick_mask(x, p, self.generators)

    def state_dict(self) -> dict[str, Any]:
        """Where each stream is, [S, bytes], and the step."""
        states = torch.stack([generator.get_state() for generator in self.generators])
        return {"step": self.step, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; after steps on a GPU, with masks that are independent of those."""
        self.step = state["step"]
        if "states" in state:
            for generator, own in zip(self.generators, state["states"], strict=True):
                generator.set_state(own.clone())

    def next_step(self) -> None:
        """Count the step, for resuming on a GPU: generators advance by themselves."""
        self.step += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Generators cannot be copied, and whoever copies a module (an average of the weights) draws nothing.
        return self


class KeyedStreams:
    """On a GPU: a mask is a function of the student's seed, the step and the place in the model.

    So it is the same in any stack, and a CUDA graph that is replayed draws a new one at every step.

    Args:
        seeds: [S].
        device: where masks are drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._place = 0

    def next_step(self) -> None:
        """Advance to the next step's masks; places are counted from 0 again."""
        self.step += 1
        self._place = 0

    def drop(self, x: Tensor, p: float) -> Tensor:
        """`x` [S, …] with each value zeroed with probability `p`, the others scaled by 1/(1 − p)."""
        # It needs Triton, which comes with PyTorch for GPUs alone.
        from vitkd.models.kernels.philox import dropped

        return dropped(x, self.next_masks(p))

    def next_masks(self, p: float) -> Masks:
        """The masks of the next dropout layer, for a kernel that draws them."""
        self._place += 1
        return Masks(self.seeds, self.step, self._place, p)

    def state_dict(self) -> dict[str, Any]:
        """The step; seeds stand in the runs' configurations."""
        return {"step": int(self.step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.step.fill_(state["step"])
