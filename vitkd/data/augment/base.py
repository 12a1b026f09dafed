"""The base class of what `dataset.augment.then` may list, and how it spares images that need no change."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Augmentation(ABC):
    """A random change of images; each class is also the schema of a file in conf/augment.

    Raises:
        ConfigError: a setting is out of range.
    """

    @abstractmethod
    def apply(self, pixels: Tensor, index: Tensor, key: Tensor) -> Tensor:
        """Each image changed, as a pure function of (key, index), which never waits for the device.

        Args:
            pixels: [B, C, H, W] uint8 or float32, in 0..255.
            index: [B] int64, of each image in its split.
            key: 0-dim int64, for this augmentation alone.

        Returns:
            [B, C, H, W] uint8 or float32, in 0..255; noise may lie beyond.
        """

    def check_channels(self, channels: int) -> None:
        """Raise ConfigError unless images of so many channels can be changed; by default all can."""
        return


def where_needed(change: Callable[..., Tensor], needed: Tensor, pixels: Tensor, *own: Tensor) -> Tensor:
    """change(pixels, *own), computed for the images that need it alone where that saves time: on a CPU.

    Elsewhere all are: a GPU would have to tell the host how many there are, and the host to wait for it.

    Args:
        change: takes images and what is theirs, and leaves those as they are that do not need it.
        needed: [B] bool.
        pixels: [B, C, H, W].
        own: [B] each, of each image.
    """
    if pixels.device.type != "cpu":
        return change(pixels, *own)
    place = needed.nonzero()[:, 0]
    return pixels.index_copy(0, place, change(pixels[place], *(each[place] for each in own)))
