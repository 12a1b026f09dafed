"""Data sets that are folders of image files, one folder a class."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from vitkd.data.spec import Dataset
from vitkd.data.split import FileSplit, hold_out
from vitkd.data.staging import Archive, DownloadError, has_files, unavailable_error
from vitkd.errors import ConfigError

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FLOWERS = Archive(
    url="https://download.tensorflow.org/example_images/flower_photos.tgz",
    size=228_813_984,
    sha256="4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c",
    folder="flower_photos",
    images=3_670,
)
_TEST_FRACTION = 0.1
_TEST_SEED = 0


@dataclass(kw_only=True)
class ImageFolder(Dataset):
    """Your own images: `root/train/CLASS/*` and perhaps `root/test/CLASS/*`, or `root/CLASS/*`.

    Without a test folder, a tenth of every class is the test split, chosen by a hash of each file's path.

    Args:
        root: the folder.
        resident_limit_gib: a split that would take more memory than this is decoded batch by batch.
        workers: processes that do so.
    """

    root: str | None = None
    resident_limit_gib: float = 8.0
    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting in ("resident_limit_gib", "workers"):
            self._require(setting, getattr(self, setting) >= 0, "0 or more")

    def inspect(self, root: Path) -> int:
        folder = self._folder(root)
        classes = len(class_folders(_train_folder(folder)))
        if classes < 2:
            raise ConfigError(f"{folder} has {classes} class folder; give it 2 or more")
        if self.num_classes not in (None, classes):
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {folder} has {classes} class folders; set"
                f" {classes} or null"
            )
        return classes

    def load(self, root: Path) -> dict[str, FileSplit]:
        self.inspect(root)
        folder = self._folder(root)
        train = self._scan(_train_folder(folder))
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return {"train": train, "test": self._scan(folder / "test", train.class_names)}
        kept, held = hold_out(train.labels, train.lots(_TEST_SEED), _TEST_FRACTION)
        return {"train": train.subset(kept), "test": train.subset(held)}

    def contents(self, root: Path) -> str:
        folder, splits = self._folder(root), self.load(root).values()
        files = [split.folder / path for split in splits for path in split.paths]
        sizes = sorted((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:12]

    def _folder(self, root: Path) -> Path:
        """Where the images are."""
        if self.root is None:
            raise ConfigError(
                "dataset.root=null must be a folder of CLASS/IMAGE or train/CLASS/IMAGE; set dataset.root=DIR"
            )
        return Path(self.root).expanduser()

    def _scan(self, folder: Path, class_names: list[str] | None = None) -> FileSplit:
        """All images below `folder`; their labels are numbered by `class_names`, or by the folders found."""
        found = class_folders(folder)
        class_names = class_names or [place.name for place in found]
        if strangers := [place.name for place in found if place.name not in class_names]:
            raise ConfigError(f"{folder} has a class {strangers[0]!r} that the train folder lacks; remove it")
        paths, labels = [], []
        for place in found:
            files = image_files(place)
            paths += [file.relative_to(folder).as_posix() for file in files]
            labels += [class_names.index(place.name)] * len(files)
        return FileSplit(
            torch.tensor(labels),
            class_names,
            folder,
            paths,
            self.channels,
            self.image_size,
            self.resident_limit_gib,
            self.workers,
        )


@dataclass(kw_only=True)
class TfFlowers(ImageFolder):
    """TensorFlow's 3,670 photos of five flowers, without TensorFlow.

    Only a training split is official; the test split is the tenth that `ImageFolder` would choose.

    Args:
        root: an extracted `flower_photos` elsewhere than below paths.data.
        download: fetch the data when absent.
    """

    download: bool = True

    def _folder(self, root: Path) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser()
        return root / FLOWERS.folder

    def inspect(self, root: Path) -> int:
        if self.root is None:
            self._ensure(root)
        return super().inspect(root)

    def _ensure(self, root: Path) -> None:
        """Download what is absent; what is there but incomplete is the user's to remove."""
        folder = self._folder(root)
        try:
            if not has_files(folder):
                if not self.download:
                    raise DownloadError("dataset.download=false")
                FLOWERS.install(root)
            if (found := len(image_files(folder))) < FLOWERS.images:
                raise DownloadError(f"{found:,} of {FLOWERS.images:,} images")
        except DownloadError as error:
            raise unavailable_error(self.name, folder, f"{FLOWERS} in {root}", error) from error


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, sorted by name.

    Raises:
        ConfigError: there is no such folder, or no class in it, or one without images.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; point dataset.root at one with CLASS/IMAGE files")
    found = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if not found:
        raise ConfigError(
            f"{folder} has no class folders; give the images of each class a folder of their own"
        )
    for place in found:
        if not any(map(_is_image, place.rglob("*"))):
            raise ConfigError(f"class folder {place} has no images; add some or remove the folder")
    return found


def image_files(folder: Path) -> list[Path]:
    """Every image below `folder`, sorted; told by suffix, hidden files left out."""
    return sorted(filter(_is_image, folder.rglob("*")))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _train_folder(folder: Path) -> Path:
    return folder / "train" if (folder / "train").is_dir() else folder
