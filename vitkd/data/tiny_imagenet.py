"""Tiny ImageNet: 200 of ImageNet's classes in 64×64 pixels, or those of them that are there."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from vitkd.data.contents import FileHashes
from vitkd.data.folders import ImageFiles
from vitkd.data.split import FileSplit
from vitkd.data.staging import Archive, DownloadError, unavailable_error
from vitkd.errors import ConfigError, one_line

TINY_IMAGENET = Archive(
    urls=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    algorithm="sha256",
    checksum="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    size=248_100_043,
    folder="tiny-imagenet-200",
)
TRAIN_IMAGES, VAL_IMAGES = 500, 50
"""Of each class."""


class _Files(NamedTuple):
    """The images of one folder."""

    folder: Path
    by_class: Mapping[str, list[str]]
    """WordNet id → paths relative to `folder`, in the order of the ids"""

    @property
    def ids(self) -> list[str]:
        return [*self.by_class]


@dataclass(kw_only=True)
class TinyImageNet(ImageFiles):
    """Stanford's Tiny ImageNet; the official validation images are the test split.

    The images of the official test split have no labels. A copy may have some of the classes alone, each with
    all its images: then these are the classes.

    Args:
        download: whether to download the data if it is absent.
    """

    download: bool = True

    published_classes: ClassVar[int] = 200

    def inspect(self, root: Path) -> int:
        train, _ = self._find(root)
        return self._checked_count(train)

    def load(self, root: Path) -> dict[str, FileSplit]:
        train, val = self._find(root)
        self._checked_count(train)
        names = _first_synonyms(train.folder.parent / "words.txt")
        class_names = [names[wordnet_id] for wordnet_id in train.ids]
        return {"train": self._split(train, class_names), "test": self._split(val, class_names)}

    def contents(self, root: Path, known: FileHashes | None = None) -> str | None:
        """None for all classes, else a short hash of which ones are there."""
        train, _ = self._find(root)
        if len(train.ids) == self.published_classes:
            return None
        return hashlib.sha256(" ".join(train.ids).encode()).hexdigest()[:12]

    def _find(self, root: Path) -> tuple[_Files, _Files]:
        """Training and official validation images, downloaded if they are absent."""
        try:
            return _complete(TINY_IMAGENET.install(root, self.download))
        # A file is missing, is no text, or has lines of another form.
        except (DownloadError, OSError, ValueError) as error:
            place, manual = root / TINY_IMAGENET.folder, f"{TINY_IMAGENET} in {root}"
            raise unavailable_error(self.name, place, manual, one_line(error)) from error

    def _checked_count(self, train: _Files) -> int:
        """The number of classes; ConfigError if `num_classes` is another."""
        if self.num_classes not in (None, count := len(train.ids)):
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {train.folder} has {count} of Tiny ImageNet's"
                f" {self.published_classes} classes; set {count} or null to train on these"
            )
        return count

    def _split(self, files: _Files, class_names: list[str]) -> FileSplit:
        labels = [label for label, paths in enumerate(files.by_class.values()) for _ in paths]
        paths = [path for paths in files.by_class.values() for path in paths]
        return self.files(labels, class_names, files.folder, paths, keeps_pixels=True)


def _complete(folder: Path) -> tuple[_Files, _Files]:
    """The images in `folder`; DownloadError, OSError or ValueError if some of a class are missing."""
    known = set((folder / "wnids.txt").read_text("utf-8").split())
    train, val = _training_files(folder / "train"), _validation_files(folder / "val")
    if unknown := {*train.ids} - known:
        raise DownloadError(f"wnids.txt does not name {min(unknown)}")
    if different := {*train.ids} ^ {*val.ids}:
        raise DownloadError(f"only one of train and val has images of {min(different)}")
    if len(train.ids) < 2:
        raise DownloadError(f"{len(train.ids)} of the classes; 2 are needed")
    for files, expected in ((train, TRAIN_IMAGES), (val, VAL_IMAGES)):
        for wordnet_id, paths in files.by_class.items():
            if len(paths) != expected:
                raise DownloadError(
                    f"{files.folder.name} has {len(paths)} of {expected} images of {wordnet_id}"
                )
    return train, val


def _training_files(folder: Path) -> _Files:
    """train/ID/images/ID_NUMBER.JPEG"""
    ids = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    return _Files(folder, {each: [f"{each}/images/{name}" for name in _jpegs(folder / each)] for each in ids})


def _validation_files(folder: Path) -> _Files:
    """val/images/val_NUMBER.JPEG, whose classes val/val_annotations.txt names."""
    there = {*_jpegs(folder)}
    by_class = defaultdict(list)
    for line in (folder / "val_annotations.txt").read_text("utf-8").splitlines():
        name, wordnet_id, *_box = line.split("\t")
        if name in there:
            by_class[wordnet_id].append(f"images/{name}")
    return _Files(folder, {each: sorted(by_class[each]) for each in sorted(by_class)})


def _jpegs(folder: Path) -> list[str]:
    """The names of the files in its folder `images`, sorted."""
    names = (file.name for file in (folder / "images").iterdir())
    return sorted(name for name in names if name.endswith(".JPEG") and not name.startswith("."))


def _first_synonyms(file: Path) -> dict[str, str]:
    """WordNet id → the first of its words: n01443537 → goldfish."""
    lines = (line.split("\t") for line in file.read_text("utf-8").splitlines())
    return {wordnet_id: words.partition(",")[0] for wordnet_id, words in lines}
