"""Image files → batches of (image, label, index) on the device.

A `Dataset` describes a data set and loads its splits; an `ImageDataModule` makes the loaders. An image's
view depends on (seed, epoch, index) alone: see `hashing`.
"""

from vitkd.data.augment import Augment
from vitkd.data.digits import Digits
from vitkd.data.folders import ImageFolder, TfFlowers
from vitkd.data.loader import Batch, Loader
from vitkd.data.module import ImageDataModule
from vitkd.data.spec import Dataset
from vitkd.data.torchvision_sets import Torchvision

__all__ = [
    "Augment",
    "Batch",
    "Dataset",
    "Digits",
    "ImageDataModule",
    "ImageFolder",
    "Loader",
    "TfFlowers",
    "Torchvision",
]
