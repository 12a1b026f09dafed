"""Batches for students of several seeds: each seed its own order and views, all from the same pixels.

Shapes: U data orders, B batch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vitkd.data import Batch, Dataset, ImageDataModule, Loader, join


class StackedImages(ImageDataModule):
    """As `ImageDataModule`, for runs of several seeds at once.

    Args:
        dataset: which one.
        root: the folder that holds all data sets.
        seeds: [U], of the orders; a training batch is [U, B, …], or [B, …] where there is only one.
    """

    def __init__(self, dataset: Dataset, root: str | Path, seeds: Sequence[int]) -> None:
        super().__init__(dataset, root, seeds[0])
        self.seeds = list(seeds)

    def train_dataloader(self) -> "Loader | StackedLoader":  # type: ignore[override]
        if len(self.seeds) == 1:
            return super().train_dataloader()
        return self.resumable(StackedLoader([self.loader("train", seed=seed) for seed in self.seeds]))


class StackedLoader:
    """Several loaders of one length, batch beside batch."""

    # Lightning looks for it wherever there is a sampler.
    batch_sampler = None

    def __init__(self, loaders: Sequence[Loader]) -> None:
        self.loaders = loaders

    @property
    def sampler(self) -> "StackedLoader":
        """Lightning asks it for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        for loader in self.loaders:
            loader.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[Batch]:
        for batches in zip(*self.loaders, strict=True):
            yield join(batches)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were taken."""
        return self.loaders[0].state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` counts."""
        for loader in self.loaders:
            loader.load_state_dict(state)
