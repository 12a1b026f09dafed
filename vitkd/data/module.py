"""A data set as Lightning, or a notebook, takes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor

from vitkd.data.loader import Batch, DecodedPixels, Loader, Pixels
from vitkd.data.order import EpochOrder
from vitkd.data.spec import Dataset
from vitkd.data.split import FileSplit, Split, hold_out
from vitkd.errors import ConfigError


class Positioned(Protocol):
    """A loader that can be left at any batch and go on from there."""

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that `state` counts."""


Resumable = TypeVar("Resumable", bound=Positioned)


class ImageDataModule(L.LightningDataModule):
    """Loads a data set once and hands out loaders whose batches lie on the device.

    Without a Trainer: `for image, label, index in ImageDataModule(dataset, "data", seed=0).loader("val")`.
    Where images may be too many for the memory, `contextlib.closing(module)` ends the workers.

    Args:
        dataset: which one.
        root: the folder that holds all data sets.
        seed: of the run; it decides order and views, not which images are for validation.
    """

    def __init__(self, dataset: Dataset, root: str | Path, seed: int) -> None:
        super().__init__()
        self.dataset, self.root, self.seed = dataset, Path(root), seed
        self._splits: Mapping[str, Split | FileSplit] = {}
        self._indices: dict[str, Tensor] = {}
        self._images: dict[str, Tensor] = {}
        self._resident: dict[tuple[str, torch.device], Pixels] = {}
        self._decoded: list[DecodedPixels] = []
        self._train_loader: Positioned | None = None
        self._train_state: dict[str, int] | None = None

    @property
    def class_names(self) -> list[str]:
        """What each label means."""
        self.setup()
        return self._splits["train"].class_names

    def prepare_data(self) -> None:
        """Download what is absent; Lightning calls it in one process a node."""
        if not self._splits:
            self.dataset.inspect(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read the data set, with all images that are to lie in memory; the second call does nothing.

        Raises:
            ConfigError: it cannot be had, or one of those images is damaged.
        """
        if self._splits:
            return
        splits = self.dataset.load(self.root)
        lots = splits["train"].lots(self.dataset.split_seed)
        train, val = hold_out(splits["train"].labels, lots, self.dataset.val_fraction)
        self._images = {name: split.read_all() for name, split in splits.items() if split.resident}
        self._indices = {"train": train, "val": val, "test": torch.arange(len(splits["test"]))}
        if self.dataset.validate_on == "test":
            self._indices["val"] = self._indices["test"]
        for name, indices in self._indices.items():
            if not len(indices) and (name != "val" or self.dataset.validates):
                raise ConfigError(f"dataset={self.dataset.name}: too few images, its {name} split is empty")
        self._splits = splits

    def close(self) -> None:
        """End the workers of every loader handed out; a loader that is used again starts new ones."""
        for decoded in self._decoded:
            decoded.close()

    def teardown(self, stage: str) -> None:
        """As `close`."""
        self.close()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch as it is: it lies on the device already."""
        return batch

    def train_dataloader(self) -> Loader:
        """Shuffled and varied; goes on where `load_state_dict` says."""
        return self.resumable(self.loader("train"))

    def resumable(self, loader: Resumable) -> Resumable:
        """The training loader `loader`, at the place where `load_state_dict` says."""
        self._train_loader = loader
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
        return loader

    def state_dict(self) -> dict[str, int]:
        """How far the training loader is.

        Lightning saves this and the loader's own state, but looks at the loader's only if nobody has asked
        for the number of steps before.
        """
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next training loader go on from `state_dict`."""
        self._train_state = state_dict

    def val_dataloader(self) -> Loader | list[Loader]:
        """In order; an empty list where there is nothing to validate with."""
        self.setup()
        return self.loader("val") if len(self._indices["val"]) else []

    def test_dataloader(self) -> Loader:
        """In order."""
        return self.loader("test")

    def loader(
        self,
        split: str,
        device: torch.device | str | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int | None = None,
    ) -> Loader:
        """A loader of "train", "val" or "test".

        Args:
            split: "train" is shuffled and varied, and drops what does not fill a batch.
            device: where batches lie; by default the Trainer's, or the CPU.
            rank, world_size: this process among how many; by default the Trainer's, or 0 of 1.
            seed: of order and views; by default this module's.
        """
        self.setup()
        trainer, training = self.trainer, split == "train"
        official = self._official(split)
        device = torch.device(device or (trainer.strategy.root_device if trainer else "cpu"))
        pixels = self._pixels(official, device)
        # Workers take plain numbers, and fetching those from the device would wait for it.
        order_device = device if isinstance(pixels, Pixels) else torch.device("cpu")
        order = EpochOrder(
            self._indices[split].to(order_device),
            self.dataset.batch_size if training else self.dataset.eval_batch_size,
            seed=self.seed if seed is None else seed,
            shuffle=training,
            rank=(trainer.global_rank if trainer else 0) if rank is None else rank,
            world_size=(trainer.world_size if trainer else 1) if world_size is None else world_size,
        )
        return Loader(
            pixels,
            self._splits[official].labels.to(device),
            order,
            mean=self.dataset.mean,
            std=self.dataset.std,
            augment=self.dataset.augment if training else None,
        )

    def _official(self, split: str) -> str:
        """Which of the data set's own splits the images of `split` lie in."""
        of_test = split == "test" or (split == "val" and self.dataset.validate_on == "test")
        return "test" if of_test else "train"

    def fixed_views(self, split: str) -> Loader | None:
        """What this process may meet of "train" or "val", once and in order, `eval_batch_size` at a time.

        None where an image does not look the same in every epoch, or has to be decoded for every batch.
        """
        self.setup()
        varied = split == "train" and self.dataset.augment.varies
        if varied or not self._splits[self._official(split)].resident or not len(self._indices[split]):
            return None
        loader = self.loader(split)
        if split == "train":
            # Over the epochs, each process meets every training image.
            loader.sampler = EpochOrder(loader.sampler.index, self.dataset.eval_batch_size)
        return loader

    def first(self, split: str, count: int, seed: int | None = None) -> Batch:
        """The first `count` images that `loader` would give in epoch 0, on the CPU; reads no others."""
        return self.loader(split, "cpu", rank=0, world_size=1, seed=seed).first(count)

    @property
    def is_resident(self) -> bool:
        """Whether all images lie in memory, with no need of workers that decode them."""
        self.setup()
        return all(split.resident for split in self._splits.values())

    def _pixels(self, official: str, device: torch.device) -> Pixels | DecodedPixels:
        split = self._splits[official]
        if isinstance(split, FileSplit) and not split.resident:
            self._decoded.append(DecodedPixels(split, device))
            return self._decoded[-1]
        if (official, device) not in self._resident:
            self._resident[official, device] = Pixels(self._images[official].to(device))
        return self._resident[official, device]
