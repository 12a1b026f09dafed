"""Models come back from a run's files bit for bit, nothing else does, and no crash loses them."""

import contextlib
import errno
import io
import itertools
import logging
import os
import pickle
import resource
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.crashes import SERVER
from tests.runs.foreign import NO_FILE, replace
from vitkd.errors import ConfigError, RunError
from vitkd.models import ViT, describe, save_model
from vitkd.runs.checkpoints import (
    SUMS,
    load_any,
    load_from_checkpoint,
    newest_good,
    previous,
    read_checkpoint,
    write_checkpoint,
)


@pytest.fixture
def model(tiny) -> ViT:
    return tiny(dropout=0.1).build()


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    """As a fit with a teacher saves it, but for what it is not read for."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": describe(model), "state_dict": weights, "epoch": 4}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_comes_back_bit_for_bit(model, checkpoint):
    loaded, epoch = load_from_checkpoint(checkpoint)

    assert epoch == 5
    assert loaded.config == model.config
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_model_is_found_by_folder_and_by_either_file(model, checkpoint):
    save_model(model, checkpoint.with_name("student.safetensors"))

    for path in (checkpoint.parent, checkpoint, checkpoint.with_name("student.safetensors")):
        assert torch.equal(load_any(path).head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.ckpt", "nowhere.safetensors"])
def test_an_absent_one_is_reported(name, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}: there is no such file"):
        load_any(tmp_path / name)


def test_code_is_refused(checkpoint):
    torch.save({"model": {}, "state_dict": {}, "epoch": 0, "extra": Path("x")}, checkpoint)

    with pytest.raises(ConfigError, match="refused"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": {}}, torch.zeros(3)], ids=str)
def test_anything_else_is_no_checkpoint(content, checkpoint):
    torch.save(content, checkpoint)

    with pytest.raises(ConfigError, match="not a checkpoint of vitkd's"):
        read_checkpoint(checkpoint)


def test_weights_of_another_shape_are_reported(checkpoint, tiny):
    content = read_checkpoint(checkpoint)
    torch.save(content | {"model": describe(tiny(depth=1).build())}, checkpoint)

    with pytest.raises(ConfigError, match="weights do not fit"):
        load_from_checkpoint(checkpoint)


@pytest.mark.parametrize("part", ["model", "state_dict", "epoch"])
@pytest.mark.parametrize("value", [[1], "x", None, 0.5])
def test_parts_of_another_type_are_reported(part, value, checkpoint):
    torch.save(read_checkpoint(checkpoint) | {part: value}, checkpoint)

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        load_from_checkpoint(checkpoint)


@pytest.mark.parametrize("weights", [{3: torch.zeros(1)}, {"model.head.weight": 7}, {}], ids=str)
def test_weights_that_are_none_are_reported(weights, checkpoint):
    torch.save(read_checkpoint(checkpoint) | {"state_dict": weights}, checkpoint)

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        load_from_checkpoint(checkpoint)


def test_a_billion_blocks_are_not_built(checkpoint, tiny):
    content = read_checkpoint(checkpoint)
    content["model"]["model"]["depth"] = 10**9
    torch.save(content, checkpoint)

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        load_from_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["last.ckpt", "SHA256SUMS"])
@pytest.mark.parametrize("become", NO_FILE.values(), ids=NO_FILE)
def test_what_is_no_file_is_no_checkpoint_and_no_list(become, name, checkpoint):
    replace(checkpoint.with_name(name), become)

    if name == "SHA256SUMS" or not checkpoint.exists():
        assert (newest_good(checkpoint) is None) == (name == "last.ckpt")
    else:
        with pytest.raises(ConfigError, match=r"last\.ckpt"):
            newest_good(checkpoint)


def test_a_checkpoint_without_its_epoch_is_reported(checkpoint):
    content = read_checkpoint(checkpoint)
    del content["epoch"]
    torch.save(content, checkpoint)

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        load_from_checkpoint(checkpoint)


@pytest.mark.parametrize("position", [0, 1, 30, -30, -1])
def test_every_cut_is_reported(position, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:position])

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_reported(seed, checkpoint):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (500,), dtype=torch.uint8, generator=generator)
    checkpoint.write_bytes(noise.numpy().tobytes())

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_plain_pickle_is_refused_without_a_second_line(protocol, checkpoint, recwarn):
    checkpoint.write_bytes(pickle.dumps({"model": print}, protocol=protocol))

    with pytest.raises(ConfigError, match=r"last\.ckpt"):
        read_checkpoint(checkpoint)
    assert not [*recwarn]


def content(epoch: int, size: int = 1000) -> dict[str, Any]:
    """What stands for a checkpoint where only its being whole counts."""
    weights = torch.arange(size, dtype=torch.float32) + epoch
    return {"model": {}, "state_dict": {"model.w": weights}, "epoch": epoch, "global_step": epoch}


def is_whole(found: dict[str, Any]) -> bool:
    weights = found["state_dict"]["model.w"]
    return torch.equal(weights, torch.arange(len(weights), dtype=torch.float32) + found["epoch"])


def newest_epoch(path: Path) -> int | None:
    """Of the checkpoint that a resumed run would continue from; None where it would start over."""
    found = newest_good(path)
    assert found is None or is_whole(found[1])
    return None if found is None else found[1]["epoch"]


def check_sums(folder: Path) -> None:
    """Check the folder's list with the tool that it is made for."""
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", SUMS], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """Collects what vitkd's log says."""
    monkeypatch.setattr(logging.getLogger("vitkd"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def last(tmp_path) -> Path:
    """A checkpoint that was written twice."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(path, content(1))
    write_checkpoint(path, content(2))
    return path


def test_the_one_before_is_kept_and_both_are_listed(last):
    assert sorted(file.name for file in last.parent.iterdir()) == [SUMS, "last.ckpt", "previous-last.ckpt"]
    assert [read_checkpoint(path)["epoch"] for path in (last, previous(last))] == [2, 1]
    check_sums(last.parent)


def test_best_and_last_share_a_list(last):
    best = last.with_name("best.ckpt")
    for epoch in (1, 2, 3):
        write_checkpoint(best, content(epoch))

    assert len((last.parent / SUMS).read_text().splitlines()) == 4
    check_sums(last.parent)
    assert newest_epoch(best) == 3
    assert newest_epoch(last) == 2


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGE = {
    **{f"bit flipped at {part:.0%}": lambda data, at=part: flipped(data, round(at * (len(data) - 1)))
       for part in (0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)},
    **{f"cut at {part:.0%}": lambda data, at=part: data[: int(at * len(data))]
       for part in (0.01, 0.5, 0.99)},
    "last byte lost": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "emptied": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "second half zeroed": lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
}  # fmt: skip
damaged_each_way = pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)


@damaged_each_way
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_damage_is_one_line(damage, name, tmp_path):
    path = tmp_path / name
    write_checkpoint(path, content(1))
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(ConfigError, match=f"{name}: is damaged") as raised:
        read_checkpoint(path)

    assert "\n" not in str(raised.value)


def test_every_flipped_bit_of_a_small_one_is_seen(tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, content(1, size=1))
    whole = path.read_bytes()

    for position in range(0, len(whole), 7):
        path.write_bytes(flipped(whole, position))
        with pytest.raises(ConfigError, match="is damaged"):
            read_checkpoint(path)


@damaged_each_way
def test_the_one_before_stands_in_for_a_damaged_one(damage, last, warnings_of):
    damaged = damage(last.read_bytes())
    last.write_bytes(damaged)

    found = newest_good(last)

    assert found is not None
    assert found[0] == previous(last)
    assert found[1]["epoch"] == 1
    (warning,) = warnings_of()
    assert "last.ckpt: is damaged" in warning
    assert warning.endswith("it is now last.ckpt.damaged")
    assert "\n" not in warning
    assert last.with_name("last.ckpt.damaged").read_bytes() == damaged
    assert not last.exists()


def test_a_damaged_one_never_takes_the_place_of_a_good_one(last):
    last.write_bytes(flipped(last.read_bytes(), 300))
    assert newest_epoch(last) == 1

    write_checkpoint(last, content(3))

    assert [read_checkpoint(path)["epoch"] for path in (last, previous(last))] == [3, 1]
    check_sums(last.parent)
    last.write_bytes(b"")
    assert newest_epoch(last) == 1


def test_one_that_was_damaged_while_the_run_went_on_is_not_kept(last):
    """Nobody has read it since it was written."""
    last.write_bytes(flipped(last.read_bytes(), 300))

    write_checkpoint(last, content(3))

    assert [read_checkpoint(path)["epoch"] for path in (last, previous(last))] == [3, 1]
    check_sums(last.parent)


def test_where_both_are_damaged_training_starts_over(last, warnings_of):
    for path in (last, previous(last)):
        path.write_bytes(b"")

    assert newest_good(last) is None
    assert len(warnings_of()) == 2
    write_checkpoint(last, content(9))
    check_sums(last.parent)


@pytest.mark.parametrize("listed", ["", "what is this?\n", "\xff\xfe", f"{'0' * 64}  other.ckpt\n"], ids=repr)
def test_without_a_sum_a_copied_checkpoint_loads(listed, last, tmp_path):
    copied = tmp_path / "elsewhere" / "mine.ckpt"
    copied.parent.mkdir()
    copied.write_bytes(last.read_bytes())
    (copied.parent / SUMS).write_text(listed, encoding="latin-1")

    assert read_checkpoint(copied)["epoch"] == 2


def test_one_that_was_there_before_there_were_sums_is_kept(last):
    (last.parent / SUMS).unlink()

    write_checkpoint(last, content(3))

    assert [read_checkpoint(path)["epoch"] for path in (last, previous(last))] == [3, 2]
    check_sums(last.parent)


class Killed(BaseException):
    """The process is dead."""


class Disk:
    """Counts the calls that change the disk, and can have one of them fail or kill the process."""

    CALLS = ("replace", "rename", "link", "symlink", "unlink", "mkdir", "fsync", "truncate")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self._at: int | None = None
        self._error: BaseException = Killed()
        self._dead = False
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        monkeypatch.setattr(io, "open", self._watched("open", io.open))

    def watch(
        self, what: Callable[[], None], at: int | None = None, error: BaseException | None = None
    ) -> None:
        """Do `what`, with `error` in place of its call number `at`.

        Without an error the process dies there: nothing comes after, no cleaning up either.
        """
        self.calls, self._at, self._error, self._dead = [], at, error or Killed(), False
        try:
            with contextlib.suppress(Killed):
                what()
        finally:
            self._at, self._dead = None, False

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r") if name == "open" else "w"
            if set("wax+").isdisjoint(str(mode)):
                return call(*args, **kwargs)
            self.calls.append((name, str(args[0])))
            if self._dead or len(self.calls) - 1 == self._at:
                self._strike(name, args[0])
            # Waiting for the disk a thousand times would make no difference here.
            return None if name == "fsync" else call(*args, **kwargs)

        return watched

    def _strike(self, name: str, what: Any) -> None:
        if not isinstance(self._error, Killed):
            if name != "unlink":  # removing a file needs no room
                raise self._error
            return
        if name == "fsync" and not self._dead and stat.S_ISREG(os.fstat(what).st_mode):
            # Half of it was on the disk.
            os.ftruncate(what, os.fstat(what).st_size // 2)
        self._dead = True
        raise self._error


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def moments(disk: Disk, folder: Path, written: int = 2) -> range:
    """The calls that change the disk while a checkpoint is written where `written` have been before."""
    path = folder / "trial" / "last.ckpt"
    for epoch in range(written):
        write_checkpoint(path, content(epoch))
    disk.watch(lambda: write_checkpoint(path, content(written)))
    return range(len(disk.calls))


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(written, name, disk, tmp_path, warnings_of):
    for moment in moments(disk, tmp_path, written):
        path = tmp_path / str(moment) / name
        for epoch in range(written):
            write_checkpoint(path, content(epoch))

        disk.watch(lambda path=path: write_checkpoint(path, content(written)), at=moment)

        old = written - 1 if written else None
        assert newest_epoch(path) in (old, written), f"killed at {disk.calls[moment]}"
        write_checkpoint(path, content(written + 1))
        assert newest_epoch(path) == written + 1
        check_sums(path.parent)
    assert not warnings_of()


@pytest.mark.parametrize("reads", [True, False], ids=["resumed", "written only"])
def test_kills_in_a_row_leave_the_old_or_the_new(reads, disk, tmp_path, warnings_of):
    """What one kill left half done is no trap for the next write, be it killed too."""
    every = moments(disk, tmp_path)
    for first, second in itertools.product(every, every):
        path = tmp_path / f"{first}-{second}" / "last.ckpt"
        write_checkpoint(path, content(1))
        write_checkpoint(path, content(2))

        disk.watch(lambda path=path: write_checkpoint(path, content(3)), at=first)
        held = {newest_epoch(path)} if reads else {2, 3}
        disk.watch(lambda path=path: write_checkpoint(path, content(4)), at=second)

        assert newest_epoch(path) in held | {4}, (first, second)
        write_checkpoint(path, content(5))
        write_checkpoint(path, content(6))
        assert [read_checkpoint(each)["epoch"] for each in (path, previous(path))] == [6, 5]
    assert not warnings_of()


def test_a_kill_after_a_damaged_one_leaves_the_one_before(disk, tmp_path):
    for moment in moments(disk, tmp_path):
        path = tmp_path / str(moment) / "last.ckpt"
        write_checkpoint(path, content(1))
        write_checkpoint(path, content(2))
        path.write_bytes(b"")
        assert newest_epoch(path) == 1

        disk.watch(lambda path=path: write_checkpoint(path, content(3)), at=moment)

        assert newest_epoch(path) in (1, 3), f"killed at {disk.calls[moment]}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_at_any_moment_leaves_the_old_or_the_new(number, disk, tmp_path, warnings_of):
    for moment in moments(disk, tmp_path):
        path = tmp_path / str(moment) / "last.ckpt"
        write_checkpoint(path, content(1))
        write_checkpoint(path, content(2))
        error = OSError(number, os.strerror(number))

        with contextlib.suppress(RunError):
            disk.watch(lambda path=path: write_checkpoint(path, content(3)), at=moment, error=error)

        assert newest_epoch(path) in (2, 3), f"at {disk.calls[moment]}"
        write_checkpoint(path, content(4))
        assert newest_epoch(path) == 4
        check_sums(path.parent)
    assert not warnings_of()


def test_nothing_takes_its_place_before_it_is_on_the_disk(disk, tmp_path):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, content(1))

    disk.watch(lambda: write_checkpoint(path, content(2)))

    forced = {disk.calls[n - 1][1] for n, (name, _) in enumerate(disk.calls) if name == "fsync"}
    moved = [where for name, where in disk.calls if name == "replace" and where != str(path)]
    assert len(moved) == 2
    assert {*moved} == forced


def test_a_full_disk_is_one_line_and_the_old_one_stays(last):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"last\.ckpt: cannot be written \(File too large\)") as raised:
            write_checkpoint(last, content(3, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "\n" not in str(raised.value)
    assert newest_epoch(last) == 2
    assert sorted(file.name for file in last.parent.iterdir()) == [SUMS, "last.ckpt", "previous-last.ckpt"]
    check_sums(last.parent)


def test_a_file_system_that_fills_up_keeps_the_old_one(small_disk):
    path = small_disk(300) / "last.ckpt"
    write_checkpoint(path, content(1, size=30_000))

    # Two of them fit, and three do not.
    write_checkpoint(path, content(2, size=30_000))
    for _ in range(2):
        with pytest.raises(RunError, match=r"last\.ckpt: cannot be written \(No space left on device\)"):
            write_checkpoint(path, content(3, size=30_000))

    assert newest_epoch(path) == 2
    check_sums(path.parent)


def write_for_ever(path: Path, first: int, wrote: Any) -> None:
    for epoch in itertools.count(first):
        write_checkpoint(path, content(epoch))
        wrote.send(epoch)


def test_a_process_that_is_killed_while_it_writes_loses_nothing(tmp_path, warnings_of):
    path, epoch = tmp_path / "last.ckpt", 0
    for kill in range(8):
        reader, wrote = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=write_for_ever, args=(path, epoch + 1, wrote))
        process.start()
        wrote.close()
        done = reader.recv()
        time.sleep(0.001 * kill)
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                done = reader.recv()

        epoch = newest_epoch(path)
        assert epoch in (done, done + 1)
    assert not warnings_of()
