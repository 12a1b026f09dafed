"""The base class of all data sets: their settings, and how they are loaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from vitkd.data.augment.view import Augment
from vitkd.data.contents import FileHashes
from vitkd.data.mix import Mix
from vitkd.data.split import FileSplit, Split
from vitkd.errors import ConfigError, check, check_at_least, check_choice, check_fraction, naming


@dataclass(kw_only=True)
class Dataset(ABC):
    """A data set's properties and loading settings; each class is also the schema of files in conf/dataset.

    Args:
        name: as in `dataset=NAME`; run folders are named after it.
        num_classes: null to count the class folders.
        channels: 1 (greyscale) or 3 (RGB).
        image_size: height and width in pixels.
        mean, std: one value a channel, of pixels in 0..1.
        patch_size: the models' default patch size, in pixels.
        augment: random augmentation of training images.
        mix: mixup and CutMix of training images.
        passes: views of each training image an epoch.
        repeats: views of a training image side by side in a batch (Hoffer et al. 2020); an epoch has the
            images that `passes` views of each make room for.
        batch_size: training images a step, on each device.
        eval_batch_size: images a step in validation and test, on each device.
        val_fraction: share of the training split held out for validation, 0 for none. Any other value is the
            same to an image folder that has validation images.
        validate_on: `held_out` images, or `test`: then the test images choose the best epoch, as in some
            published results, and the accuracy is biased upwards.
        split_seed: chooses the held-out images. It is not the run's seed: a teacher must not be trained on
            the images that its student is validated on.
        train_fraction: share of each class's remaining training images to train on, at least one image.
            `split_seed` chooses them, and a smaller share is a part of every larger one.
        max_epochs: the default number of epochs.

    Raises:
        ConfigError: a setting is out of range.
    """

    published_classes: ClassVar[int | None] = None
    """Classes of a published set of image files, of which there may be fewer; the files are its own."""

    name: str
    num_classes: int | None
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    patch_size: int
    augment: Augment = field(default_factory=Augment)
    mix: Mix = field(default_factory=Mix)
    passes: int = 1
    repeats: int = 1
    batch_size: int = 64
    eval_batch_size: int = 512
    val_fraction: float = 0.1
    validate_on: str = "held_out"
    split_seed: int = 0
    train_fraction: float = 1.0
    max_epochs: int = 20

    def __post_init__(self) -> None:
        is_folder_name = Path(self.name).name == self.name and self.name not in ("", "..")
        check(self, "name", is_folder_name, "must be one folder name, without slashes")
        check(self, "num_classes", self.num_classes is None or self.num_classes >= 2, "must be 2 or more")
        check(self, "channels", self.channels in (1, 3), "must be 1 (greyscale) or 3 (RGB)")
        check_at_least(1, self, "image_size", "patch_size", most=2**16)
        check_at_least(1, self, "batch_size", "eval_batch_size", "max_epochs", most=10**6)
        check_at_least(1, self, "passes", "repeats", most=100)
        shown = self.repeats <= self.batch_size
        check(self, "repeats", shown, f"must be at most batch_size={self.batch_size}, the views a step")
        check_at_least(0, self, "split_seed")
        check(self, "val_fraction", 0 <= self.val_fraction < 1, "must be in [0, 1); 0 trains on every image")
        check_fraction(self, "train_fraction")
        check_choice(self, "validate_on", ("held_out", "test"))
        if self.validate_on == "test":
            rule = "must be 0 with validate_on=test, which holds nothing out"
            check(self, "val_fraction", self.val_fraction == 0, rule)
        for setting in ("mean", "std"):
            values = len(getattr(self, setting))
            rule = f"must be one value a channel, {self.channels} and not {values}"
            check(self, setting, values == self.channels, rule)
        check(self, "std", all(value > 0 for value in self.std), "must be above 0 in every channel")
        fits = self.augment.crop_padding < self.image_size
        check(self, "augment", fits, f"must have a crop_padding below image_size={self.image_size}")
        for name, augmentation in self.augment.augmentations.items():
            with naming(f"augment.{name}."):
                augmentation.check_channels(self.channels)

    @property
    def validates(self) -> bool:
        """Whether there are validation images."""
        return self.val_fraction > 0 or self.validate_on == "test"

    def inspect(self, root: Path) -> int:
        """Download the data if it is absent, and return the number of classes.

        It is faster than `load`, and is called before a run writes anything to disk. `root` is the folder
        with all data sets.

        Raises:
            ConfigError: the data is unavailable or damaged, or does not match the settings.
        """
        return len(self.load(root)["test"].class_names)

    @abstractmethod
    def load(self, root: Path) -> Mapping[str, Split | FileSplit]:
        """The splits "train" and "test": the official ones, or fixed ones if there are none; maybe "val".

        Raises ConfigError as `inspect` does.
        """

    def contents(self, root: Path, known: FileHashes | None = None) -> str | None:
        """A short hash of the image files, names and bytes; None if the data set's name identifies them.

        `known` holds what was found before, and is updated. Raises ConfigError as `inspect` does.
        """
        return None

    def _checked(self, split: Split) -> Split:
        """The split, after comparing its image shape and number of classes with the settings."""
        classes, shape = len(split.class_names), tuple(split.images.shape[1:])
        if self.num_classes != classes:
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {self.name} has {classes} classes;"
                f" set {classes}"
            )
        if shape != (self.channels, self.image_size, self.image_size):
            raise ConfigError(
                f"dataset.channels={self.channels} and image_size={self.image_size}, but {self.name} has"
                f" {shape[0]} channel(s) and {shape[1]}×{shape[2]} pixels; only image files are resized"
            )
        return split


def differences(dataset: Dataset, model: object) -> Iterator[tuple[str, int, int]]:
    """Settings of a model in which its images differ from the data set's: name, its value, the data set's."""
    for name in ("num_classes", "image_size", "channels"):
        theirs, ours = getattr(model, name), getattr(dataset, name)
        if theirs != ours:
            yield name, theirs, ours
