"""Means that stay on the device until they are read."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from vitkd.models.output import at_least_float32


class Meter:
    """Sums of per-image values over batches; reading costs one host sync, adding none.

    The sums keep their place in memory, so that a CUDA graph can add to them.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """What was added since the last reset."""
        return [name for name, count in self._counts.items() if count]

    def reset(self) -> None:
        """Forget everything."""
        self.images = 0
        self._counts = dict.fromkeys(self._counts, 0)
        for total in self._sums.values():
            total.zero_()

    def add(self, means: Mapping[str, Tensor], images: int) -> None:
        """Add one batch of `images` images: per name its mean over them, any shape."""
        for name, mean in means.items():
            value = at_least_float32(mean.detach())
            if name in self._sums:
                self._sums[name].add_(value, alpha=images)
            else:
                self._sums[name] = value * images
        self.count(means.keys(), images)

    def count(self, names: Collection[str], images: int) -> None:
        """Count a batch whose values `names` a CUDA graph has added."""
        self.images += images
        for name in names:
            self._counts[name] = self._counts.get(name, 0) + images

    def counts(self) -> tuple[int, dict[str, int]]:
        """What the host knows: how many images, and of how many each value is the sum."""
        return self.images, dict(self._counts)

    def set_counts(self, counts: tuple[int, dict[str, int]]) -> None:
        """Undo the counting of batches since `counts`, which were not taken after all."""
        self.images, self._counts = counts[0], dict(counts[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything added, as plain data and tensors."""
        sums = {name: self._sums[name] for name in self.names}
        return {"images": self.images, "counts": {name: self._counts[name] for name in sums}, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Continue from `state`."""
        self.images, self._counts = state["images"], dict(state["counts"])
        self._sums = {name: tensor.to(device) for name, tensor in state["sums"].items()}

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, list[float]]:
        """Per name the means so far, flattened; empty if nothing was added.

        `reduce` sums a tensor over processes, so that uneven shares of images still count exactly.
        """
        names = self.names
        if not names:
            return {}
        flat = [self._sums[name].flatten() for name in names]
        counts = torch.tensor([float(self._counts[name]) for name in names], device=flat[0].device)
        numbers = iter(reduce(torch.cat([counts, *flat])).tolist())
        images = [next(numbers) for _ in names]
        return {
            name: [next(numbers) / count for _ in tensor]
            for name, count, tensor in zip(names, images, flat, strict=True)
        }
