"""Whatever goes wrong with a download is one line that says how to fix it, and leaves no files."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchvision

from vitkd.data import Dataset, staging
from vitkd.errors import ConfigError

from . import server as how
from .official import OPTIONS, Official, archive_of, offer, tar_of, unpack
from .server import Answer, Server

Make = Callable[..., Dataset]

FAULTS: dict[str, tuple[Answer, str]] = {
    "half a file": (how.half, "sent|corrupted"),
    "closed in the middle": (how.half_of_what_is_announced, "sent|corrupted"),
    "hangs in the middle": (how.half_then_nothing, "timed out"),
    "never answers": (how.nothing, "timed out"),
    "hangs up": (how.hangs_up, "closed connection"),
    "wrong checksum": (how.one_byte_differs, "not the official|corrupted"),
    "not found": (how.not_found, "404"),
    "broken": (how.broken, "500"),
    "no web server": (how.no_http, "220 mail"),
    "in circles": (how.in_circles, "infinite loop"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "TIMEOUT_SECONDS", 0.2)


def complaint(dataset: Dataset, root: Path, official: Official, state: str = "absent") -> str:
    """The one-line error of the data set, which has all that a user needs."""
    with pytest.raises(ConfigError) as error:
        dataset.inspect(root)
    line = str(error.value)
    assert "\n" not in line
    assert f"dataset {dataset.name}: {root / official.folder} is {state}" in line
    for url, mark in zip(official.urls, official.hashes, strict=True):
        assert url in line
        assert mark in line
    assert f" in {root / official.by_hand} by hand" in line
    return line


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def is_had(dataset: Dataset, root: Path, official: Official) -> None:
    """The data set is there, and nothing else."""
    dataset.inspect(root)
    assert {*dataset.load(root)} == {"train", "test"}
    top = official.folder.split("/")[0]
    assert [path.name for path in root.iterdir()] == [top]
    assert not [name for name in everything_below(root) if ".download" in name]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_good_server(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    is_had(make(option), tmp_path / "deep" / "data", official)
    assert {*server.asked} == {*server.files}
    server.asked.clear()
    is_had(make(option), tmp_path / "deep" / "data", official)
    is_had(make(option, download=False), tmp_path / "deep" / "data", official)
    assert not server.asked


@pytest.mark.parametrize("option", ["tf_flowers", "tiny_imagenet", "mnist", "cifar10"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_server(
    option: str,
    fault: str,
    server: Server,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    official, root = offer(server, option, monkeypatch), tmp_path / "deep" / "data"
    server.answer, says = FAULTS[fault]

    line = complaint(make(option), root, official)

    assert any(word in line for word in says.split("|")), line
    assert everything_below(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    server.answer = None
    is_had(make(option), root, official)


def test_a_bad_mirror_is_passed_over(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official, root = offer(server, "mnist", monkeypatch), tmp_path / "data"
    files, first = dict(server.files), f"{server.url}first/"
    server.files |= {f"first/{name}": content[:-1] for name, content in files.items()}
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [first, server.url])
    official.urls = [first + name for name in files]

    is_had(make("mnist"), root, official)
    assert server.asked == [place + name for name in files for place in ("first/", "")]
    shutil.rmtree(root)

    del server.files["t10k-labels-idx1-ubyte.gz"]
    server.answer = how.whole_or_not_found
    line = complaint(make("mnist"), root, official)
    assert "not the official" in line
    assert "404" in line
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_no_server(option: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with how.serving() as server:
        official = offer(server, option, monkeypatch)
    assert "refused" in complaint(make(option), tmp_path / "data", official)
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_not_to_be_downloaded(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    line = complaint(make(option, download=False), tmp_path / "data", official)
    assert "dataset.download=false" in line
    assert everything_below(tmp_path) == []
    assert not server.asked


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_a_read_only_folder(
    option: str, server: Server, make: Make, read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    for root in (read_only, read_only / "data"):
        line = complaint(make(option), root, official)
        assert any(f"[Errno {code}]" in line for code in (errno.EACCES, errno.EPERM, errno.EROFS)), line
    assert not server.asked


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_data_in_a_read_only_folder_is_read(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    unpack(server, option, tmp_path / "data")
    monkeypatch.setattr(staging, "FileLock", None)
    monkeypatch.setattr(Path, "mkdir", None)
    is_had(make(option), tmp_path / "data", official)


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger than `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_a_disk_that_is_full_while_downloading(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official, root = offer(server, option, monkeypatch), tmp_path / "data"
    with room_for(1000):
        line = complaint(make(option), root, official)
    assert os.strerror(errno.EFBIG) in line
    assert everything_below(tmp_path) == []
    is_had(make(option), root, official)


def test_a_disk_that_is_full_while_unpacking(server: Server, tmp_path: Path) -> None:
    server.files = {"zeros.tgz": tar_of({"flower_photos/zeros.jpg": bytes(1_000_000)})}
    archive = archive_of(server.files["zeros.tgz"], f"{server.url}zeros.tgz")
    assert archive.size < 10_000
    with room_for(10_000), pytest.raises(staging.DownloadError, match=os.strerror(errno.EFBIG)):
        archive.install(tmp_path / "data")
    assert everything_below(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_real_full_disk(
    server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, "cifar10", monkeypatch)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode()}")
    try:
        assert os.strerror(errno.ENOSPC) in complaint(make("cifar10"), tmp_path / "data", official)
        assert everything_below(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_an_empty_folder_is_filled(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    (tmp_path / "data" / official.folder).mkdir(parents=True)
    assert "download=false" in complaint(make(option, download=False), tmp_path / "data", official)
    server.answer = how.not_found
    complaint(make(option), tmp_path / "data", official)
    server.answer = None
    is_had(make(option), tmp_path / "data", official)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_incomplete_folder_is_reported_and_left_alone(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    folder = unpack(server, option, tmp_path)
    # MNIST is inspected by its test split alone, whose files sort first.
    min(path for path in folder.rglob("*") if path.is_file()).unlink()
    before = everything_below(tmp_path)
    assert "remove it" in complaint(make(option), tmp_path, official, state="damaged or incomplete")
    assert everything_below(tmp_path) == before
    assert not server.asked


@pytest.mark.parametrize("option", ["mnist", "cifar100"])
def test_half_of_a_file_is_reported(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    for file in unpack(server, option, tmp_path).iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ConfigError, match=r"is damaged or incomplete .*; remove it"):
            make(option).load(tmp_path)
        file.write_bytes(whole)
    is_had(make(option), tmp_path, official)


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_what_a_killed_download_left_is_removed(
    option: str, server: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = offer(server, option, monkeypatch)
    target = tmp_path / "data" / official.folder
    left = target.with_name(f".download-{target.name}") / "unpacked"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    left.parent.with_name(f".download-{target.name}.lock").touch()
    is_had(make(option), tmp_path / "data", official)


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_two_at_once_download_once(
    option: str,
    server: Server,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    official, root = offer(server, option, monkeypatch), tmp_path / "data"
    monkeypatch.setattr(staging, "TIMEOUT_SECONDS", 30)
    is_had(make(option), tmp_path / "alone", official)
    requests = len(server.asked)
    server.asked.clear()
    server.answer = how.once_released
    with caplog.at_level("INFO", "vitkd.data.staging"), together(make(option), root) as failures:
        eventually(lambda: waiting(caplog) == [root / official.folder])
        assert [name for name in everything_below(root) if name.endswith(".lock")]
        server.going.set()
    assert failures == []
    assert len(server.asked) == requests
    assert waiting(caplog) == [root / official.folder]
    is_had(make(option), root, official)


@pytest.mark.parametrize("option", ["tf_flowers", "mnist", "cifar10"])
def test_when_the_first_fails_the_second_has_its_turn(
    option: str,
    server: Server,
    make: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    official, root = offer(server, option, monkeypatch), tmp_path / "deep" / "data"
    monkeypatch.setattr(staging, "TIMEOUT_SECONDS", 30)

    def fails_at_first(handler: how.BaseHTTPRequestHandler) -> None:
        server.going.wait()
        server.answer = None
        how.not_found(handler)

    server.answer = fails_at_first
    with caplog.at_level("INFO", "vitkd.data.staging"), together(make(option), root) as failures:
        eventually(lambda: bool(waiting(caplog)))
        server.going.set()
    assert len(failures) == 1
    assert "404" in failures[0]
    is_had(make(option), root, official)


@contextlib.contextmanager
def together(dataset: Dataset, root: Path) -> Iterator[list[str]]:
    """Two threads that need the data set at the same time; yields their error messages."""
    failures: list[str] = []

    def need() -> None:
        try:
            dataset.inspect(root)
        except ConfigError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=need) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield failures
    for thread in threads:
        thread.join()


def waiting(caplog: pytest.LogCaptureFixture) -> list[Path]:
    """The targets that a process waits for."""
    return [record.args[-1] for record in caplog.records if "waiting for it" in record.msg]  # type: ignore[index, misc]


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# The process needs only this file of the package; importing the rest takes seconds.
ALONE = f"""
import importlib.util, logging, sys
from pathlib import Path
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
spec = importlib.util.spec_from_file_location("staging", {str(staging.__file__)!r})
sys.modules["staging"] = staging = importlib.util.module_from_spec(spec)
spec.loader.exec_module(staging)
url, size, sha256, folder, root = sys.argv[1:]
archive = staging.Archive((url,), "sha256", sha256, size=int(size), folder=folder)
archive.install(Path(root))
"""


def downloading(archive: staging.Archive, root: Path) -> subprocess.Popen[str]:
    arguments = [archive.urls[0], str(archive.size), archive.checksum, archive.folder, str(root)]
    return subprocess.Popen(
        [sys.executable, "-u", "-c", ALONE, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def archive(server: Server) -> staging.Archive:
    server.files = {"photos.tgz": tar_of({"flower_photos/roses/1.jpg": os.urandom(100_000)})}
    return archive_of(server.files["photos.tgz"], f"{server.url}photos.tgz")


def test_a_killed_process_keeps_nobody_from_the_data(
    archive: staging.Archive, server: Server, tmp_path: Path
) -> None:
    server.answer = how.half_then_nothing
    with downloading(archive, tmp_path) as process:
        eventually((tmp_path / ".download-flower_photos" / "archive").exists)
        process.send_signal(signal.SIGKILL)
    assert {*everything_below(tmp_path)} == {
        ".download-flower_photos",
        ".download-flower_photos/archive",
        ".download-flower_photos.lock",
    }
    server.answer = None
    archive.install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["flower_photos"]


def test_two_processes_download_once(archive: staging.Archive, server: Server, tmp_path: Path) -> None:
    server.answer = how.once_released
    with downloading(archive, tmp_path) as first:
        eventually(lambda: bool(server.asked))
        with downloading(archive, tmp_path) as second:
            assert second.stdout
            line = second.stdout.readline()
            server.going.set()
    assert line == f"another process is downloading {tmp_path / 'flower_photos'}; waiting for it\n"
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.asked == ["photos.tgz"]
    assert [path.name for path in tmp_path.iterdir()] == ["flower_photos"]


def test_many_processes_download_once(archive: staging.Archive, server: Server, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(downloading(archive, tmp_path / "data")) for _ in range(6)]
    assert [process.returncode for process in crowd] == [0] * 6
    assert server.asked == ["photos.tgz"]
    assert everything_below(tmp_path) == [
        "data",
        "data/flower_photos",
        "data/flower_photos/roses",
        "data/flower_photos/roses/1.jpg",
    ]


def test_a_download_of_another_data_set_is_no_leftover(archive: staging.Archive, tmp_path: Path) -> None:
    with staging.staging_folder(tmp_path / "another") as stage:
        (stage / "file").touch()
        archive.install(tmp_path)
        assert (stage / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["flower_photos"]


def test_the_command_says_it_on_one_line(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with how.serving() as server:
        official = offer(server, "mnist", monkeypatch)
    monkeypatch.chdir(tmp_path)
    ended = command("train", "dataset=mnist", "trainer.max_epochs=1", "paths.data=data")
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("error: dataset mnist: ")
    assert all(fact in line for fact in official.urls + official.hashes)
    assert everything_below(tmp_path) == []
