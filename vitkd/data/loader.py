"""Batches on the device, from pixels that lie there or from files that workers decode."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vitkd.data.augment import Augment, normalise
from vitkd.data.hashing import key_of
from vitkd.data.order import VIEW, EpochOrder
from vitkd.data.split import FileSplit
from vitkd.errors import ConfigError


class Batch(NamedTuple):
    """Images as a model takes them.

    Args:
        image: [B, C, H, W] float32, normalised, on the device.
        label: [B] int64.
        index: [B] int64, each image's position in its official split.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which no one asks of a batch


class Pixels:
    """Pixels that lie on the device.

    Args:
        images: [N, C, H, W] uint8.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """[B, C, H, W] uint8 for each [B] of `indices`."""
        return map(self.read, indices)

    def read(self, index: Tensor) -> Tensor:
        """[B, C, H, W] uint8 for [B]."""
        return self.images[index]


class DecodedPixels:
    """Pixels that worker processes decode from files, a few batches ahead; the same values as `Pixels`.

    The workers start with the first batch and stay for later epochs, until `close`.

    Args:
        split: the files, and how many workers; with 0 this process decodes.
        device: where batches go.
    """

    def __init__(self, split: FileSplit, device: torch.device) -> None:
        self.split, self.device = split, device
        self._indices: list[list[int]] = []
        self._loader: DataLoader[Tensor | ConfigError] | None = None

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """[B, C, H, W] uint8 for each [B] of `indices`.

        Raises:
            ConfigError: a file is no readable image.
        """
        self._indices[:] = [index.tolist() for index in indices]
        self._loader = self._loader or self._start()
        for pixels in self._loader:
            if isinstance(pixels, ConfigError):
                raise pixels
            yield pixels.to(self.device, non_blocking=True)

    def read(self, index: Tensor) -> Tensor:
        """[B, C, H, W] uint8 for [B], decoded by this process; raises as `batches` does."""
        return self.split.read(index.tolist()).to(self.device)

    def close(self) -> None:
        """End the workers; the next `batches` would start new ones."""
        if self._loader is not None and self._loader._iterator is not None and self.split.workers:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._loader = None

    def _start(self) -> DataLoader[Tensor | ConfigError]:
        # Forking a process that has threads (CUDA, loggers) can deadlock; these workers start clean.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        context.set_forkserver_preload([__name__])  # the imports once, not in each worker
        return DataLoader(
            _WorkerSide(self.split),
            batch_sampler=self._indices,
            collate_fn=_as_it_is,
            num_workers=self.split.workers,
            multiprocessing_context=context if self.split.workers else None,
            worker_init_fn=_end_with_parent,
            persistent_workers=self.split.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it would draw from torch's own otherwise
        )


class _WorkerSide(torch.utils.data.Dataset[Tensor]):
    """Reads a batch; a bad file's error comes back as a value, since raised it would bring its traceback."""

    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __getitems__(self, positions: list[int]) -> Tensor | ConfigError:
        try:
            return self.split.read(positions)
        except ConfigError as error:
            return error


def _as_it_is(pixels: Any) -> Any:
    return pixels


def _end_with_parent(number: int) -> None:
    """See to it that this worker outlives its run by no means; PyTorch watches the fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker calls this"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Loader:
    """Iterates over one epoch's batches; `sampler.set_epoch` says which epoch.

    It can be left at any batch and go on from there: `state_dict` holds the position.

    Args:
        pixels: where images come from.
        labels: [N] int64 of the whole official split, on the device.
        sampler: the order.
        mean, std: one value a channel.
        augment: variation of the images; None for none.
    """

    # Lightning looks for it wherever there is a sampler.
    batch_sampler = None

    def __init__(
        self,
        pixels: Pixels | DecodedPixels,
        labels: Tensor,
        sampler: EpochOrder,
        *,
        mean: list[float],
        std: list[float],
        augment: Augment | None = None,
    ) -> None:
        self.pixels, self.labels, self.sampler, self.augment = pixels, labels, sampler, augment
        self.mean = torch.tensor(mean, device=labels.device)
        self.std = torch.tensor(std, device=labels.device)
        self._given = {"epoch": 0, "position": 0}
        self._resume = {"epoch": -1, "position": 0}

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so all of this waits for the first batch: Lightning makes the iterator of the first
        # epoch, and of a resumed one, before it says which epoch that is.
        epoch, start = self.sampler.epoch, self._take_start()
        indices = self.sampler.batches()[start:]
        key = self._key(epoch)
        for position, (index, pixels) in enumerate(
            zip(indices, self.pixels.batches(indices), strict=True), start + 1
        ):
            self._given = {"epoch": epoch, "position": position}
            yield self._batch(pixels, index, key)

    def first(self, count: int) -> Batch:
        """The first `count` images of the current epoch over all processes, read without workers."""
        index = self.sampler.images()[:count]
        return self._batch(self.pixels.read(index), index, self._key(self.sampler.epoch))

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""
        return dict(self._given)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that `state` counts; any other epoch than its own starts at the front."""
        self._given, self._resume = dict(state), dict(state)

    def _take_start(self) -> int:
        resume, self._resume = self._resume, {"epoch": -1, "position": 0}
        return resume["position"] if resume["epoch"] == self.sampler.epoch else 0

    def _key(self, epoch: int) -> Tensor:
        return key_of(self.sampler.seed, epoch, VIEW, device=self.labels.device)

    def _batch(self, pixels: Tensor, index: Tensor, key: Tensor) -> Batch:
        index = index.to(self.labels.device, non_blocking=True)
        if self.augment is not None:
            pixels = self.augment.vary(pixels, index, key)
        return Batch(normalise(pixels, self.mean, self.std), self.labels[index], index)
