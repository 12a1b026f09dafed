"""How folders of images are read: as splits or as classes, which files count, and what a run says of them."""

import hashlib
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkd.data import Dataset, ImageDataModule
from vitkd.data.contents import FileHashes
from vitkd.errors import ConfigError

Make = Callable[..., Dataset]
Read = Callable[..., ImageDataModule]


def fill(root: Path, *folders: str, each: int = 5) -> Path:
    """`each` images in every one of `folders`, no two of all alike."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            seed = [*f"{folder}/{number}".encode()]
            pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


def of_classes(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "own"


@pytest.fixture
def read(make: Make, root: Path) -> Read:
    """read(val_fraction=0): the data set in `root` as a run divides it."""

    def read(**changes: object) -> ImageDataModule:
        dataset = make("image_folder", root=str(root), image_size=8, patch_size=8, **changes)
        data = ImageDataModule(dataset, root, seed=0)
        data.setup()
        return data

    return read


def refusal(read: Read, **changes: object) -> str:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def files_of(data: ImageDataModule) -> dict[str, list[str]]:
    """Split → the files of its batches, relative to the folder of the data set."""
    folder = Path(data.dataset.root)
    files = {}
    for split in ("train", "val", "test"):
        official = data._splits[data._official(split)]
        numbers = data._indices[split].tolist()
        files[split] = sorted(
            (official.folder / official.paths[n]).relative_to(folder).as_posix() for n in numbers
        )
    return files


def tops(files: Sequence[str]) -> set[str]:
    """The folders at the top that `files` lie in."""
    return {file.split("/")[0] for file in files}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("training", "validation", "testing"),
        ("TRAIN", "Eval", "TEST"),
    ],
)
def test_customary_names_of_splits(train: str, val: str, test: str, root: Path, read: Read) -> None:
    fill(root, *of_classes(train, val, test))
    data = read()
    assert data.class_names == ["cat", "dog"]
    for split, name in (("train", train), ("val", val), ("test", test)):
        assert files_of(data)[split] == [
            f"{name}/{each}/{n}.png" for each in ("cat", "dog") for n in range(5)
        ]
        labels = [label for batch in data.loader(split) for label in batch.label.tolist()]
        assert sorted(labels) == [0] * 5 + [1] * 5


def test_without_a_val_folder_a_share_of_train_validates(root: Path, read: Read) -> None:
    fill(root, *of_classes("Train", "Test"))
    files = files_of(read(val_fraction=0.2))
    assert tops(files["train"]) == tops(files["val"]) == {"Train"}
    assert [len(files[split]) for split in ("train", "val", "test")] == [8, 2, 10]


def test_without_a_test_folder_a_share_of_train_is_the_test_split(root: Path, read: Read) -> None:
    fill(root, *of_classes("train", "val"))
    files = files_of(read(val_fraction=0.4))
    assert files["val"] == [f"val/{each}/{n}.png" for each in ("cat", "dog") for n in range(5)]
    assert [len(files[split]) for split in ("train", "val", "test")] == [8, 10, 2]
    assert tops(files["train"]) == tops(files["test"]) == {"train"}


def test_a_val_folder_changes_no_test_split(root: Path, read: Read) -> None:
    fill(root, *of_classes("train"), each=20)
    before = files_of(read())["test"]
    fill(root, *of_classes("val"))
    assert files_of(read())["test"] == before


def test_no_validation_where_there_is_a_val_folder(root: Path, read: Read) -> None:
    fill(root, *of_classes("train", "val", "test"))
    data = read(val_fraction=0.0)
    assert [len(files) for files in files_of(data).values()] == [10, 0, 10]
    assert data.val_dataloader() == []
    assert "10 files skipped (.png)" in data.notes()[0]


def test_validated_on_the_test_images_beside_a_val_folder(root: Path, read: Read) -> None:
    fill(root, *of_classes("train", "Val", "test"))
    line = refusal(read, validate_on="test", val_fraction=0.0)
    assert "validate_on=test" in line
    assert str(root / "Val") in line


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (of_classes("test"), ["test", "no train folder"]),
        (of_classes("val", "testing"), ["testing and val", "no train folder"]),
        (of_classes("train", "Training"), ["Training", "train", "merge"]),
        (of_classes("train", "val", "valid"), ["val", "valid", "merge"]),
        ([*of_classes("train"), "horse"], ["train", "horse", "beside"]),
        ([*of_classes("train", "test"), "unlabelled/1"], ["unlabelled", "beside"]),
        (of_classes("training_set", "test_set"), ["training_set", "test_set", "not read as splits"]),
        (of_classes("seg_train/seg_train", "seg_test/seg_test"), ["seg_train", "not read as splits"]),
        (of_classes("TrainImages", "EvalImages"), ["TrainImages", "EvalImages", "not read as splits"]),
        (of_classes("train2017", "val2017"), ["train2017", "not read as splits"]),
        (["train", "test"], ["train", "test", "not read as splits"]),
        (["train/cat", "train/dog", "test"], ["test", "no class folders"]),
        (
            ["cat/train", "cat/test", "dog/train", "dog/test"],
            ["cat has test and train", "not read as splits"],
        ),
        (["train/cat/train", "train/cat/val", "train/dog"], ["cat has train and val", "not read as splits"]),
        (of_classes("photos/train", "photos/test"), ["photos has test and train", "not read as splits"]),
    ],
)
def test_what_may_be_splits_but_is_not_understood(
    folders: list[str], named: list[str], root: Path, read: Read
) -> None:
    fill(root, *folders)
    line = refusal(read)
    for part in (str(root), *named):
        assert part in line


def test_a_class_may_be_named_train(root: Path, read: Read) -> None:
    fill(root, "bus", "car", "train")
    assert read().class_names == ["bus", "car", "train"]


def test_any_names_are_classes_in_a_train_folder(root: Path, read: Read) -> None:
    fill(root, "train/train", "train/test tube", "train/car/old")
    assert read().class_names == ["car", "test tube", "train"]


def test_what_is_not_seen(root: Path, read: Read) -> None:
    fill(root, "cat", "dog")
    before = files_of(read())
    fill(root, "cat/.thumbnails", "cat/old/@eaDir/x", "dog/__MACOSX", ".ipynb_checkpoints", "@eaDir")
    for name in ("._0.png", "Thumbs.db"):
        (root / "dog" / name).write_bytes(b"")
    assert files_of(read()) == before
    assert "skipped" not in read().notes()[0]


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".jp2", ".Png", ".tga", ".pnm", ".apng", ".avif"])
def test_suffixes(suffix: str, root: Path, read: Read) -> None:
    if suffix.lower() not in Image.registered_extensions():
        pytest.skip("this Pillow cannot read it")
    fill(root, "cat", "dog")
    Image.new("RGB", (8, 8), "red").save(root / "dog" / f"other{suffix}")
    files = files_of(read())
    assert f"dog/other{suffix}" in files["train"] + files["val"] + files["test"]


def test_links_are_followed_once(root: Path, read: Read) -> None:
    fill(root, "cat", "dog")
    elsewhere = fill(root.parent / "elsewhere", "more", "more/inside")
    (elsewhere / "more" / "inside" / "back").symlink_to(elsewhere / "more")
    (root / "cat" / "a link").symlink_to(elsewhere / "more")
    (root / "cat" / "home").symlink_to(root)
    (root / "dog" / "one.png").symlink_to(elsewhere / "more" / "0.png")
    (root / "dog" / "own").mkdir()
    (root / "dog" / "own link").symlink_to(root / "dog" / "own")
    (root / "dog" / "own" / "x.png").write_bytes((root / "dog" / "0.png").read_bytes() + b"x")

    found = sorted(chain(*files_of(read()).values()))

    cats = ["cat", "cat/a link", "cat/a link/inside"]
    expected = [f"{folder}/{n}.png" for folder in (*cats, "dog") for n in range(5)]
    assert found == sorted([*expected, "dog/one.png", "dog/own/x.png"])


@pytest.mark.parametrize("name", ["lost.png", "lost", "itself"])
@pytest.mark.parametrize("place", [".", "cat", "cat/old"])
def test_a_link_to_nothing_is_named(name: str, place: str, root: Path, read: Read) -> None:
    fill(root, "cat/old", "dog")
    link = root / place / name
    link.symlink_to(link if name == "itself" else root.parent / "gone")
    line = refusal(read)
    assert str(link) in line
    assert "remove" in line


def test_a_pipe_is_no_image(root: Path, read: Read) -> None:
    fill(root, "cat", "dog")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "folder.png").mkdir()
    assert sum(map(len, files_of(read()).values())) == 10


def test_names_that_are_no_text(root: Path, read: Read) -> None:
    fill(root, "cat", "dog")
    odd = os.fsdecode(b"caf\xe9")
    (root / "dog").rename(root / odd)
    (root / odd / "0.png").rename(root / odd / f"{odd}.png")
    (root / "cat" / f"note.{odd}").touch()
    for name in ("3.png", "4.png"):
        (root / odd / name).write_bytes((root / "cat" / "3.png").read_bytes())
        (root / "cat" / name).write_bytes((root / "cat" / "3.png").read_bytes())
    data = read(val_fraction=0.4)
    assert data.class_names == [r"caf\udce9", "cat"]
    for line in data.notes():
        line.encode()
    assert len(data.notes()) == 2


class TestLines:
    def test_counts_classes_and_skipped_files(self, root: Path, read: Read) -> None:
        fill(root, *of_classes("train"), each=10)
        fill(root, *of_classes("Test"), each=2)
        (root / "train" / "cat" / "notes.txt").touch()
        (root / "README.txt").touch()
        (line,) = read(val_fraction=0.1).notes()
        expected = "images: 18 training, 2 validation (held out), 4 test (Test); 2 classes: cat, dog"
        assert line == f"{expected}; 2 files skipped (.txt)"

    def test_a_val_folder_and_no_test_folder(self, root: Path, read: Read) -> None:
        fill(root, *of_classes("train", "val"), each=10)
        (line,) = read().notes()
        assert line == "images: 18 training, 20 validation (val), 2 test (held out); 2 classes: cat, dog"

    def test_images_outside_the_class_folders_are_counted(self, root: Path, read: Read) -> None:
        fill(root, *of_classes("train", "test"), "train", each=2)
        fill(root, ".", each=1)
        for suffix in ("", *map(str, range(30))):
            (root / "train" / f"file.{suffix}").touch()
        (line,) = read(validate_on="test", val_fraction=0.0).notes()
        assert "34 files skipped (.png, " in line
        assert line.endswith(" …)")
        assert len(line) < 200

    def test_of_many_classes(self, root: Path, read: Read) -> None:
        fill(root, *(f"{'long name ' * 5}{number}" for number in range(50)), each=2)
        (line,) = read(val_fraction=0.0).notes()
        assert "50 classes: long name" in line
        assert len(line) < 200

    def test_the_same_bytes_in_two_splits(self, root: Path, read: Read) -> None:
        fill(root, *of_classes("train", "test"))
        assert len(read().notes()) == 1
        copy = root / "test" / "dog" / "copy.png"
        copy.write_bytes((root / "train" / "cat" / "0.png").read_bytes()[:-1] + b"?")
        assert len(read().notes()) == 1, "the size is the same, the content is not"
        for name in ("a", "b"):
            (root / "train" / "cat" / f"{name}.png").write_bytes(
                (root / "train" / "cat" / "0.png").read_bytes()
            )
        assert len(read(val_fraction=0.0).notes()) == 1, "they lie in one split"
        copy.write_bytes((root / "train" / "cat" / "0.png").read_bytes())
        _, line = read(val_fraction=0.0).notes()
        assert line.startswith("warning: 1 image")
        folder = f"{root}/"
        assert f"{folder}train/cat/0.png (training) and {folder}test/dog/copy.png (test)" in line

    def test_known_files_are_not_read_again(
        self, root: Path, read: Read, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(root, *of_classes("train", "test"))
        copy = root / "test" / "dog" / "copy.png"
        copy.write_bytes((root / "train" / "cat" / "0.png").read_bytes())
        known: FileHashes = {}
        data = read(val_fraction=0.0)
        data.dataset.contents(root, known)
        with monkeypatch.context() as patched:
            patched.setattr(hashlib, "file_digest", lambda *_: pytest.fail("reads a file"))
            assert "two splits" in data.notes(known)[1]
        copy.write_bytes((root / "train" / "cat" / "0.png").read_bytes()[:-1] + b"?")
        assert len(data.notes(known)) == 1, "it has changed since"

    def test_held_out_copies_count_as_well(self, root: Path, read: Read) -> None:
        fill(root, "cat", "dog")
        for number in range(1, 5):
            (root / "cat" / f"{number}.png").write_bytes((root / "cat" / "0.png").read_bytes())
        assert "two splits" in read().notes()[1]

    def test_other_data_sets_have_none(self, make: Make, tmp_path: Path) -> None:
        assert ImageDataModule(make("digits"), tmp_path, seed=0).notes() == []

    def test_a_run_prints_them_once(self, root: Path, command: Callable, tmp_path: Path) -> None:
        fill(root, *of_classes("train", "val"), each=10)
        (root / "val" / "cat" / "same.png").write_bytes((root / "train" / "cat" / "0.png").read_bytes())
        images = [
            "dataset=image_folder",
            f"dataset.root={root}",
            "dataset.image_size=8",
            "dataset.patch_size=4",
        ]
        briefly = ["dataset.batch_size=8", "trainer.max_epochs=2", "teacher.max_epochs=1"]
        briefly += ["method=logit", "student=small", "teacher=small", f"paths.outputs={tmp_path}"]

        ended = command("train", *images, *briefly)

        assert ended.code == 0, ended.err
        assert ended.out.count("images: 18 training, 21 validation (val), 2 test (held out); 2 classes") == 1
        assert (
            ended.out.count(f"{root}/train/cat/0.png (training) and {root}/val/cat/same.png (validation)")
            == 1
        )
        assert "its answers to 21 validation images are computed once" in ended.out
        assert ended.out.index("images: 18") < ended.out.index("student: ")
