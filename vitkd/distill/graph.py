"""A whole training step as one CUDA graph: a small model's step takes less time to compute than to launch."""

import logging
from collections.abc import Callable
from typing import Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vitkd.data import Batch

log = logging.getLogger("vitkd")

# Steps before the capture: they let libraries choose kernels and optimisers make their state.
WARM_UP = 3


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it again, on what lies at the same places in memory by now."""


class GraphedStep:
    """Takes training steps by replaying one: forward and backward pass, guard, clipping and optimiser.

    The first steps are taken as ever, but on a stream of their own, as a capture wants it. Whatever a step
    reads or leaves (batch, weights, moments, learning rate, sums of figures) keeps its place in memory.

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
        self._graph: Graph | None = None
        self._warm = 0

    def take(self, batch: Batch) -> bool:
        """Take one step; whether it was a replay, of which the host has noted nothing."""
        if self._batch is None or self._batch.image.shape != batch.image.shape:
            # A batch of another size is rare: the only one of a tiny training set.
            self._batch, self._graph, self._warm = Batch(*(part.clone() for part in batch)), None, 0
        else:
            for place, part in zip(self._batch, batch, strict=True):
                place.copy_(part)
        own = self._batch
        if self._graph is not None:
            self._graph.replay()
            return True
        if self._warm < WARM_UP:
            self._aside(lambda: self._step(own))
            self._warm += 1
        else:
            self._graph = self._capture(lambda: self._step(own))
            self._graph.replay()
        return False


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
        if device.type != "cuda":
            return
        if reason := why_not(trainer):
            log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", reason)
            return
        for optimizer in trainer.optimizers:
            keep_rates_on(device, optimizer)
        pl_module.graph = GraphedStep(pl_module.whole_step)  # type: ignore[assignment,arg-type]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # It holds the memory of a whole step.
        pl_module.graph = None  # type: ignore[assignment]


def keep_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Put learning rates where a graph reads them; those of a checkpoint come back on the CPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(device)


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
