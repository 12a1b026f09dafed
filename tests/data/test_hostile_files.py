"""CIFAR's files are pickles: none is read unless its checksum is the official one."""

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from tests.bombs import Bomb
from vitkd.data import Dataset
from vitkd.errors import ConfigError

from .official import offer, publish_cifar, tar_of, unpack
from .server import Server

Make = Callable[..., Dataset]


@pytest.fixture
def bomb(tmp_path: Path) -> bytes:
    return pickle.dumps(Bomb(tmp_path / "went off"))


@pytest.fixture(autouse=True)
def nothing_goes_off(tmp_path: Path):
    yield
    assert not (tmp_path / "went off").exists()


def test_the_bomb_would_go_off(bomb: bytes, tmp_path: Path) -> None:
    pickle.loads(bomb)
    (tmp_path / "went off").rmdir()


def refusal(dataset: Dataset, root: Path) -> str:
    with pytest.raises(ConfigError) as error:
        dataset.load(root)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *(("cifar10", name) for name in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta")),
        *(("cifar100", name) for name in ("train", "test", "meta")),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_a_bomb_among_the_files_is_not_unpickled(
    option: str,
    name: str,
    download: bool,
    bomb: bytes,
    server: Server,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer(server, option, monkeypatch)
    (unpack(server, option, tmp_path / "data") / name).write_bytes(bomb)

    line = refusal(make(option, download=download), tmp_path / "data")

    assert "is damaged or incomplete" in line
    assert "corrupted" in line
    assert not server.asked


def test_checksums_are_compared_before_anything_is_unpickled(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server, "cifar10", monkeypatch)
    file = unpack(server, "cifar10", tmp_path / "data") / "test_batch"
    file.write_bytes(file.read_bytes() + b"one more")
    monkeypatch.setattr(pickle, "load", None)
    assert "corrupted" in refusal(make("cifar10"), tmp_path / "data")


def test_a_downloaded_bomb_is_not_unpickled(
    bomb: bytes, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server, "cifar100", monkeypatch)
    files = {f"cifar-100-python/{name}": bomb for name in ("train", "test", "meta")}
    server.files = {"cifar-100-python.tar.gz": tar_of(files)}
    assert "could not be downloaded" in refusal(make("cifar100"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="torchvision refuses since Python 3.11.4")
@pytest.mark.parametrize("name", ["../escaped", "../../../escaped"])
def test_a_member_of_a_torchvision_archive_does_not_escape(
    name: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [file for file, _ in torchvision.datasets.CIFAR100.train_list]
    names += [*(file for file, _ in torchvision.datasets.CIFAR100.test_list), "meta", f"../{name}"]
    publish_cifar(server, "CIFAR100", dict.fromkeys(names, b""), monkeypatch)
    line = refusal(make("cifar100"), tmp_path / "data")
    assert "outside the destination" in line
    assert not any(tmp_path.iterdir())


def test_torchvisions_old_cache_is_no_way_in(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server, "mnist", monkeypatch)
    unpack(server, "mnist", tmp_path / "data")
    processed = tmp_path / "data" / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save(Bomb(tmp_path / "went off"), processed / name)
    assert "MNIST/raw is damaged" in refusal(make("mnist"), tmp_path / "data")
