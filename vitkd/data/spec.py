"""What every data set says about itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vitkd.data.augment import Augment
from vitkd.data.split import FileSplit, Split
from vitkd.errors import ConfigError


@dataclass(kw_only=True)
class Dataset(ABC):
    """A data set's facts and loading settings; each class is also the schema of its files in conf/dataset.

    Args:
        name: as in `dataset=NAME`; folders are named after it.
        num_classes: null where the folder tells.
        channels: 1 (greyscale) or 3 (RGB).
        image_size: height and width in pixels.
        mean, std: one value a channel, of pixels in 0..1.
        patch_size: what models cut the image into unless told otherwise, in pixels.
        augment: how training images are varied.
        batch_size: training images a step, on each device.
        eval_batch_size: images a step in validation and test, on each device.
        val_fraction: share of the training split kept for validation, 0 for none.
        validate_on: `held_out` images, or `test`: the test images choose the best epoch then, as some reports
            have it, and the accuracy at it flatters.
        split_seed: which images those are. It is not the run's seed: a teacher must never have trained on
            what its student is validated with.
        max_epochs: how long training takes to be worth while, unless the run says otherwise.
    """

    name: str
    num_classes: int | None
    channels: int
    image_size: int
    mean: list[float]
    std: list[float]
    patch_size: int
    augment: Augment = field(default_factory=Augment)
    batch_size: int = 64
    eval_batch_size: int = 512
    val_fraction: float = 0.1
    validate_on: str = "held_out"
    split_seed: int = 0
    max_epochs: int = 20

    def __post_init__(self) -> None:
        plain = Path(self.name).name == self.name and self.name not in ("", "..")
        self._require("name", plain, "one folder name, without slashes")
        self._require("num_classes", self.num_classes is None or self.num_classes >= 2, "2 or more")
        self._require("channels", self.channels in (1, 3), "1 (greyscale) or 3 (RGB)")
        for setting in ("image_size", "patch_size", "batch_size", "eval_batch_size", "max_epochs"):
            self._require(setting, getattr(self, setting) >= 1, "1 or more")
        self._require("split_seed", self.split_seed >= 0, "0 or more")
        self._require("val_fraction", 0 <= self.val_fraction < 1, "in [0, 1); 0 trains on every image")
        self._require("validate_on", self.validate_on in ("held_out", "test"), "held_out or test")
        unused = self.validate_on == "test" and self.val_fraction > 0
        self._require("val_fraction", not unused, "0 with validate_on=test, which holds nothing out")
        for setting in ("mean", "std"):
            values = len(getattr(self, setting))
            self._require(
                setting, values == self.channels, f"one value a channel, {self.channels} and not {values}"
            )
        self._require("std", all(value > 0 for value in self.std), "above 0 in every channel")
        padding = self.augment.crop_padding
        self._require(
            "augment", padding < self.image_size, f"a crop_padding below image_size={self.image_size}"
        )

    @property
    def validates(self) -> bool:
        """Whether there are images to validate with."""
        return self.val_fraction > 0 or self.validate_on == "test"

    def inspect(self, root: Path) -> int:
        """The number of classes; cheap next to `load`, and called before a run leaves anything on disk.

        Makes sure that the data is there, downloading it if it may.

        Raises:
            ConfigError: the data is absent and cannot be had, is damaged, or differs from what is set here.
        """
        return len(self.load(root)["test"].class_names)

    @abstractmethod
    def load(self, root: Path) -> Mapping[str, Split | FileSplit]:
        """The splits "train" and "test", official or fixed.

        Args:
            root: the folder that holds all data sets.

        Raises:
            ConfigError: as `inspect`.
        """

    def contents(self, root: Path) -> str | None:
        """A short hash of which images these are; None where the name alone says so.

        Args:
            root: the folder that holds all data sets.

        Raises:
            ConfigError: as `inspect`.
        """
        return None

    def _require(self, setting: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{setting}={getattr(self, setting)!r} must be {allowed}")

    def _checked(self, split: Split) -> Split:
        """The split, once it is known to be of the shape and the class count that are set here."""
        classes, shape = len(split.class_names), tuple(split.images.shape[1:])
        if self.num_classes != classes:
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {self.name} has {classes} classes; set that"
            )
        if shape != (self.channels, self.image_size, self.image_size):
            raise ConfigError(
                f"dataset.channels={self.channels} and image_size={self.image_size}, but {self.name} has"
                f" {shape[0]} channel(s) and {shape[1]}×{shape[2]} pixels; only image files are resized"
            )
        return split
