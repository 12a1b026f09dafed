"""The time between two points of a training curve: what is averaged there, and how long it took."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vitkd.train.meter import Meter


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

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """The curves' means so far; see `Meter.means`."""
        return self.meter.means(reduce)

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
