"""What a run says of its image files before it trains on them."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

from vitkd.data.contents import FileHashes, hash_file
from vitkd.data.layout import visible_files
from vitkd.data.split import FileSplit, printable
from vitkd.errors import ConfigError

_NAMES = {"train": "training", "val": "validation", "test": "test"}


def summary(splits: Mapping[str, FileSplit], published: int | None = None) -> str:
    """How many images of which classes are in each split; of how many classes, if more are `published`."""
    train = splits["train"]
    counts = [f"{len(train):,} training"]
    for name in ("val", "test"):
        source = "held out" if splits[name].folder == train.folder else printable(splits[name].folder.name)
        counts.append(f"{len(splits[name]):,} {_NAMES[name]} ({source})")
    classes = shorten(", ".join(train.class_names), 80, placeholder=" …")
    number = len(train.class_names)
    part = f"{number} of {published}" if published not in (None, number) else f"{number}"
    return f"images: {', '.join(counts)}; {part} classes: {classes}"


def skipped(splits: Mapping[str, FileSplit]) -> str:
    """How many files lie beside the images and are in no split, to end a line with; empty without any."""
    used = {split.folder / path for split in splits.values() for path in split.paths}
    root = Path(os.path.commonpath([split.folder for split in splits.values()]))
    others = Counter(map(_suffix, visible_files(root))) - Counter(map(_suffix, used))
    suffixes = shorten(", ".join(suffix for suffix, _ in others.most_common()), 40, placeholder=" …")
    files = "1 file" if others.total() == 1 else f"{others.total():,} files"
    return f"; {files} skipped ({suffixes})" if others else ""


def _suffix(file: Path) -> str:
    return printable(file.suffix.lower()) or "no suffix"


def duplicates(splits: Mapping[str, FileSplit], known: FileHashes) -> list[str]:
    """A line on images that are in two splits, byte for byte, with an example; [] if there are none.

    Only files whose hash is not `known` are read.
    """
    files = [(split.folder / path, name) for name, split in splits.items() for path in split.paths]
    before = {f"{folder}/{path}": entry for folder, each in known.items() for path, entry in each.items()}
    by_size: dict[int, dict[Path, str]] = defaultdict(dict)
    by_content: dict[int | str, dict[str, Path]] = defaultdict(dict)
    try:
        for file, name in files:
            by_size[file.stat().st_size][file] = name
        for alike in by_size.values():
            # Only what may be equal is read.
            for file, name in alike.items() if len({*alike.values()}) > 1 else ():
                *_, content = hash_file(file, before.get(str(file), []))
                by_content[content].setdefault(name, file)
    except (OSError, ConfigError):
        return []  # whoever decodes the file says what is wrong with it
    same = [places for places in by_content.values() if len(places) > 1]
    if not same:
        return []
    one, other, *_ = (f"{printable(str(file))} ({_NAMES[name]})" for name, file in same[0].items())
    what = f"{len(same):,} image(s) are in two splits, byte for byte"
    return [f"warning: {what}: {one} and {other}; remove one of each"]
