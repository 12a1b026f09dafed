"""The loaders of a data set, for Lightning or a notebook."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor

from vitkd.data.batch import Batch
from vitkd.data.contents import FileHashes
from vitkd.data.file_notes import duplicates, skipped, summary
from vitkd.data.loader import DecodedPixels, EpochOrder, Loader, Pixels
from vitkd.data.mix import Mixer
from vitkd.data.spec import Dataset
from vitkd.data.split import FileSplit, Split, hold_out, share_of_each_class
from vitkd.errors import ConfigError


class StatefulLoader(Protocol):
    """A loader that can resume at any batch."""

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were yielded."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the batches counted in `state`."""


AnyLoader = TypeVar("AnyLoader", bound=StatefulLoader)

REPEATS = 20
"""How often an epoch shows the images of `one_batch`."""


class ImageDataModule(L.LightningDataModule):
    """Loads a data set once, and makes loaders whose batches are on the device.

    Without a Trainer: `for batch in ImageDataModule(dataset, "data", seed=0).loader("val")`.
    If images may exceed the memory limit, `contextlib.closing(module)` stops the workers.

    Args:
        dataset: the data set.
        root: the folder with all data sets.
        seed: of the order and the augmentation; `dataset.split_seed` chooses the validation images.
        one_batch: train on one and the same batch of images, REPEATS times an epoch, to see whether a model
            learns them.
    """

    def __init__(self, dataset: Dataset, root: str | Path, seed: int, one_batch: bool = False) -> None:
        super().__init__()
        self.dataset, self.root, self.seed, self.one_batch = dataset, Path(root), seed, one_batch
        self._splits: Mapping[str, Split | FileSplit] = {}
        self._not_held_out = torch.empty(0, dtype=torch.int64)
        self._indices: dict[str, Tensor] = {}
        self._images: dict[str, Tensor] = {}
        self._resident: dict[tuple[str, torch.device], Pixels] = {}
        self._decoded: list[DecodedPixels] = []
        self._train_loader: StatefulLoader | None = None
        self._train_state: dict[str, int] | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of each class, by label."""
        self.setup()
        return self._splits["train"].class_names

    @property
    def num_images(self) -> int:
        """Images of the official training split, validation's included: a batch's `index` counts in it."""
        self.setup()
        return len(self._splits["train"])

    def training_labels(self) -> tuple[Tensor, Tensor]:
        """The training images' positions in their official split, each once, and their labels: [N] int64."""
        self._divide()
        positions = self._indices["train"].unique()
        return positions, self._splits["train"].labels[positions]

    @property
    def counts(self) -> dict[str, int]:
        """Images in "train", "val" and "test"."""
        self.setup()
        return {name: len(indices) for name, indices in self._indices.items()}

    def prepare_data(self) -> None:
        """Download the data if it is absent; Lightning calls this in one process a node."""
        if not self._splits:
            self.dataset.inspect(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Load the data set, including all images to keep in memory; further calls do nothing.

        Raises:
            ConfigError: the data is unavailable, an image is damaged, or a split is empty.
        """
        self._divide()
        if not self._images:
            self._images = {name: split.read_all() for name, split in self._splits.items() if split.resident}

    def _divide(self) -> None:
        """Find the images of "train", "val" and "test"; none is read from a file."""
        if self._splits:
            return
        splits = self.dataset.load(self.root)
        keys = splits["train"].random_keys(self.dataset.split_seed)
        fraction = 0 if "val" in splits else self.dataset.val_fraction
        self._not_held_out, val = hold_out(splits["train"].labels, keys, fraction)
        train = _share(splits["train"], self._not_held_out, self.dataset, self.dataset.train_fraction)
        if self.one_batch:
            train = train[keys[train].argsort()[: self.dataset.batch_size]].repeat(REPEATS)
        self._indices = {"train": train, "val": val, "test": torch.arange(len(splits["test"]))}
        if self.dataset.validate_on == "test":
            self._indices["val"] = self._indices["test"]
        elif "val" in splits:
            self._indices["val"] = torch.arange(len(splits["val"]))
        for name, indices in self._indices.items():
            if not len(indices) and (name != "val" or self.dataset.validates):
                raise ConfigError(f"dataset={self.dataset.name}: its {name} split is empty; add images")
        self._splits = splits

    def training_images(self, fraction: float) -> Tensor:
        """The positions of the training images with another `dataset.train_fraction`: [N] int64, sorted."""
        self._divide()
        return _share(self._splits["train"], self._not_held_out, self.dataset, fraction)

    def notes(self, known: FileHashes | None = None) -> list[str]:
        """Lines on the image files: how many are in which split, and what is odd; raises as `setup`.

        Files whose hash is `known` are not read.
        """
        self._divide()
        files = {
            name: official.subset(indices)
            for name, indices in (self._indices | {"train": self._not_held_out}).items()
            if isinstance(official := self._splits[self._official(name)], FileSplit)
        }
        on_files = self._notes_on_files(files, known or {}) if files else []
        if (fraction := self.dataset.train_fraction) == 1:
            return on_files
        counts = f"{len(self._indices['train']):,} of {len(self._not_held_out):,} training images"
        return [*on_files, f"train_fraction={fraction:g}: {counts}, the same share of each class"]

    def _notes_on_files(self, files: Mapping[str, FileSplit], known: FileHashes) -> list[str]:
        if published := self.dataset.published_classes:
            return [summary(files, published)]
        return [f"{summary(files)}{skipped(files)}", *duplicates(files, known)]

    def close(self) -> None:
        """Stop the workers of all loaders; a loader that is used again starts new ones."""
        for decoded in self._decoded:
            decoded.close()

    def teardown(self, stage: str) -> None:
        """As `close`."""
        self.close()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch, unchanged: it is already on the device."""
        return batch

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented; resumes at the position set by `load_state_dict`."""
        return self.resumable(self.loader("train"))

    def resumable(self, loader: AnyLoader) -> AnyLoader:
        """Make `loader` the training loader, at the position set by `load_state_dict`."""
        self._train_loader = loader
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
        return loader

    def state_dict(self) -> dict[str, int]:
        """The position of the training loader.

        Lightning saves the loader's own state as well, but restores that only if the number of steps has not
        been read before.
        """
        return self._train_loader.state_dict() if self._train_loader else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Set the position at which the next training loader resumes."""
        self._train_state = state_dict

    def val_dataloader(self) -> Loader | list[Loader]:
        """Not shuffled; an empty list if there are no validation images."""
        self.setup()
        return self.loader("val") if len(self._indices["val"]) else []

    def test_dataloader(self) -> Loader:
        """Not shuffled."""
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
            split: "train" is shuffled, augmented and mixed, and drops an incomplete last batch.
            device: of the batches; by default the Trainer's, or the CPU.
            rank, world_size: this process's number, and the number of processes; by default the Trainer's, or
                0 and 1.
            seed: of the order and the augmentation; by default this module's.
        """
        self.setup()
        trainer, training = self.trainer, split == "train"
        official = self._official(split)
        device = torch.device(device or (trainer.strategy.root_device if trainer else "cpu"))
        pixels = self._pixels(official, device)
        # Workers need Python integers; copying them from the device would wait for it.
        order_device = device if isinstance(pixels, Pixels) else torch.device("cpu")
        order = EpochOrder(
            self._indices[split].to(order_device),
            self.dataset.batch_size if training else self.dataset.eval_batch_size,
            seed=self.seed if seed is None else seed,
            shuffle=training and not self.one_batch,
            rank=(trainer.global_rank if trainer else 0) if rank is None else rank,
            world_size=(trainer.world_size if trainer else 1) if world_size is None else world_size,
            passes=self.dataset.passes if training else 1,
            repeats=self.dataset.repeats if training else 1,
        )
        return Loader(
            pixels,
            self._splits[official].labels.to(device),
            order,
            mean=self.dataset.mean,
            std=self.dataset.std,
            augment=self.dataset.augment if training else None,
            mixer=self._mixer() if training else None,
        )

    def _mixer(self) -> Mixer | None:
        """Mixes the training batches, if they are mixed."""
        dataset = self.dataset
        if not dataset.mix.is_on:
            return None
        # As far apart as the views of one image reach: they are no pair.
        return Mixer(dataset.mix, dataset.image_size, len(self.class_names), apart=dataset.repeats)

    def _official(self, split: str) -> str:
        """The official split that has the images of `split`."""
        if split == "val" and self.dataset.validate_on == "test":
            return "test"
        return split if split in self._splits else "train"

    def fixed_views(self, split: str) -> Loader | None:
        """A loader of all images of "train" or "val" that this process may see, each once, not shuffled.

        Its batches have `eval_batch_size` images. None if images look different in each epoch, or are mixed,
        or decoded for every batch, or there are none.
        """
        self.setup()
        varies = split == "train" and (self.dataset.augment.is_random or self.dataset.mix.is_on)
        if varies or not self._splits[self._official(split)].resident or not len(self._indices[split]):
            return None
        loader = self.loader(split)
        if split == "train":
            # Over the epochs, each process sees every training image.
            loader.sampler = EpochOrder(loader.sampler.index, self.dataset.eval_batch_size)
        return loader

    def first(self, split: str, count: int, seed: int | None = None) -> Batch:
        """The first `count` images of `loader(split)` in epoch 0, on the CPU; no others are read."""
        return self.loader(split, "cpu", rank=0, world_size=1, seed=seed).first(count)

    @property
    def is_resident(self) -> bool:
        """Whether all images are kept in memory, so that no workers decode them."""
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


def _share(official: Split | FileSplit, positions: Tensor, dataset: Dataset, fraction: float) -> Tensor:
    """Those of `positions` ([N] int64, of an official split) that make up a fraction of each class."""
    keys = official.random_keys(dataset.split_seed)[positions]
    return positions[share_of_each_class(official.labels[positions], keys, fraction)]
