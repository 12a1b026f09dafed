"""Downloads against a server on this machine: they appear whole or not at all."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import vitkd.data.folders
from vitkd.data import Dataset
from vitkd.data.staging import Archive, DownloadError
from vitkd.errors import ConfigError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        (folder / "url").write_text(f"http://127.0.0.1:{server.server_port}/photos.tgz")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def publish(served: Path, members: list[str]) -> Archive:
    """A served archive of those members, each with its own name as content."""
    with tarfile.open(served / "photos.tgz", "w:gz") as tar:
        for name in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    content = (served / "photos.tgz").read_bytes()
    url = (served / "url").read_text()
    return Archive(url, len(content), hashlib.sha256(content).hexdigest(), "flower_photos")


MEMBERS = ["flower_photos/roses/1.jpg", "flower_photos/tulips/2.jpg"]


def refusal(archive: Archive, root: Path) -> str:
    with pytest.raises(DownloadError) as error:
        archive.install(root)
    assert "\n" not in str(error.value)
    assert not root.exists()
    return str(error.value)


def test_good(served: Path, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "data"
    folder = publish(served, MEMBERS).install(root)
    assert folder == root / "flower_photos"
    assert (folder / "roses" / "1.jpg").read_text() == "flower_photos/roses/1.jpg"
    assert [path.name for path in root.iterdir()] == ["flower_photos"]


def test_wrong_checksum(served: Path, tmp_path: Path) -> None:
    archive = replace(publish(served, MEMBERS), sha256="0" * 64)
    assert "not the official 0000" in refusal(archive, tmp_path / "data")


def test_truncated(served: Path, tmp_path: Path) -> None:
    archive = publish(served, MEMBERS)
    (served / "photos.tgz").write_bytes((served / "photos.tgz").read_bytes()[:50])
    assert f"sent 50 of {archive.size} bytes" in refusal(archive, tmp_path / "data")


def test_no_such_file_and_no_server(served: Path, tmp_path: Path) -> None:
    archive = publish(served, MEMBERS)
    (served / "photos.tgz").unlink()
    assert "404" in refusal(archive, tmp_path / "data")
    gone = replace(archive, url="http://127.0.0.1:9/photos.tgz")
    assert "refused" in refusal(gone, tmp_path / "data")


def test_no_archive(served: Path, tmp_path: Path) -> None:
    publish(served, MEMBERS)
    (served / "photos.tgz").write_bytes(content := b"not a tar file at all")
    archive = Archive((served / "url").read_text(), len(content), hashlib.sha256(content).hexdigest(), "x")
    assert refusal(archive, tmp_path / "data")


@pytest.mark.parametrize("escape", ["../escaped.txt", "flower_photos/../../escaped.txt"])
def test_a_member_that_escapes_is_refused(escape: str, served: Path, tmp_path: Path) -> None:
    archive = publish(served, [*MEMBERS, escape])
    assert "outside the destination" in refusal(archive, tmp_path / "data")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_what_was_there_stays(served: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "data" / "flower_photos" / "mine.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    publish(served, MEMBERS).install(tmp_path / "data")
    assert [path.name for path in theirs.parent.iterdir()] == ["mine.jpg"]
    assert [path.name for path in theirs.parents[1].iterdir()] == ["flower_photos"]


def test_flowers_come_from_the_archive(
    served: Path, tmp_path: Path, make: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    archive = publish(served, [f"flower_photos/{name}/{i}.jpg" for name in classes for i in range(20)])
    monkeypatch.setattr(vitkd.data.folders, "FLOWERS", archive)
    assert make("tf_flowers").inspect(tmp_path / "data") == 5
    splits = make("tf_flowers", download=False).load(tmp_path / "data")
    assert [len(split) for split in splits.values()] == [90, 10]


def test_flowers_that_cannot_be_had(
    tmp_path: Path, make: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(vitkd.data.folders.FLOWERS, url="http://127.0.0.1:9/flower_photos.tgz")
    monkeypatch.setattr(vitkd.data.folders, "FLOWERS", gone)
    for download, why in ((True, "refused"), (False, "dataset.download=false")):
        with pytest.raises(
            ConfigError, match=rf"absent .*127.0.0.1.*{why}.*by hand.*paths.data=DIR"
        ) as error:
            make("tf_flowers", download=download).inspect(tmp_path / "data")
        assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="elsewhere is no folder"):
        make("tf_flowers", root=str(tmp_path / "elsewhere")).inspect(tmp_path)
