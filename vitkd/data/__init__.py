"""Image files → (image, label, index) batches that already lie on the device.

A `Dataset` says what a data set is and loads its splits; `ImageDataModule` hands out loaders. What a batch
holds is a pure function of (seed, epoch, image index): see `hashing`.
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
