"""Image files → batches of (image, label, index) on the device.

A `Dataset` describes a data set and loads its splits; an `ImageDataModule` makes the loaders. An image's
view depends on (seed, epoch, index) alone: see `hashing`.
"""

from vitkd.data.augment.view import Augment as Augment
from vitkd.data.batch import Batch as Batch
from vitkd.data.batch import join as join
from vitkd.data.folders import ImageFolder as ImageFolder
from vitkd.data.folders import TfFlowers as TfFlowers
from vitkd.data.library_sets import Digits as Digits
from vitkd.data.library_sets import Torchvision as Torchvision
from vitkd.data.loader import Loader as Loader
from vitkd.data.mix import Mix as Mix
from vitkd.data.module import ImageDataModule as ImageDataModule
from vitkd.data.spec import Dataset as Dataset
from vitkd.data.tiny_imagenet import TinyImageNet as TinyImageNet
