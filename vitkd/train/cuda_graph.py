"""A whole training step as one CUDA graph: a small model's step takes less time to compute than to launch."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from vitkd.data import Batch
from vitkd.errors import one_line
from vitkd.train.guard import FiniteGuard
from vitkd.train.window import Window

log = logging.getLogger("vitkd")

# Steps before the capture: they let libraries choose kernels and optimisers make their state.
WARM_UP = 3


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it again, on what lies at the same places in memory by now."""


class CaptureError(Exception):
    """A step does what a graph cannot hold: it waits for the device, say."""


class GraphedStep:
    """Takes training steps by replaying one: forward and backward pass, guard, clipping and optimiser.

    The first steps are taken as ever, but on a stream of their own, as a capture wants it. Whatever a step
    reads or leaves (batch, weights, moments, learning rate, sums of figures) keeps its place in memory.
    Steps of several kinds have a graph each.

    Args:
        step: takes one training step on a batch, without waiting for the device.
        capture: records what a function launches, without running it.
        aside: runs a function on a stream of its own.
    """

    def __init__(
        self,
        step: Callable[[Batch], None],
        capture: Callable[[Callable[[], None]], Graph] | None = None,
        aside: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._step, self._capture, self._aside = step, capture or captured, aside or on_a_stream_of_its_own
        self._batch: Batch | None = None
        self._graphs: dict[str, Graph] = {}
        self._warm = Counter[str]()
        self.names: dict[str, list[str]] = {}
        """by kind, the values that a step adds to the meter"""

    def take(self, batch: Batch, kind: str = "") -> bool:
        """Take one step of a kind; whether it was a replay, of which the host has noted nothing.

        Raises CaptureError if there can be no graph; the step was not taken then.
        """
        own = self._held(batch)
        if kind in self._graphs:
            self._graphs[kind].replay()
            return True
        if self._warm[kind] < WARM_UP:
            self._aside(lambda: self._step(own))
            self._warm[kind] += 1
        else:
            self._graphs[kind] = self._captured(own)
            self._graphs[kind].replay()
        return False

    def _held(self, batch: Batch) -> Batch:
        """The batch at the place where graphs read it."""
        if self._batch is None or self._batch.image.shape != batch.image.shape:
            # A batch of another size is rare: the only one of a tiny training set.
            self._batch = Batch(*(part.clone() for part in batch))
            self._graphs.clear()
            self._warm.clear()
        else:
            for place, part in zip(self._batch, batch, strict=True):
                place.copy_(part)
        return self._batch

    def _captured(self, batch: Batch) -> Graph:
        try:
            return self._capture(lambda: self._step(batch))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(one_line(error)) from error


class Graphed(Protocol):
    """A module that takes its steps by a graph."""

    graph: GraphedStep | None
    guard: FiniteGuard
    window: Window

    @property
    def step_kind(self) -> str:
        """What this step computes; each kind has a graph of its own."""

    def whole_step(self, batch: Batch) -> None:
        """Take one step without a graph."""


def take_step(module: Graphed, batch: Batch) -> None:
    """Take a step by the module's graph or, from the first one on that cannot be captured, without."""
    assert module.graph is not None
    meter, kind = module.window.meter, module.step_kind
    counts, names = meter.counts(), module.graph.names
    try:
        if module.graph.take(batch, kind):
            meter.count(names[kind], batch.label.shape[-1])
        names[kind] = meter.names
        return
    except CaptureError as error:
        log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", error)
    # Not within `except`: the error's traceback holds the memory of the failed step.
    module.graph = None
    meter.set_counts(counts)
    module.guard.forget_step()
    module.whole_step(batch)


def captured(work: Callable[[], None]) -> Graph:
    """`work` as a CUDA graph; nothing has run yet."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, one that pins memory for the loader say, may go on.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph


def on_a_stream_of_its_own(work: Callable[[], None]) -> None:
    """Run `work` beside the current stream, which waits for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


class CudaGraphs(Callback):
    """Has a module take its steps by CUDA graph where it can; says why where it cannot."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        reason = why_not(trainer) if device.type == "cuda" else None
        if reason:
            log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", reason)
        can = device.type == "cuda" and not reason
        for optimizer in trainer.optimizers:
            set_capturable(optimizer, can, device)
        if can:
            pl_module.graph = GraphedStep(pl_module.whole_step)  # type: ignore[assignment,arg-type]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # It holds the memory of a whole step.
        pl_module.graph = None  # type: ignore[assignment]

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)


def set_capturable(optimizer: torch.optim.Optimizer, can: bool, device: torch.device) -> None:
    """Have a graph read the learning rate as it is by then, not as it was at the capture; or undo that.

    The settings may be those of a checkpoint, from another device.
    """
    for group in optimizer.param_groups:
        group["capturable"] = can
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if can else rate


def why_not(trainer: L.Trainer) -> str | None:
    """What keeps the steps of a training from being replayed, or None."""
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes exchange gradients"
    if trainer.accumulate_grad_batches > 1:
        return f"a step has {trainer.accumulate_grad_batches} batches (trainer.accumulate_grad_batches)"
    if trainer.precision == "16-mixed":
        return "16-mixed looks at every step's gradients; trainer.precision=bf16-mixed does not"
    if torch.is_anomaly_enabled():
        return "trainer.detect_anomaly looks at every step"
    return None
