"""Tiny ImageNet: the official layout is read as its files say, wholly, in part, or not at all."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitkd.data import Dataset, ImageDataModule, tiny_imagenet
from vitkd.data.staging import has_files
from vitkd.errors import ConfigError

from .official import tiny_imagenet_files

CLASSES, TRAIN, VAL, SIZE = 4, 10, 3, 16
Make = Callable[..., Dataset]


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return tiny_imagenet_files(CLASSES, TRAIN, VAL, SIZE)


@pytest.fixture
def root(tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small copy in the official layout."""
    monkeypatch.setattr(tiny_imagenet, "TRAIN_IMAGES", TRAIN)
    monkeypatch.setattr(tiny_imagenet, "VAL_IMAGES", VAL)
    for name, content in files.items():
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "data"


@pytest.fixture
def read(make: Make, root: Path) -> Callable[..., ImageDataModule]:
    """read(num_classes=3): the data as a run divides it, of all classes that are there by default."""

    def read(**changes: object) -> ImageDataModule:
        settings = {"num_classes": None, "image_size": SIZE, "val_fraction": 0.2, "download": False}
        data = ImageDataModule(make("tiny_imagenet", **(settings | changes)), root, seed=0)
        data.setup()
        return data

    return read


def images_of(data: ImageDataModule, split: str) -> dict[bytes, str]:
    """The pixels of each image of a split → the name of its class."""
    official = data._splits[data._official(split)]
    pixels, labels = official.read_all(), official.labels
    positions = data._indices[split].tolist()
    return {pixels[n].numpy().tobytes(): data.class_names[labels[n]] for n in positions}


def as_pillow_reads(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(image).transpose(2, 0, 1).tobytes()


def mode_of(content: bytes) -> str:
    return Image.open(io.BytesIO(content)).mode


def expected(files: dict[str, bytes]) -> tuple[dict[bytes, str], dict[bytes, str]]:
    """As `images_of`, of the official training and validation images."""
    name = "name of n\\d+"
    words = {
        re.search(r"n\d+", each)[0]: each for each in re.findall(name, files[f"{TOP}/words.txt"].decode())
    }
    train = {
        as_pillow_reads(content): words[path.split("/")[2]]
        for path, content in files.items()
        if "/train/" in path and path.endswith("JPEG")
    }
    labels = re.findall(r"(val_\d+\.JPEG)\t(n\d+)", files[f"{TOP}/val/val_annotations.txt"].decode())
    val = {as_pillow_reads(files[f"{TOP}/val/images/{file}"]): words[each] for file, each in labels}
    return train, val


TOP = "tiny-imagenet-200"


def test_every_image_is_of_its_class(read, files):
    data = read()
    train, val = expected(files)

    assert images_of(data, "train") | images_of(data, "val") == train
    assert images_of(data, "test") == val
    assert data.class_names == [f"name of n{number:08}" for number in range(CLASSES)]
    assert data.counts == {"train": 32, "val": 8, "test": 12}
    assert len(train) == CLASSES * TRAIN, "no two are alike"


def test_validation_is_held_out_of_every_class_alike(read):
    data = read()
    labels = data._splits["train"].labels
    assert labels[data._indices["val"]].bincount().tolist() == [2] * CLASSES
    assert not {*images_of(data, "val")} & {*images_of(data, "train")}


def test_grey_images_become_rgb(read, files):
    grey = [path for path in files if path.endswith("JPEG") and mode_of(files[path]) == "L"]
    train = [path.partition("train/")[2] for path in grey if "/train/" in path]
    split = read()._splits["train"]
    assert len(train) == CLASSES * TRAIN // 5
    for path in train:
        red, green, blue = split.read([split.paths.index(path)])[0]
        assert torch.equal(red, green)
        assert torch.equal(red, blue)


def remove_class(root: Path, number: int, images_too: bool = True) -> None:
    """Take a class out of the training images and the official validation images."""
    gone, val = f"n{number:08}", root / TOP / "val"
    shutil.rmtree(root / TOP / "train" / gone)
    lines = (val / "val_annotations.txt").read_text().splitlines(keepends=True)
    (val / "val_annotations.txt").write_text("".join(line for line in lines if gone not in line))
    for line in lines if images_too else ():
        if gone in line:
            (val / "images" / line.split("\t")[0]).unlink()


class TestSomeOfTheClasses:
    def test_are_the_classes_if_that_is_asked_for(self, read, root, files):
        remove_class(root, 1)
        data = read()
        train, val = expected(files)

        assert data.class_names == ["name of n00000000", "name of n00000002", "name of n00000003"]
        assert images_of(data, "test") == {k: v for k, v in val.items() if v in data.class_names}
        assert (images_of(data, "train") | images_of(data, "val")).items() <= train.items()
        assert data.counts == {"train": 24, "val": 6, "test": 9}

    def test_are_named_in_a_line(self, read, root):
        remove_class(root, 1)
        (line,) = read().notes()
        assert "24 training, 6 validation (held out), 9 test (val); 3 of 200 classes: name of n0" in line

    def test_are_not_taken_for_all(self, read, root):
        remove_class(root, 1)
        with pytest.raises(ConfigError, match=r"num_classes=200, but .*train has 3 of 200 classes; set 3 or"):
            read(num_classes=200)
        assert len(read(num_classes=3).class_names) == 3

    def test_are_other_contents(self, make, root, monkeypatch):
        monkeypatch.setattr(tiny_imagenet.TinyImageNet, "published_classes", CLASSES)
        dataset = make("tiny_imagenet", num_classes=None)
        shutil.copytree(root, root.with_name("other"))
        assert dataset.contents(root) is None, "the name says it all"
        remove_class(root, 1)
        remove_class(root.with_name("other"), 2)
        marks = {dataset.contents(each) for each in (root, root, root.with_name("other"))}
        assert len(marks) == 2
        assert None not in marks

    def test_images_of_others_are_of_no_account(self, read, root):
        remove_class(root, 1, images_too=False)
        assert read().counts["test"] == 9


def cut(file: str, old: str = "", new: str = "") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert not old or old in text
        (folder / file).write_text(text.replace(old, new, 1) if old else text[: len(text) // 2])

    return damage


def without(path: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (shutil.rmtree if (folder / path).is_dir() else Path.unlink)(folder / path)

    return damage


ONE = "n00000002"
DAMAGE = {
    "a training image": (without(f"train/{ONE}/images/{ONE}_3.JPEG"), f"train has 9 of 10 images of {ONE}"),
    "a class of training images": (without(f"train/{ONE}"), f"only one of train and val has images of {ONE}"),
    "the images of a class": (without(f"train/{ONE}/images"), "No such file"),
    "all training images": (without("train"), "No such file"),
    "a validation image": (without("val/images/val_2.JPEG"), f"val has 2 of 3 images of {ONE}"),
    "all validation images": (without("val"), "No such file"),
    "the validation labels": (without("val/val_annotations.txt"), "No such file"),
    "half of the validation labels": (cut("val/val_annotations.txt"), "val has|unpack"),
    "a label": (
        cut("val/val_annotations.txt", f"val_2.JPEG\t{ONE}", "val_2.JPEG\tn00000001"),
        "val has 4 of 3",
    ),
    "what is no label": (cut("val/val_annotations.txt", "\t", " "), "val has|unpack"),
    "the list of classes": (without("wnids.txt"), "No such file"),
    "a class in that list": (cut("wnids.txt", ONE), f"wnids.txt does not name {ONE}"),
    "the words": (without("words.txt"), "No such file"),
    "a word": (cut("words.txt", f"{ONE}\t", "n1234\t"), f"words.txt does not name {ONE}"),
}


@pytest.mark.parametrize("missing", DAMAGE)
def test_a_half_unpacked_folder_is_refused_in_one_line(missing, read, root):
    damage, says = DAMAGE[missing]
    damage(root / TOP)
    before = sorted(root.rglob("*"))

    with pytest.raises(ConfigError) as error:
        read(download=True)

    line = str(error.value)
    assert "\n" not in line
    assert f"dataset tiny_imagenet: {root / TOP} is damaged or incomplete" in line
    assert any(each in line for each in says.split("|")), line
    assert "remove it" in line
    assert sorted(root.rglob("*")) == before


def test_bytes_that_are_no_text_are_refused(read, root):
    (root / TOP / "words.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is damaged or incomplete"):
        read()


def test_one_class_is_none(read, root):
    for number in (0, 1, 2):
        remove_class(root, number)
    with pytest.raises(ConfigError, match="it has one class; two are needed"):
        read()


def test_what_file_managers_leave_is_no_image(read, root):
    (root / TOP / "train" / ".Trash").mkdir()
    for folder in (f"train/{ONE}/images", "val/images"):
        (root / TOP / folder / "._val_0.JPEG").touch()
        (root / TOP / folder / "Thumbs.db").touch()
    assert read().counts == {"train": 32, "val": 8, "test": 12}


def test_the_official_test_images_have_no_labels_and_are_not_used(read, root):
    (root / TOP / "test" / "images").mkdir(parents=True)
    (root / TOP / "test" / "images" / "test_0.JPEG").write_bytes(b"no image either")
    assert read().counts == {"train": 32, "val": 8, "test": 12}


def test_a_damaged_image_is_named(read, root):
    file = root / TOP / "train" / ONE / "images" / f"{ONE}_3.JPEG"
    file.write_bytes(b"no image")
    with pytest.raises(ConfigError, match=f"{ONE}_3.JPEG cannot be read as an image"):
        read()
    assert not [*(root / TOP).glob(".d*train*")]


def test_images_may_be_resized_or_decoded_batch_by_batch(read):
    assert read(image_size=32).first("train", 2).image.shape == (2, 3, 32, 32)
    whole = read().first("train", 5).image
    assert torch.equal(read(resident_limit_gib=0.0, workers=0).first("train", 5).image, whole)


def test_the_excerpt_or_the_whole(make, real_data):
    if not has_files(real_data / TOP):
        pytest.skip(f"tiny_imagenet is not in {real_data}")
    data = ImageDataModule(make("tiny_imagenet", num_classes=None, download=False), real_data, seed=0)
    classes = len(data.class_names)
    assert data.counts == {"train": 450 * classes, "val": 50 * classes, "test": 50 * classes}
    assert {"goldfish", "koala", "king penguin", "golden retriever"} <= {*data.class_names}
    if classes == 200:
        shades = data._splits["train"].read_all()[::10].float() / 255
        mean, std = shades.mean((0, 2, 3)), shades.std((0, 2, 3))
        assert mean.tolist() == pytest.approx(data.dataset.mean, abs=0.005)
        assert std.tolist() == pytest.approx(data.dataset.std, abs=0.005)
