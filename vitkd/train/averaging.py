"""An exponential moving average of the weights, taken within the training step."""

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn

from vitkd.train.module import DistillModule


class WarmAverage(WeightAveraging):
    """Validates and keeps an exponential moving average of the weights, whose decay grows up to `decay`.

    After `count` averaged steps it is min(decay, (1 + count) / (10 + count)), as in TensorFlow's
    ExponentialMovingAverage: with a constant decay a short run would keep most of its first, random weights.
    Nothing in it waits for the device, so that a CUDA graph of the step holds it too.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        cast(DistillModule, pl_module).average = self.update

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Nothing: the step itself has averaged."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        cast(DistillModule, pl_module).average = None

    @torch.no_grad()
    def update(self, module: L.LightningModule) -> None:
        """Move the average towards the weights of `module`; the first time it becomes these."""
        average = self._average_model
        assert average is not None, "set up by Lightning"
        count = average.n_averaged
        kept = torch.where(count == 0, 0.0, ((1 + count) / (10 + count)).clamp(max=self.decay))
        pairs = [
            # Under 64-true or bf16-true the module got another precision after the average was made.
            (own, new.to(own.dtype))
            for own, new in zip(tensors_of(average.module), tensors_of(module), strict=True)
            if own is not new  # a bank, which both share
        ]
        for dtype in {own.dtype for own, _ in pairs}:
            own, new = map(list, zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True))
            if dtype.is_floating_point:
                move(own, new, kept.to(dtype))
            else:
                torch._foreach_copy_(own, new)  # batch normalisation counts its batches
        count.add_(1)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All that is averaged."""
    return chain(module.parameters(), module.buffers())


def move(averaged: list[Tensor], current: list[Tensor], kept: Tensor) -> None:
    """kept · averaged + (1 − kept) · current, in place, in a few kernels whatever the number of tensors."""
    torch._foreach_mul_(averaged, kept)
    torch._foreach_add_(averaged, torch._foreach_mul(current, 1 - kept))
