"""CIFAR's files are pickles: none is read unless its checksum is the official one.

An archive writes inside its own folder alone, whatever its members are named.
"""

import gzip
import io
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from tests.bombs import Bomb
from vitkd.data import Dataset
from vitkd.errors import ConfigError

from .official import (
    cifar_files,
    md5,
    offer,
    offer_tiny_imagenet,
    publish_cifar,
    tar_of,
    tiny_imagenet_files,
    unpack,
    zip_of,
)
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


def member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.devmajor, info.devminor = kind, linkname, 1, 3
    return info


def tree(folder: Path) -> dict[Path, str | bytes | None]:
    """Everything below `folder`: links by their target, files by their content, folders."""
    return {
        path: str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


ESCAPES = {
    "beside its folder": [member("../escaped")],
    "three folders up": [member("../../../escaped")],
    "from inside its folder": [member("BASE/../../escaped")],
    "an absolute path": [member("OUTSIDE/escaped")],
    "over a file": [member("OUTSIDE/victim")],
    "a folder": [member("../escaped", tarfile.DIRTYPE)],
    "through a symlink": [member("BASE/link", tarfile.SYMTYPE, "OUTSIDE"), member("BASE/link/escaped")],
    "over a symlink": [member("BASE/link", tarfile.SYMTYPE, "OUTSIDE/victim"), member("BASE/link")],
    "through a relative symlink": [member("link", tarfile.SYMTYPE, "../../outside"), member("link/escaped")],
    "a symlink as its folder": [member("BASE", tarfile.SYMTYPE, "OUTSIDE")],
    "a hardlink": [member("BASE/link", tarfile.LNKTYPE, "OUTSIDE/victim"), member("BASE/link")],
    "a relative hardlink": [member("link", tarfile.LNKTYPE, "../../../outside/victim"), member("link")],
    "a device": [member("BASE/device", tarfile.CHRTYPE)],
    "a pipe": [member("BASE/pipe", tarfile.FIFOTYPE)],
}


def with_victim(folder: Path) -> tuple[Path, Path]:
    """A folder for data, and one outside of it with a file that nothing may touch."""
    root, outside = folder / "deep" / "data", folder / "outside"
    root.mkdir(parents=True)
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    return root, outside


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("source", ["CIFAR10", "CIFAR100"])
def test_a_member_of_a_torchvision_archive_does_not_escape(
    source: str, escape: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = with_victim(tmp_path)
    base = getattr(torchvision.datasets, source).base_folder
    members = []
    for info in ESCAPES[escape]:
        name, link = (
            text.replace("BASE", base).replace("OUTSIDE", str(outside)) for text in (info.name, info.linkname)
        )
        members.append(member(name, info.type, link))
    # All else about the archive is good: its checksum, and those of its files.
    publish_cifar(server, source, cifar_files(source), monkeypatch, first=members)
    before = tree(tmp_path)

    line = refusal(make(source.lower()), root)

    assert tree(tmp_path) == before
    assert f"its member {members[0].name!r}" in line


ZIP_ESCAPES = {
    "beside its folder": "../escaped",
    "three folders up": "../../../escaped",
    "from inside its folder": "BASE/../../escaped",
    "an absolute path": "OUTSIDE/escaped",
    "over a file": "OUTSIDE/victim",
    "a folder": "../escaped/",
}
# The upper 16 bits of a member's attributes are a file's mode, as Unix has it.
ZIP_KINDS = {"a symlink": stat.S_IFLNK, "a device": stat.S_IFCHR, "a pipe": stat.S_IFIFO}


@pytest.mark.parametrize("escape", [*ZIP_ESCAPES, *ZIP_KINDS])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_member_of_a_zip_file_does_not_escape(
    escape: str, place: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = with_victim(tmp_path)
    name = ZIP_ESCAPES.get(escape, "BASE/link")
    hostile = zipfile.ZipInfo(name.replace("BASE", "tiny-imagenet-200").replace("OUTSIDE", str(outside)))
    if escape in ZIP_KINDS:
        hostile.external_attr = (ZIP_KINDS[escape] | 0o777) << 16
    files = tiny_imagenet_files(2)
    good = [zipfile.ZipInfo(name) for name in files]
    # All else about the archive is good, its checksum too.
    content = zip_of(files, first=[hostile]) if place == "first" else zip_of({}, first=[*good, hostile])
    offer_tiny_imagenet(server, monkeypatch, content)
    before = tree(tmp_path)

    line = refusal(make("tiny_imagenet", num_classes=None), root)

    assert tree(tmp_path) == before
    assert f"its member {hostile.filename!r}" in line


def test_what_a_link_of_a_zip_file_would_lead_to_is_not_written_through(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").mkdir()
    link, through = zipfile.ZipInfo("../../outside"), zipfile.ZipInfo("tiny-imagenet-200/link/escaped")
    link.filename, link.external_attr = "tiny-imagenet-200/link", (stat.S_IFLNK | 0o777) << 16
    offer_tiny_imagenet(server, monkeypatch, zip_of({}, first=[link, through]))
    assert "is a link" in refusal(make("tiny_imagenet"), tmp_path / "data")
    assert not any((tmp_path / "outside").iterdir())


def test_permissions_in_a_zip_file_are_ignored(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = zipfile.ZipInfo("tiny-imagenet-200/program")
    program.external_attr = (stat.S_IFREG | 0o6777) << 16
    offer_tiny_imagenet(server, monkeypatch, zip_of(tiny_imagenet_files(2), first=[program]))
    make("tiny_imagenet", num_classes=2).load(tmp_path / "data")
    (tmp_path / "mine").touch()
    written = tmp_path / "data" / "tiny-imagenet-200" / "program"
    assert written.stat().st_mode == (tmp_path / "mine").stat().st_mode


@pytest.mark.parametrize("cut", [30, -30])
def test_a_zip_file_that_is_cut_is_refused(
    cut: int, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = zip_of(tiny_imagenet_files(2))
    offer_tiny_imagenet(server, monkeypatch, content[cut:] if cut > 0 else content[:cut])
    assert "could not be downloaded" in refusal(make("tiny_imagenet"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_kept_pixels_are_no_way_in(
    bomb: bytes, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_tiny_imagenet(server, monkeypatch, zip_of(tiny_imagenet_files(2)))
    dataset = make("tiny_imagenet", num_classes=2)
    pixels = dataset.load(tmp_path / "data")["train"].read_all()
    (kept,) = (tmp_path / "data").rglob("pixels.npy")
    kept.write_bytes(bomb)
    assert torch.equal(dataset.load(tmp_path / "data")["train"].read_all(), pixels)


def test_the_archive_with_nothing_added_is_accepted(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [member("cifar-100-python", tarfile.DIRTYPE), member("cifar-100-python/more/notes.txt")]
    publish_cifar(server, "CIFAR100", cifar_files("CIFAR100"), monkeypatch, first=plain)
    assert {*make("cifar100").load(tmp_path / "data")} == {"train", "test"}
    assert (tmp_path / "data" / "cifar-100-python" / "more" / "notes.txt").exists()


def test_the_name_inside_a_gzip_file_is_ignored(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server, "mnist", monkeypatch)
    for name, content in server.files.items():
        with gzip.GzipFile(f"{tmp_path}/escaped", "wb", fileobj=(out := io.BytesIO())) as file:
            file.write(gzip.decompress(content))
        server.files[name] = out.getvalue()
    resources = [(name, md5(content)) for name, content in server.files.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)

    make("mnist").load(tmp_path / "data")

    names = {f"data/MNIST/raw/{name.removesuffix('.gz')}" for name in server.files}
    assert {str(path.relative_to(tmp_path)) for path in tree(tmp_path) if path.is_file()} == names


def test_owners_and_permissions_in_an_archive_are_ignored(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = member("cifar-100-python/program")
    info.mode, info.uid, info.gid = 0o6777, 1234, 1234
    publish_cifar(server, "CIFAR100", cifar_files("CIFAR100"), monkeypatch, first=[info])
    make("cifar100").load(tmp_path / "data")
    written = (tmp_path / "data" / "cifar-100-python" / "program").stat()
    (tmp_path / "mine").touch()
    mine = (tmp_path / "mine").stat()
    assert (written.st_mode, written.st_uid) == (mine.st_mode, mine.st_uid)


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
