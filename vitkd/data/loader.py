"""Which images make up a batch, and batches on the device: from pixels stored there or decoded by workers."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from vitkd.data.augment.view import Augment
from vitkd.data.batch import Batch
from vitkd.data.hashing import fold, key_of
from vitkd.data.levels import normalise
from vitkd.data.mix import Mixer
from vitkd.data.split import FileSplit
from vitkd.errors import ConfigError
from vitkd.process.signals import hidden_from_children

# All of these depend on the same (seed, epoch); these give them different keys.
ORDER, VIEW, NEGATIVES, MIX = range(4)
# A view's number is its image's index, and this much more for each view of the image before it in the epoch.
NEXT_VIEW = 2**32
# Of views that are computed at once: a batch's take longer to launch than to compute. A CPU's cache is small.
BYTES_AT_ONCE, BYTES_ON_CPU = 2**28, 2**22


class Pixels:
    """Pixels stored on the device.

    Args:
        images: [N, C, H, W] uint8.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images at each [B] int64 of `indices`: [B, C, H, W] uint8."""
        return map(self.read, indices)

    def read(self, index: Tensor) -> Tensor:
        """The images at `index` ([B] int64): [B, C, H, W] uint8."""
        return self.images[index]


class DecodedPixels:
    """Pixels that worker processes decode from files, a few batches ahead; the same values as `Pixels`.

    The workers start with the first batch, and are kept for later epochs until `close`.

    Args:
        split: the files, and the number of workers; with 0 this process decodes.
        device: of the batches.
    """

    def __init__(self, split: FileSplit, device: torch.device) -> None:
        self.split, self.device = split, device
        self._indices: list[list[int]] = []
        self._loader: DataLoader[Tensor | ConfigError] | None = None

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images at each [B] int64 of `indices`: [B, C, H, W] uint8; raises as `FileSplit.read` does."""
        self._indices[:] = [index.tolist() for index in indices]
        self._loader = self._loader or self._start()
        for pixels in self._loader:
            if isinstance(pixels, ConfigError):
                raise pixels
            yield pixels.to(self.device, non_blocking=True)

    def read(self, index: Tensor) -> Tensor:
        """The images at `index` ([B] int64), decoded by this process: [B, C, H, W] uint8; raises likewise."""
        return self.split.read(index.tolist()).to(self.device)

    def close(self) -> None:
        """Stop the workers; the next call of `batches` starts new ones."""
        if self._loader is not None and self._loader._iterator is not None and self.split.workers:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
        self._loader = None

    def _start(self) -> DataLoader[Tensor | ConfigError]:
        # Forking a process that has threads (CUDA, loggers) can deadlock, so workers start as new processes.
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        context.set_forkserver_preload([__name__])  # imports once, not in each worker
        if "forkserver" in methods and self.split.workers:
            from multiprocessing import forkserver

            with hidden_from_children():  # a worker that ends would end the run before it has saved
                forkserver.ensure_running()
        return DataLoader(
            _BatchReader(self.split),
            batch_sampler=self._indices,
            collate_fn=default_convert,
            num_workers=self.split.workers,
            multiprocessing_context=context if self.split.workers else None,
            worker_init_fn=_exit_with_parent,
            persistent_workers=self.split.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it advances torch's global generator
        )


class _BatchReader(torch.utils.data.Dataset[Tensor]):
    """Reads a batch in a worker. An error is returned: raised, its message would include a traceback."""

    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __getitems__(self, positions: list[int]) -> Tensor | ConfigError:
        try:
            return self.split.read(positions)
        except ConfigError as error:
            return error


def _exit_with_parent(worker: int) -> None:
    """Exit when the training process ends; PyTorch's own check watches the fork server instead."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker only"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class EpochOrder:
    """The batches of one process, as numbers of views; Lightning finds it as `loader.sampler`.

    With `shuffle` (training), a global batch (`batch_size` × `world_size` images) is a slice of the epoch's
    permutation, which depends on (seed, epoch) alone, and each process takes its part of it: two processes
    together see exactly what one process with twice the batch size sees. An incomplete last batch is
    dropped, so that all batches have one shape, unless it is the only one. Without `shuffle` (evaluation),
    every image appears once over all processes, and batch sizes differ by at most one.

    An epoch has `passes`·N views. Each image comes `repeats` times in a row, then the next of the
    permutation, and another permutation where one is used up.

    Args:
        index: [N] int64, the image indices, on the device where the order is computed.
        batch_size: images a batch, in this process.
        seed: of the permutation.
        shuffle: whether to permute the images in each epoch.
        rank, world_size: this process's number, and the number of processes.
        passes: how many views there are for each image.
        repeats: how many views of an image are side by side.

    Raises:
        ConfigError: fewer images than processes.
    """

    def __init__(
        self,
        index: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        passes: int = 1,
        repeats: int = 1,
    ) -> None:
        if len(index) < world_size:
            raise ConfigError(
                f"a split of {len(index)} images cannot serve {world_size} process(es); add images or use"
                " fewer devices"
            )
        self.index, self.batch_size, self.seed, self.shuffle = index, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.passes, self.repeats = passes, repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        global_batch = self.batch_size * self.world_size
        full, rest = divmod(len(self.index) * self.passes, global_batch)
        return max(full, 1) if self.shuffle else full + bool(rest)

    def batches(self) -> tuple[Tensor, ...]:
        """The views, see `NEXT_VIEW`, of this process's batches of the current epoch, each [B] int64."""
        views = self.epoch_views()
        kept = len(self) * self.world_size * self.batch_size
        views = views[:kept] if self.shuffle else views
        return views.tensor_split(len(self) * self.world_size)[self.rank :: self.world_size]

    def epoch_views(self) -> Tensor:
        """The views of the current epoch, over all processes: [N·passes] int64."""
        rounds = -(-self.passes // self.repeats)
        firsts = torch.cat([self.epoch_index(number) for number in range(rounds)])
        repeats = torch.arange(self.repeats, device=firsts.device) * NEXT_VIEW
        return (firsts[:, None] + repeats).flatten()[: self.passes * len(self.index)]

    def epoch_index(self, number: int = 0) -> Tensor:
        """All images in the order of the current epoch's permutation `number`, over all processes: [N] int64.

        They are first views, which in the first permutation are the images' indices.
        """
        views = self.index + number * self.repeats * NEXT_VIEW
        if not self.shuffle:
            return views
        key = key_of(self.seed, self.epoch, ORDER, device=self.index.device)
        return views[fold(key, views).argsort(stable=True)]


class Loader:
    """Iterates over the batches of one epoch, which `sampler.set_epoch` sets.

    It can resume at any batch; `state_dict` has the position.

    Args:
        pixels: the images.
        labels: [N] int64 of the whole official split, on the device.
        sampler: the order of the images.
        mean, std: one value a channel, of pixels in 0..1.
        augment: random augmentation; None for none.
        mixer: mixes images; None for none.
    """

    # Lightning reads this attribute of every loader with a sampler.
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
        mixer: Mixer | None = None,
    ) -> None:
        self.pixels, self.labels, self.sampler, self.augment = pixels, labels, sampler, augment
        self.mixer = mixer
        self.mean = torch.tensor(mean, device=labels.device)
        self.std = torch.tensor(std, device=labels.device)
        self.batches_at_once = self._batches_that_fit(BYTES_AT_ONCE if labels.is_cuda else BYTES_ON_CPU)
        """of how many batches the views are computed together, if the pixels are on the device"""
        self._position = {"epoch": 0, "position": 0}
        self._resume = {"epoch": -1, "position": 0}

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so this runs at the first batch: Lightning makes the iterator of the first epoch, and
        # of a resumed one, before it sets the epoch.
        epoch = self.sampler.epoch
        start = self._resume["position"] if self._resume["epoch"] == epoch else 0
        self._resume = {"epoch": -1, "position": 0}
        batches = self.sampler.batches()[start:]
        mix = self.mixer.epoch(self._key(epoch, MIX), len(self)) if self.mixer else None
        for step, views in enumerate(self._views(batches, self._key(epoch, VIEW)), start):
            self._position = {"epoch": epoch, "position": step + 1}
            batch = views._replace(image=normalise(views.image, self.mean, self.std))
            yield mix(batch, step) if mix else batch

    def first(self, count: int) -> Batch:
        """The first `count` images of the current epoch over all processes, each once and none mixed.

        They are decoded without workers.
        """
        index = self.sampler.epoch_index()[:count]
        views = self._augmented(self.pixels.read(index), index, self._key(self.sampler.epoch, VIEW))
        return views._replace(image=normalise(views.image, self.mean, self.std))

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were yielded."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the batches counted in `state`; other epochs than its own start at the first batch."""
        self._position, self._resume = dict(state), dict(state)

    def _key(self, epoch: int, purpose: int) -> Tensor:
        return key_of(self.sampler.seed, epoch, purpose, device=self.labels.device)

    def _views(self, batches: Sequence[Tensor], key: Tensor) -> Iterator[Batch]:
        """The batches of the views [B] int64 each, before they are normalised."""
        if not isinstance(self.pixels, Pixels):
            images = [views % NEXT_VIEW for views in batches]
            for views, pixels in zip(batches, self.pixels.batches(images), strict=True):
                yield self._augmented(pixels, views, key)
            return
        for first in range(0, len(batches), self.batches_at_once):
            group = batches[first : first + self.batches_at_once]
            views = torch.cat([*group])
            together = self._augmented(self.pixels.read(views % NEXT_VIEW), views, key)
            sizes = [len(views) for views in group]
            yield from map(Batch, *(part.split(sizes) for part in together[:3]))

    def _augmented(self, pixels: Tensor, views: Tensor, key: Tensor) -> Batch:
        views = views.to(self.labels.device, non_blocking=True)
        if self.augment is not None:
            pixels = self.augment.apply(pixels, views, key)
        index = views % NEXT_VIEW
        return Batch(pixels, self.labels[index], index)

    def _batches_that_fit(self, at_once: int) -> int:
        if not isinstance(self.pixels, Pixels):
            return 1
        # In float32, as resized views are.
        size = 4 * self.pixels.images[0].numel() * self.sampler.batch_size
        return max(at_once // size, 1)
