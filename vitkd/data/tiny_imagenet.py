"""Tiny ImageNet: 200 of ImageNet's classes in 64×64 pixels, or those of them that are there."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
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


class _Images(NamedTuple):
    """The images of one folder."""

    folder: Path
    by_class: Mapping[str, list[str]]
    """WordNet id → paths relative to `folder`; both sorted"""


class _Copy(NamedTuple):
    """What a complete folder has; its classes are those of `train`."""

    train: _Images
    val: _Images
    class_names: list[str]


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
        return len(self._find(root).class_names)

    def load(self, root: Path) -> dict[str, FileSplit]:
        copy = self._find(root)
        return {
            "train": self._split(copy.train, copy.class_names),
            "test": self._split(copy.val, copy.class_names),
        }

    def contents(self, root: Path, known: FileHashes | None = None) -> str | None:
        """None for all classes, else a short hash of which ones are there."""
        ids = [*self._find(root).train.by_class]
        if len(ids) == self.published_classes:
            return None
        return hashlib.sha256(" ".join(ids).encode()).hexdigest()[:12]

    def _find(self, root: Path) -> _Copy:
        """The official files, downloaded if they are absent; raises ConfigError as `inspect` does."""
        try:
            copy = _complete(TINY_IMAGENET.install(root, self.download))
        # A file is missing, is no text, or has lines of another form.
        except (DownloadError, OSError, ValueError) as error:
            place, manual = root / TINY_IMAGENET.folder, f"{TINY_IMAGENET} in {root}"
            raise unavailable_error(self.name, place, manual, one_line(error)) from error
        if self.num_classes not in (None, count := len(copy.class_names)):
            raise ConfigError(
                f"dataset.num_classes={self.num_classes}, but {copy.train.folder} has {count} of"
                f" {self.published_classes} classes; set {count} or null to train on these"
            )
        return copy

    def _split(self, images: _Images, class_names: list[str]) -> FileSplit:
        labels = [label for label, paths in enumerate(images.by_class.values()) for _ in paths]
        paths = [path for paths in images.by_class.values() for path in paths]
        return self.files(labels, class_names, images.folder, paths, keeps_pixels=True)


def _complete(folder: Path) -> _Copy:
    """What is in `folder`; DownloadError, OSError or ValueError if some of a class are missing."""
    train, val = _training_images(folder / "train"), _validation_images(folder / "val")
    listed, words = _lines(folder / "wnids.txt"), _first_synonyms(folder / "words.txt")
    if problem := next(_problems(train, val, {"wnids.txt": listed, "words.txt": words}), None):
        raise DownloadError(problem)
    return _Copy(train, val, [words[wordnet_id] for wordnet_id in train.by_class])


def _problems(train: _Images, val: _Images, lists: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """What is missing, in words; `lists` are files and the classes that they name."""
    ids = train.by_class.keys()
    for each in sorted(ids ^ val.by_class.keys()):
        yield f"only one of train and val has images of {each}"
    for images, expected in ((train, TRAIN_IMAGES), (val, VAL_IMAGES)):
        for each, paths in images.by_class.items():
            if len(paths) != expected:
                yield f"{images.folder.name} has {len(paths)} of {expected} images of {each}"
    for file, named in lists.items():
        for each in sorted(ids - {*named}):
            yield f"{file} does not name {each}"
    if len(ids) < 2:
        yield "it has one class; two are needed"


def _training_images(folder: Path) -> _Images:
    """train/ID/images/ID_NUMBER.JPEG"""
    ids = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    by_class = {each: [f"{each}/images/{name}" for name in _jpegs(folder / each)] for each in ids}
    return _Images(folder, by_class)


def _validation_images(folder: Path) -> _Images:
    """val/images/val_NUMBER.JPEG, whose classes val/val_annotations.txt names."""
    there = {*_jpegs(folder)}
    by_class = defaultdict(list)
    for line in _lines(folder / "val_annotations.txt"):
        name, wordnet_id, *_box = line.split("\t")
        if name in there:
            by_class[wordnet_id].append(f"images/{name}")
    return _Images(folder, {each: sorted(by_class[each]) for each in sorted(by_class)})


def _jpegs(folder: Path) -> list[str]:
    """The names of the files in its folder `images`, sorted."""
    names = (file.name for file in (folder / "images").iterdir())
    return sorted(name for name in names if name.endswith(".JPEG") and not name.startswith("."))


def _first_synonyms(file: Path) -> dict[str, str]:
    """WordNet id → the first of its words: n01443537 → goldfish."""
    lines = (line.split("\t") for line in _lines(file))
    return {wordnet_id: words.partition(",")[0] for wordnet_id, words in lines}


def _lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()
