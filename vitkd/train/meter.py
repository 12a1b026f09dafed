"""Means that stay on the device until somebody reads them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitkd.models.layers import at_least_float32


class Meter:
    """Sums of per-image values over batches; reading costs one host sync, adding none.

    The sums keep their place in memory, so that a CUDA graph can go on with them.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}
        self._stale: set[str] = set()

    def reset(self) -> None:
        """Forget everything."""
        self.images = 0
        self._stale = set(self._sums)
        for total in self._sums.values():
            total.zero_()

    def add(self, means: Mapping[str, Tensor], images: int) -> None:
        """Take in one batch of `images` images: per name its mean over them, any shape."""
        self.images += images
        self._stale -= means.keys()
        for name, mean in means.items():
            value = at_least_float32(mean.detach())
            if name in self._sums:
                self._sums[name].add_(value, alpha=images)
            else:
                self._sums[name] = value * images

    def added_again(self, images: int) -> None:
        """Count one more batch of the last one's kind, whose values a CUDA graph has added."""
        self.images += images
        self._stale.clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything taken in, as plain data and tensors."""
        return {"images": self.images, "sums": self._fresh()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from `state`."""
        self.images = state["images"]
        self._sums = {name: tensor.to(device) for name, tensor in state["sums"].items()}

    def means(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, list[float]]:
        """Per name the means so far, flattened; empty if nothing was added.

        `reduce` sums a tensor over processes, so that uneven shares of images still count exactly.
        """
        sums_by_name = self._fresh()
        if not sums_by_name:
            return {}
        flat = [tensor.flatten() for tensor in sums_by_name.values()]
        count = torch.full((1,), float(self.images), device=flat[0].device)
        images, *sums = reduce(torch.cat([count, *flat])).tolist()
        values = iter(sums)
        return {
            name: [next(values) / images for _ in tensor]
            for name, tensor in zip(sums_by_name, flat, strict=True)
        }

    def _fresh(self) -> dict[str, Tensor]:
        return {name: total for name, total in self._sums.items() if name not in self._stale}
