"""An archive is unpacked completely or refused, and nothing is written outside its folder."""

import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vitkd.data import Dataset
from vitkd.data.staging import Archive, DownloadError
from vitkd.errors import ConfigError

from .official import archive_of, offer, tar_of
from .server import Server

MEMBERS = {f"flower_photos/{name}": name.encode() for name in ("roses/1.jpg", "tulips/2.jpg")}


def publish(server: Server, content: bytes) -> Archive:
    server.files["photos.tgz"] = content
    return archive_of(content, f"{server.url}photos.tgz")


def refusal(archive: Archive, root: Path) -> str:
    with pytest.raises(DownloadError) as error:
        archive.install(root)
    assert "\n" not in str(error.value)
    assert not root.exists()
    return str(error.value)


def test_good(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "data"
    folder = publish(server, tar_of(MEMBERS)).install(root)
    assert folder == root / "flower_photos"
    assert (folder / "roses" / "1.jpg").read_text() == "roses/1.jpg"
    assert [path.name for path in root.iterdir()] == ["flower_photos"]


def test_wrong_checksum(server: Server, tmp_path: Path) -> None:
    archive = replace(publish(server, tar_of(MEMBERS)), checksum="0" * 64)
    assert "not the official 0000" in refusal(archive, tmp_path / "data")


def test_truncated(server: Server, tmp_path: Path) -> None:
    archive = publish(server, tar_of(MEMBERS))
    server.files["photos.tgz"] = server.files["photos.tgz"][:50]
    assert f"sent 50 of {archive.size} bytes" in refusal(archive, tmp_path / "data")


@pytest.mark.parametrize("content", [b"", b"not a tar file at all", tar_of(MEMBERS)[:-30]])
def test_no_archive(content: bytes, server: Server, tmp_path: Path) -> None:
    assert refusal(publish(server, content), tmp_path / "data")


def test_no_such_folder_in_it(server: Server, tmp_path: Path) -> None:
    archive = publish(server, tar_of({"elsewhere/1.jpg": b""}))
    assert "flower_photos" in refusal(archive, tmp_path / "data")


def member(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.devmajor, info.devminor = kind, linkname, 1, 3
    return info


@pytest.mark.parametrize(
    ("escape", "says"),
    [
        (member("../escaped"), "'../escaped' would lie outside"),
        (member("flower_photos/../../escaped"), "would lie outside"),
        (member("flower_photos/../../../../../../../../tmp/escaped"), "would lie outside"),
        (member("OUTSIDE/escaped"), "/escaped' would lie outside"),
        (member("flower_photos/a", tarfile.SYMTYPE, "../../../escaped"), "'flower_photos/a' is a link"),
        (member("flower_photos/a", tarfile.SYMTYPE, "OUTSIDE/escaped"), "is a link"),
        (member("flower_photos/a", tarfile.SYMTYPE, "roses"), "is a link"),
        (member("flower_photos/a", tarfile.LNKTYPE, "../../escaped"), "is a link"),
        (member("flower_photos/a", tarfile.LNKTYPE, "OUTSIDE/victim"), "is a link"),
        (member("flower_photos/a", tarfile.CHRTYPE), "or a device"),
        (member("flower_photos/a", tarfile.BLKTYPE), "or a device"),
        (member("flower_photos/a", tarfile.FIFOTYPE), "or a device"),
        (member("../escaped", tarfile.DIRTYPE), "would lie outside"),
    ],
    ids=lambda value: (
        f"{value.type.decode()} {value.name} {value.linkname}" if not isinstance(value, str) else ""
    ),
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_member_that_escapes_is_refused(
    escape: tarfile.TarInfo, says: str, first: bool, server: Server, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_text("untouched")
    name, linkname = (text.replace("OUTSIDE", str(outside)) for text in (escape.name, escape.linkname))
    # What follows a link could be written through it.
    through = member(f"{name}/escaped") if escape.issym() else member("flower_photos/3.jpg")
    members = [member(name, escape.type, linkname), through]
    plain = [member(name) for name in MEMBERS]
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for info in members + plain if first else plain + members:
            tar.addfile(info)

    line = refusal(publish(server, out.getvalue()), tmp_path / "data")

    assert re.search(says, line)
    assert [*tmp_path.rglob("*")] == [outside, outside / "victim"]
    assert (outside / "victim").read_text() == "untouched"
    assert not Path("/tmp/escaped").exists()


def test_what_was_there_stays(server: Server, tmp_path: Path) -> None:
    theirs = tmp_path / "data" / "flower_photos" / "mine.jpg"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    publish(server, tar_of(MEMBERS)).install(tmp_path / "data")
    assert [path.name for path in theirs.parent.iterdir()] == ["mine.jpg"]
    assert [path.name for path in theirs.parents[1].iterdir()] == ["flower_photos"]
    assert not server.asked


def test_flowers_come_from_the_archive(
    server: Server, tmp_path: Path, make: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(server, "tf_flowers", monkeypatch)
    assert make("tf_flowers").inspect(tmp_path / "data") == 5
    splits = make("tf_flowers", download=False).load(tmp_path / "data")
    assert [len(split) for split in splits.values()] == [90, 10]


def test_flowers_elsewhere_are_not_downloaded(tmp_path: Path, make: Callable[..., Dataset]) -> None:
    with pytest.raises(ConfigError, match="elsewhere is not a folder"):
        make("tf_flowers", root=str(tmp_path / "elsewhere")).inspect(tmp_path)
    assert not any(tmp_path.iterdir())
