"""Tiny copies of the official data sets for a test server: the same files and formats, with checksums."""

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

import vitkd.data.folders
import vitkd.data.tiny_imagenet
from vitkd.data.library_sets import FOLDERS
from vitkd.data.staging import Archive

from .server import Server

OPTIONS = {
    "tf_flowers": "flower_photos",
    "tiny_imagenet": "tiny-imagenet-200",
    "mnist": FOLDERS["MNIST"],
    "fashion_mnist": FOLDERS["FashionMNIST"],
    "cifar10": FOLDERS["CIFAR10"],
    "cifar100": FOLDERS["CIFAR100"],
}
_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_RNG = np.random.default_rng(0)


@dataclass
class Official:
    """What the error message of an unavailable data set must contain."""

    urls: list[str]
    hashes: list[str]
    folder: str
    """where it belongs, below paths.data"""
    by_hand: str
    """where to unpack its files, below paths.data"""


def offer(server: Server, option: str, patch: pytest.MonkeyPatch) -> Official:
    """Serve the data set, and make vitkd and torchvision download it from `server`."""
    if option == "tf_flowers":
        return _offer_flowers(server, patch)
    if option == "tiny_imagenet":
        return offer_tiny_imagenet(server, patch, zip_of(tiny_imagenet_files(200)))
    return (_offer_cifar if "cifar" in option else _offer_mnist)(server, _CLASSES[option], patch)


def tar_of(files: Mapping[str, bytes], first: Iterable[tarfile.TarInfo] = ()) -> bytes:
    """A tar.gz of `files`, behind the empty members `first`."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for member in first:
            tar.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: Mapping[str, bytes], first: Iterable[zipfile.ZipInfo] = ()) -> bytes:
    """A zip file of `files`, behind the members `first`, of which each holds its own name."""
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for member in first:
            archive.writestr(member, "" if member.is_dir() else member.filename)
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tiny_imagenet_files(classes: int, train: int = 2, val: int = 1, size: int = 4) -> dict[str, bytes]:
    """The layout of Tiny ImageNet, with so many images a class; every fifth is grey, no two are alike."""
    ids = [f"n{number:08}" for number in range(classes)]
    files, labels, count = {}, [], 0

    def picture() -> bytes:
        nonlocal count
        count += 1
        image = Image.fromarray(_RNG.integers(0, 256, (size, size, 3), dtype=np.uint8))
        image.convert("L" if count % 5 == 0 else "RGB").save(out := io.BytesIO(), "jpeg")
        return out.getvalue()

    for each in ids:
        files |= {f"train/{each}/images/{each}_{n}.JPEG": picture() for n in range(train)}
        files[f"train/{each}/{each}_boxes.txt"] = b""
    # In the official set, too, the validation images of a class are no neighbours.
    for number, each in enumerate(ids * val):
        files[f"val/images/val_{number}.JPEG"] = picture()
        labels.append(f"val_{number}.JPEG\t{each}\t0\t0\t3\t3\n")
    files["val/val_annotations.txt"] = "".join(labels).encode()
    files["wnids.txt"] = "\n".join(reversed(ids)).encode()
    words = [f"{each}\tname of {each}, another name\n" for each in (*ids, "n99999999")]
    files["words.txt"] = "".join(words).encode()
    return {f"tiny-imagenet-200/{name}": content for name, content in files.items()}


def offer_tiny_imagenet(server: Server, patch: pytest.MonkeyPatch, content: bytes) -> Official:
    """Serve this zip file, and make vitkd take it for the official one, of 2 + 1 images a class."""
    server.files = {"tiny.zip": content}
    archive = archive_of(content, f"{server.url}tiny.zip", "tiny-imagenet-200")
    patch.setattr(vitkd.data.tiny_imagenet, "TINY_IMAGENET", archive)
    patch.setattr(vitkd.data.tiny_imagenet, "TRAIN_IMAGES", 2)
    patch.setattr(vitkd.data.tiny_imagenet, "VAL_IMAGES", 1)
    return Official([*archive.urls], [archive.checksum], archive.folder, "")


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def archive_of(content: bytes, url: str, folder: str = "flower_photos") -> Archive:
    checksum, size = hashlib.sha256(content).hexdigest(), len(content)
    return Archive((url,), "sha256", checksum, size=size, folder=folder)


def _offer_flowers(server: Server, patch: pytest.MonkeyPatch) -> Official:
    photos = {}
    for number, kind in enumerate(["daisy", "dandelion", "roses", "sunflowers", "tulips"] * 20):
        Image.fromarray(_RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(out := io.BytesIO(), "jpeg")
        photos[f"flower_photos/{kind}/{number}.jpg"] = out.getvalue()
    server.files = {"flower_photos.tgz": (content := tar_of(photos))}
    archive = archive_of(content, f"{server.url}flower_photos.tgz")
    patch.setattr(vitkd.data.folders, "FLOWERS", archive)
    patch.setattr(vitkd.data.folders, "FLOWERS_IMAGES", 100)
    return Official([*archive.urls], [archive.checksum], "flower_photos", "")


def _offer_mnist(server: Server, source: str, patch: pytest.MonkeyPatch) -> Official:
    server.files = {}
    for split in ("train", "t10k"):
        pixels = _RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8).tobytes()
        images = b"".join(number.to_bytes(4, "big") for number in (2051, 20, 28, 28)) + pixels
        labels = b"".join(number.to_bytes(4, "big") for number in (2049, 20)) + bytes([*range(10)] * 2)
        server.files[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(images)
        server.files[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    resources = [(name, md5(content)) for name, content in server.files.items()]
    patch.setattr(getattr(torchvision.datasets, source), "mirrors", [server.url])
    patch.setattr(getattr(torchvision.datasets, source), "resources", resources)
    urls = [server.url + name for name in server.files]
    return Official(urls, [mark for _, mark in resources], FOLDERS[source], FOLDERS[source])


def _offer_cifar(server: Server, source: str, patch: pytest.MonkeyPatch) -> Official:
    official = getattr(torchvision.datasets, source)
    publish_cifar(server, source, cifar_files(source), patch)
    return Official([official.url], [official.tgz_md5], official.base_folder, "")


def cifar_files(source: str) -> dict[str, bytes]:
    """The official files by name, with one image a class in each."""
    official = getattr(torchvision.datasets, source)
    kinds = 10 if source == "CIFAR10" else 100
    content = {official.meta["filename"]: {official.meta["key"]: [f"kind {n}" for n in range(kinds)]}}
    for name, _ in official.train_list + official.test_list:
        pixels = _RNG.integers(0, 256, (kinds, 3 * 32 * 32), dtype=np.uint8)
        content[name] = {"data": pixels, "labels" if kinds == 10 else "fine_labels": [*range(kinds)]}
    return {name: pickle.dumps(value) for name, value in content.items()}


def publish_cifar(
    server: Server,
    source: str,
    files: Mapping[str, bytes],
    patch: pytest.MonkeyPatch,
    first: Iterable[tarfile.TarInfo] = (),
) -> None:
    """Serve these files, behind the members `first`, and make torchvision take them for the official ones."""
    official = getattr(torchvision.datasets, source)
    content = tar_of({f"{official.base_folder}/{name}": file for name, file in files.items()}, first)
    server.files = {official.filename: content}
    patch.setattr(official, "url", server.url + official.filename)
    patch.setattr(official, "tgz_md5", md5(content))
    for batches in ("train_list", "test_list"):
        patch.setattr(official, batches, [[name, md5(files[name])] for name, _ in getattr(official, batches)])
    patch.setattr(official, "meta", official.meta | {"md5": md5(files[official.meta["filename"]])})


def unpack(server: Server, option: str, root: Path) -> Path:
    """Unpack the data where it belongs, as a user would; returns the folder."""
    folder = root / OPTIONS[option]
    folder.mkdir(parents=True)
    for name, content in server.files.items():
        if "mnist" in option:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(content))
        elif name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(root)
        else:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)
                tar.extractall(root)
    return folder
