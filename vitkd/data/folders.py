"""Data sets that are folders of image files, with one folder for each class."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vitkd.data.contents import FileHashes, hash_files
from vitkd.data.layout import class_folders, image_files, split_folders
from vitkd.data.spec import Dataset
from vitkd.data.split import FileSplit, hold_out, printable
from vitkd.data.staging import Archive, DownloadError, unavailable_error
from vitkd.errors import ConfigError, check_at_least

FLOWERS = Archive(
    urls=("https://download.tensorflow.org/example_images/flower_photos.tgz",),
    algorithm="sha256",
    checksum="4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
    size=228_813_984,
    folder="flower_photos",
)
FLOWERS_IMAGES = 3_670
_TEST_FRACTION = 0.1
_TEST_SEED = 0


@dataclass(kw_only=True)
class ImageFiles(Dataset):
    """A data set of image files.

    Args:
        resident_limit_gib: a split that would take more memory than this, in GiB, is decoded batch by batch.
        workers: processes that decode batches.
    """

    resident_limit_gib: float = 8.0
    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, self, "resident_limit_gib")
        check_at_least(0, self, "workers", most=1024)

    def files(
        self,
        labels: list[int],
        class_names: list[str],
        folder: Path,
        paths: list[str],
        keeps_pixels: bool = False,
    ) -> FileSplit:
        """A split of the images at `paths`, relative to `folder`."""
        return FileSplit(
            torch.tensor(labels),
            class_names,
            folder,
            paths,
            self.channels,
            self.image_size,
            self.resident_limit_gib,
            self.workers,
            keeps_pixels,
        )


@dataclass(kw_only=True)
class ImageFolder(ImageFiles):
    """Your own images: `root/CLASS/*`, or `root/train/CLASS/*` and the like in `root/val` and `root/test`.

    Without a test folder, a tenth of every class is the test split, chosen by a hash of each file's path. A
    val folder is the validation split, instead of a part of the training images; with val_fraction=0 it is
    not used. docs/data.md has the other names that these folders may have.

    Args:
        root: the folder.
    """

    root: str | None = None

    def inspect(self, root: Path) -> int:
        folder = self._folder(root)
        splits = split_folders(folder)
        classes = len(class_folders(splits["train"]))
        if self.validate_on == "test" and "val" in splits:
            raise ConfigError(f"dataset.validate_on=test, but there is {splits['val']}; set held_out")
        if classes < 2:
            raise ConfigError(f"{folder} has {classes} class folder; add others, at least 2 are needed")
        if self.num_classes not in (None, classes):
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {folder} has {classes} class folders; set"
                f" {classes} or null"
            )
        return classes

    def load(self, root: Path) -> dict[str, FileSplit]:
        self.inspect(root)
        folders = split_folders(self._folder(root))
        splits = {"train": (train := self._scan(folders["train"]))}
        for name in ("val", "test"):
            if name in folders and (name == "test" or self.validates):
                splits[name] = self._scan(folders[name], train.class_names)
        if "test" not in splits:
            kept, held_out = hold_out(train.labels, train.random_keys(_TEST_SEED), _TEST_FRACTION)
            splits |= {"train": train.subset(kept), "test": train.subset(held_out)}
        return splits

    def contents(self, root: Path, known: FileHashes | None = None) -> str:
        files = [split.folder / path for split in self.load(root).values() for path in split.paths]
        return hash_files(self._folder(root), files, {} if known is None else known)

    def _folder(self, root: Path) -> Path:
        """The folder with the images."""
        if self.root is None:
            raise ConfigError(
                "dataset.root=null must be a folder of CLASS/IMAGE or train/CLASS/IMAGE; set dataset.root=DIR"
            )
        return Path(self.root).expanduser()

    def _scan(self, folder: Path, class_names: list[str] | None = None) -> FileSplit:
        """All images below `folder`; labels index `class_names`, or else the sorted class folders."""
        folders = {printable(each.name): each for each in class_folders(folder)}
        class_names = class_names or [*folders]
        if unknown := [name for name in folders if name not in class_names]:
            raise ConfigError(f"{folder} has a class {unknown[0]!r} that the train folder lacks; remove it")
        paths, labels = [], []
        for name, class_folder in folders.items():
            files = image_files(class_folder)
            paths += [file.relative_to(folder).as_posix() for file in files]
            labels += [class_names.index(name)] * len(files)
        return self.files(labels, class_names, folder, paths)


@dataclass(kw_only=True)
class TfFlowers(ImageFolder):
    """TensorFlow's 3,670 photos of five kinds of flowers; TensorFlow is not needed.

    It has no official test split; a tenth of every class is the test split, as in `ImageFolder`.

    Args:
        root: an unpacked `flower_photos` folder; null for the one in paths.data.
        download: whether to download the data if it is absent.
    """

    download: bool = True

    def _folder(self, root: Path) -> Path:
        return root / FLOWERS.folder if self.root is None else super()._folder(root)

    def inspect(self, root: Path) -> int:
        if self.root is not None:
            return super().inspect(root)
        try:
            folder = FLOWERS.install(root, self.download)
            # An incomplete folder is left for the user to remove.
            if (count := len(image_files(folder))) < FLOWERS_IMAGES:
                raise DownloadError(f"{count:,} of {FLOWERS_IMAGES:,} images")
        except DownloadError as error:
            place = root / FLOWERS.folder
            raise unavailable_error(self.name, place, f"{FLOWERS} in {root}", error) from error
        return super().inspect(root)
