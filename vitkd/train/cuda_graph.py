"""A whole training step as one CUDA graph: a small model's step takes less time to compute than to launch."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from vitkd.data import Batch
from vitkd.errors import RunError, one_line
from vitkd.process import isolation

log = logging.getLogger("vitkd")

# Steps before the capture: they let libraries choose kernels and optimisers make their state.
WARM_UP = 3
# PyTorch before 2.12 keeps its allocator and its generator as they are in a capture, if that fails.
CAN_CONTINUE = torch.__version__ >= "2.12"


class CaptureError(Exception):
    """A step does what a graph cannot hold: it waits for the device, say."""


class GraphedStep:
    """Takes training steps by replaying one: forward and backward pass, guard, clipping and optimiser.

    The first steps are taken without a graph, but on a stream of their own, as a capture wants it. Whatever a
    step reads or leaves (batch, weights, moments, learning rate, sums for the curves) keeps its place in
    memory. Steps of several kinds have a graph each.

    Args:
        step: takes one training step on a batch, without waiting for the device.
        capture: records what a function launches, without running it; by default on a `SideStream`.
        aside: runs a function on a stream of its own; by default on the same.
    """

    def __init__(
        self,
        step: Callable[[Batch], None],
        capture: Callable[[Callable[[], None]], torch.cuda.CUDAGraph] | None = None,
        aside: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        if capture is None or aside is None:
            side = SideStream()
            capture, aside = side.capture, side.run
        self._step, self._capture, self._aside = step, capture, aside
        self._batch: Batch | None = None
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._warm = Counter[str]()
        self.names: dict[str, list[str]] = {}
        """by kind, the values that a step adds to the meter"""

    def take(self, batch: Batch, kind: str = "") -> bool:
        """Take one step of a kind; whether it was a replay, of which the host has noted nothing.

        Raises CaptureError if there can be no graph; the step was not taken then. RunError if PyTorch cannot
        use the device after that.
        """
        own = self._held(batch)
        if kind in self._graphs:
            self._graphs[kind].replay()
            return True
        if self._warm[kind] < WARM_UP:
            self._aside(lambda: self._step(own))
            self._warm[kind] += 1
        else:
            try:
                self._graphs[kind] = self._capture(lambda: self._step(own))
            except RunError:
                raise
            except RuntimeError as error:
                cause = first_cause(error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise CaptureError(one_line(cause)) from error
            self._graphs[kind].replay()
        return False

    def _held(self, batch: Batch) -> Batch:
        """The batch at the place where graphs read it."""
        if self._batch is None or self._batch.image.shape != batch.image.shape:
            # A batch of another size is rare: the only one of a tiny training set.
            self._batch = batch.map(torch.clone)
            self._graphs.clear()
            self._warm.clear()
        else:
            for place, part in zip(self._batch, batch, strict=True):
                if place is not None and part is not None:
                    place.copy_(part)
        return self._batch


def take_step(module: Any, graph: GraphedStep, batch: Batch) -> None:
    """Take a `DistillModule`'s step by `graph` or, from the first one that cannot be captured on, without."""
    meter, kind = module.window.meter, module.step_kind
    counts = meter.counts()
    try:
        if graph.take(batch, kind):
            meter.count(graph.names[kind], batch.label.shape[-1])
        graph.names[kind] = meter.names
        return
    except CaptureError as error:
        log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", error)
    # Not within `except`: the error's traceback holds the memory of the failed step.
    module.graph = None
    meter.set_counts(counts)
    module.guard.forget_step()
    module.whole_step(batch)


class SideStream:
    """A stream of its own for first steps and captures, and one pool of memory for all graphs captured there.

    One of each: the allocator keeps a whole step's memory for every stream and every pool.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], None]) -> None:
        """Run `work` beside the current stream, which waits for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`work` as a CUDA graph; nothing has run yet."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, one that pins memory for the loader say, may continue.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            if CAN_CONTINUE:
                raise
            isolation.lose_device(
                f"a training step cannot be captured as a CUDA graph ({one_line(first_cause(error))}), and "
                f"PyTorch {torch.__version__} cannot use the GPU after that; add cuda_graph=off"
            )
        return graph


def first_cause(error: Exception) -> Exception:
    """The error that others followed from: the end of a broken capture is reported as one of its own."""
    while isinstance(before := error.__cause__ or error.__context__, Exception):
        error = before
    return error
