"""What curves are made of: means that stay on the device until they are read, and windows of steps."""

import time
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


class Window:
    """The training curves since they were last logged, and the throughput, without time for validation."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.images_trained, self.seconds_trained = 0, 0.0
        self._start, self._seconds_before = 0.0, 0.0
        self._norms: dict[str, Tensor] = {}

    def start(self) -> None:
        """Time runs from now."""
        self._start = time.perf_counter()

    def start_epoch(self) -> None:
        """Time runs from now, and what was measured of the window before does not count."""
        self._start, self._seconds_before = time.perf_counter(), 0.0

    def keep_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Keep a logged step's gradient norms, as copies: the next replay of a graph overwrites them."""
        self._norms = {name: norm.clone() for name, norm in norms.items()}

    def take_norms(self) -> dict[str, Tensor]:
        """The gradient norms of the last logged step, once."""
        norms, self._norms = self._norms, {}
        return norms

    def close(self, processes: int) -> float:
        """End the window, and begin the next; returns images per second over all processes."""
        now = time.perf_counter()
        seconds = self._seconds_before + now - self._start
        images = self.meter.images * processes
        self.images_trained += images
        self.seconds_trained += seconds
        self.meter.reset()
        self._start, self._seconds_before = now, 0.0
        return images / seconds

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data and tensors."""
        return {
            "meter": self.meter.state_dict(),
            "seconds": self._seconds_before + time.perf_counter() - self._start,
            "images_trained": self.images_trained,
            "seconds_trained": self.seconds_trained,
            "gradient_norms": dict(self._norms),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str) -> None:
        """Continue from `state`."""
        self.meter.load_state_dict(state["meter"], device)
        self._seconds_before = state["seconds"]
        self.images_trained, self.seconds_trained = state["images_trained"], state["seconds_trained"]
        self._norms = {name: norm.to(device) for name, norm in state["gradient_norms"].items()}
