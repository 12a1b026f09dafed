"""How a folder of images is laid out: which folders are splits and which classes, which files count."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from vitkd.data.decoding import is_image
from vitkd.errors import ConfigError

# A folder's name, in any letter case → the split that it is.
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# These are close to such a name: training_set, seg_test, val2017, TestImages.
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|e?val|test)(ing|id|idation)?[^a-z]*(set|data|image)?s?(?![a-z])")
# What file managers, network disks and archives leave, besides names that start with a dot.
_CLUTTER = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found"}


def split_folders(root: Path) -> dict[str, Path]:
    """Split → the folder with its class folders; {"train": root} if the class folders lie in `root`.

    A folder is a split if its name is one of _SPLIT_NAMES and there are images in folders in it; otherwise a
    class may have such a name. Raises ConfigError if it is not clear which are which.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder; set dataset.root to one with CLASS/IMAGE files")
    folders = _subfolders(root)
    named = [folder for folder in folders if folder.name.casefold() in _SPLIT_NAMES]
    if not any(_has_images(inner) for folder in named for inner in _subfolders(folder)):
        _refuse_splits_among(folders, root)
        return {"train": root}
    splits: dict[str, Path] = {}
    for folder in named:
        first = splits.setdefault(_SPLIT_NAMES[folder.name.casefold()], folder)
        if first is not folder:
            raise ConfigError(f"{root} has both {first.name} and {folder.name}; merge them or remove one")
    names = " and ".join(folder.name for folder in named)
    if "train" not in splits:
        raise ConfigError(f"{root} has {names} but no train folder; add it, or set dataset.root to another")
    for other in folders:
        if other not in named and _has_images(other):
            raise ConfigError(f"{root} has images in {other.name} beside {names}; move it into one, or away")
    return splits


def class_folders(folder: Path) -> list[Path]:
    """The class folders in `folder`, sorted by name.

    Raises ConfigError if there are none, or one of them has no images or seems to hold splits.
    """
    folders = _subfolders(folder)
    if not folders:
        raise ConfigError(f"{folder} has no class folders; put the images of each class in its own folder")
    for class_folder in folders:
        if not _has_images(class_folder):
            raise ConfigError(f"class folder {class_folder} has no images; add some or remove the folder")
        _refuse_splits_among(_subfolders(class_folder), class_folder)
    return folders


def image_files(folder: Path) -> list[Path]:
    """Every image file below `folder`, sorted."""
    return sorted(filter(is_image, visible_files(folder)))


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that is not hidden, also behind links."""
    for _, files in _walk(folder):
        yield from files


def _walk(folder: Path) -> Iterator[tuple[list[Path], list[Path]]]:
    """The folders and the files in `folder`, and in each folder below it; none is hidden or comes twice.

    Raises ConfigError for a folder that cannot be read and for a link to something that does not exist.
    """
    walked = {*folder.resolve().parents}  # a link to one of them would lead back here
    for here, names, others in os.walk(folder, onerror=_refuse, followlinks=True):
        is_new = (place := Path(here).resolve()) not in walked
        walked.add(place)
        folders = sorted(Path(here, name) for name in names if is_new and _is_visible(name))
        files = [Path(here, name) for name in others if is_new and _is_visible(name)]
        for file in files:
            if file.is_symlink() and not file.exists():
                why = f"No such file or folder: it is a link to {file.readlink()}"
                raise ConfigError(f"{file} cannot be read ({why}); remove it")
        yield folders, files
        # Links come last: what is reached without one keeps its own path.
        names[:] = [path.name for path in sorted(folders, key=Path.is_symlink)]


def _refuse(error: OSError) -> None:
    raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); allow or remove it") from error


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _CLUTTER


def _subfolders(folder: Path) -> list[Path]:
    return next(_walk(folder))[0]


def _has_images(folder: Path) -> bool:
    return any(map(is_image, visible_files(folder)))


def _refuse_splits_among(folders: list[Path], parent: Path) -> None:
    """ConfigError if two of the classes, or parts of a class, are named like two splits."""
    words = ((_SPLIT_WORD.search(folder.name.casefold()), folder.name) for folder in folders)
    found = {word[1]: name for word, name in words if word}
    if len(found) > 1:
        what = f"{parent} has {' and '.join(found.values())}, which are not read as splits"
        rule = "these are folders train, val and test with class folders in each; rearrange or rename them"
        raise ConfigError(f"{what}: {rule}")
