"""Folders of images: what is found, how it is split, what is said when it is wrong."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitkd.data import Dataset, ImageDataModule
from vitkd.errors import ConfigError

Make = Callable[..., Dataset]


def test_classes_are_counted_and_a_tenth_is_the_test_split(make: Make, photos: Path, tmp_path: Path) -> None:
    dataset = make("image_folder", root=str(photos), image_size=16)
    assert dataset.inspect(tmp_path) == 3
    splits = dataset.load(tmp_path)
    train, test = splits["train"], splits["test"]
    assert train.class_names == ["a", "b", "c"]
    assert train.labels.bincount().tolist() == [18] * 3
    assert test.labels.bincount().tolist() == [2] * 3
    assert not set(train.paths) & set(test.paths)
    assert train.read_all().shape == (54, 3, 16, 16)
    assert dataset.load(tmp_path)["test"].paths == test.paths


def test_train_and_test_folders(make: Make, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    root.mkdir()
    photos.rename(root / "train")
    (root / "test" / "b").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(root / "test" / "b" / "one.webp", lossless=True)
    dataset = make("image_folder", root=str(root), image_size=8)
    splits = dataset.load(tmp_path)
    assert len(splits["train"]) == 60
    assert splits["test"].labels.tolist() == [1]
    assert splits["test"].read_all()[0, :, 4, 4].tolist() == [255, 0, 0]
    (root / "test" / "d").mkdir()
    Image.new("RGB", (9, 9)).save(root / "test" / "d" / "two.png")
    with pytest.raises(ConfigError, match="class 'd' that the train folder lacks"):
        dataset.load(tmp_path)


@pytest.mark.parametrize(("size", "box"), [((40, 20), (5, 0, 15, 10)), ((20, 52), (0, 8, 10, 18))])
def test_the_middle_is_kept(make: Make, photos: Path, size: tuple, box: tuple) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    image.save(photos / "a" / "0.png")
    split = make("image_folder", root=str(photos), image_size=10).load(photos)["train"]
    expected = np.asarray(image.resize((size[0] // 2, size[1] // 2), Image.Resampling.BILINEAR).crop(box))
    assert np.array_equal(split._decode(photos / "a" / "0.png").permute(1, 2, 0), expected)


def test_grey_images(make: Make, photos: Path) -> None:
    dataset = make("image_folder", root=str(photos), image_size=12, channels=1, mean=[0.5], std=[0.25])
    assert dataset.load(photos)["train"].read_all().shape == (54, 1, 12, 12)
    with pytest.raises(ConfigError, match=r"^mean=\[0.485, 0.456, 0.406\]: must be one value a channel"):
        make("image_folder", root=str(photos), channels=1)


def test_reading_some_equals_reading_all(make: Make, photos: Path) -> None:
    split = make("image_folder", root=str(photos), image_size=16).load(photos)["train"]
    assert torch.equal(split.read([5, 0, 50]), split.read_all()[[5, 0, 50]])


@pytest.mark.parametrize("setting", [{"workers": -1}, {"resident_limit_gib": -0.5}])
def test_bad_settings(setting: dict, make: Make) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be at least 0"):
        make("image_folder", **setting)


def test_contents_distinguish_folders(make: Make, photos: Path, tmp_path: Path) -> None:
    dataset = make("image_folder", root=str(photos))
    before = dataset.contents(tmp_path)
    assert len(before) == 12
    (photos / "a" / "notes.txt").write_text("no image")
    (photos / "a" / "30.png").touch()
    assert make("image_folder", root=str(photos), batch_size=3).contents(tmp_path) == before
    photos.rename(tmp_path / "elsewhere")
    moved = make("image_folder", root=str(tmp_path / "elsewhere"))
    assert moved.contents(tmp_path) == before
    seen = {before}
    one = tmp_path / "elsewhere" / "a" / "30.png"
    one.write_bytes(one.read_bytes() + b"one more")
    seen.add(moved.contents(tmp_path))
    one.rename(one.with_name("renamed.png"))
    seen.add(moved.contents(tmp_path))
    one.with_name("renamed.png").rename(tmp_path / "elsewhere" / "b" / "renamed.png")
    seen.add(moved.contents(tmp_path))
    (tmp_path / "elsewhere" / "b" / "renamed.png").unlink()
    seen.add(moved.contents(tmp_path))
    assert len(seen) == 5


def test_contents_are_the_pixels_and_not_only_their_number(make: Make, photos: Path, tmp_path: Path) -> None:
    """Bitmaps of one size have files of one size."""
    file, dataset = photos / "a" / "30.bmp", make("image_folder", root=str(photos))
    seen = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (9, 9), colour).save(file)
        seen.add((file.stat().st_size, dataset.contents(tmp_path)))
    assert len({size for size, _ in seen}) == 1
    assert len(seen) == 2


def test_contents_are_read_once(make: Make, photos: Path, tmp_path: Path) -> None:
    known: dict = {}
    dataset = make("image_folder", root=str(photos))
    before = dataset.contents(tmp_path, known)
    ((place, files),) = known.items()
    assert place == str(photos.resolve())
    assert len(files) == 60
    files["a/30.png"] = [*files["a/30.png"][:-1], "as known"]
    assert dataset.contents(tmp_path, known) != before
    os.utime(photos / "a" / "30.png")
    assert dataset.contents(tmp_path, known) == before
    (photos / "a" / "30.png").unlink()
    dataset.contents(tmp_path, known)
    assert "a/30.png" not in known[place]


def test_contents_that_cannot_be_read(make: Make, photos: Path, tmp_path: Path) -> None:
    (photos / "a" / "link.png").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"a/link.png cannot be read \(No such file"):
        make("image_folder", root=str(photos)).contents(tmp_path)


def test_contents_count_the_test_folder(make: Make, photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    (root / "test" / "b").mkdir(parents=True)
    photos.rename(root / "train")
    file = root / "test" / "b" / "one.png"
    Image.new("RGB", (9, 9)).save(file)
    dataset = make("image_folder", root=str(root))
    before = dataset.contents(tmp_path)
    file.write_bytes(file.read_bytes() + b"one more")
    assert dataset.contents(tmp_path) != before


def test_unreadable_image_is_named(make: Make, photos: Path) -> None:
    whole = (photos / "b" / "1.jpg").read_bytes()
    dataset = make("image_folder", root=str(photos))
    for content in (whole[: len(whole) // 2], b"", b"no image"):
        (photos / "b" / "1.jpg").write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"b/1.jpg cannot be read as an image \(.+\); replace or remove"
        ) as error:
            [split.read_all() for split in dataset.load(photos).values()]
        assert "\n" not in str(error.value)


def test_hidden_and_other_files_are_no_images(make: Make, photos: Path) -> None:
    (photos / "a" / "._1.png").write_bytes(b"")
    (photos / "a" / "notes.txt").write_text("")
    (photos / ".cache").mkdir()
    assert len(make("image_folder", root=str(photos)).load(photos)["train"]) == 54


def test_wrong_folders(make: Make, photos: Path, tmp_path: Path) -> None:
    def complaint(**changes: object) -> str:
        with pytest.raises(ConfigError) as error:
            make("image_folder", **changes).inspect(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "dataset.root=null must be a folder" in complaint()
    assert "nowhere is not a folder" in complaint(root=str(tmp_path / "nowhere"))
    assert "has 3 class folders; set 3 or null" in complaint(root=str(photos), num_classes=4)
    assert "has no class folders" in complaint(root=str(photos / "a"))
    assert "lone has 1 class folder; add others" in complaint(root=str(_lone(tmp_path / "lone")))
    (photos / "empty").mkdir()
    assert "class folder" in (line := complaint(root=str(photos)))
    assert "empty has no images" in line


def test_flowers(make: Make, real_data: Path) -> None:
    module = ImageDataModule(make("tf_flowers", image_size=16, patch_size=8), real_data, seed=0)
    module.setup()
    assert [len(module._indices[split]) for split in ("train", "val", "test")] == [2936, 367, 367]
    assert module.class_names == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    train, test = module._splits["train"], module._splits["test"]
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == [633, 898, 641, 699, 799]


def _lone(folder: Path) -> Path:
    (folder / "train" / "only").mkdir(parents=True)
    Image.new("L", (4, 4)).save(folder / "train" / "only" / "1.png")
    return folder
