"""Several processes train one run: as one process would, and without loss when any of them is killed."""

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import crashes
from tests.crashes import Ended, Strike
from vitkd.process.distributed import rank

SMALL = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=3",
        "+trainer.limit_train_batches=3",
        "teacher.trainer.limit_train_batches=3",
        "teacher.max_epochs=1",
    ),
    *("teacher.depth=1", "student.depth=1", "log_every_n_steps=1", "pictures_every_n_epochs=0"),
]
TWO = ["trainer.devices=2", "trainer.strategy=ddp", "dataset.batch_size=32"]
ONE = ["dataset.batch_size=64"]
STEP = "vitkd.train.module:DistillModule.training_step"
LOST = "the connection to another process of this run is lost"


def group(
    arguments: Sequence[str],
    folder: Path,
    *strikes: tuple[Strike, ...],
    target: Any = crashes._run,
) -> list[Ended]:
    """Two processes, started as torchrun starts them, and how they ended; `strikes` are of each."""
    port = free_port()
    processes = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, own in zip(range(2), [*strikes, (), ()], strict=False):
        environment = torchruns_variables(number, 2) | {"MASTER_PORT": str(port)}
        process = crashes.SERVER.Process(
            target=target, args=("train", [*arguments], folder, own, environment)
        )
        process.start()
        processes.append(process)
    return [crashes.end(process, folder) for process in processes]


def torchruns_variables(number: int, count: int) -> dict[str, str]:
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    names |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in names.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def watched(command: str, arguments: list[str], folder: Path, strikes: Any, environment: Any) -> None:
    """A process that notes the images of its every step of the student's."""
    from vitkd.train.module import DistillModule

    step = DistillModule.training_step

    def noting(self: Any, batch: Any, number: int) -> Any:
        # A teacher is trained by the same class, without an objective.
        if self.objective is not None:
            with Path(f"images-{rank()}").open("a") as file:
                file.write(f"{json.dumps(batch.index.tolist())}\n")
        return step(self, batch, number)

    DistillModule.training_step = noting  # type: ignore[method-assign]
    crashes._run(command, arguments, folder, strikes, environment)


def poisoned(command: str, arguments: list[str], folder: Path, strikes: Any, environment: Any) -> None:
    """As the second of two processes, one whose loss is not finite in its fifth step."""
    from vitkd.train.module import DistillModule

    step = DistillModule.training_step

    def poisoning(self: Any, batch: Any, number: int) -> Any:
        if rank() == 1 and self.objective is not None and self.trainer.global_step == 4:
            batch = batch._replace(image=batch.image * math.nan)
        return step(self, batch, number)

    DistillModule.training_step = poisoning  # type: ignore[method-assign]
    crashes._run(command, arguments, folder, strikes, environment)


def run_of(folder: Path, name: str) -> Path:
    return folder / "outputs" / "digits" / name


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def state_of(run: Path) -> str:
    return read(run / "status.json")["state"]


def curves(run: Path, ending: str) -> list[list[float]]:
    """The curves of metrics.csv whose names end so."""
    with (run / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    names = [name for name in rows[0] if name.endswith(ending)]
    assert names
    return [[float(row[name]) for row in rows if row[name]] for name in names]


def are_equal(one: Path, other: Path) -> bool:
    """Whether two runs have the same students, bit for bit, and the same figures but for seconds."""
    figures = [
        {name: value for name, value in read(run / "metrics.json").items() if "second" not in name}
        for run in (one, other)
    ]
    for name in ("last", "best"):
        a, b = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
            for run in (one, other)
        )
        if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
            return False
    a, b = (load_file(run / "student.safetensors") for run in (one, other))
    return figures[0] == figures[1] and all(torch.equal(a[name], b[name]) for name in a)


def left_over(folder: Path) -> list[str]:
    """The command lines of processes at work in `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            # One that has ended, and whose parent has not looked yet, has no command line any more.
            if command and (process / "cwd").readlink() == folder:
                found.append(command)
        except OSError:
            continue
    return found


def all_ended(folder: Path, seconds: float) -> bool:
    """Whether no process is at work in `folder` any more, after so much time at most."""
    deadline = time.monotonic() + seconds
    while left_over(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left_over(folder)


def other_process(first: Any) -> int:
    """The process that `first` has started."""
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    return int(found[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs of this module share teachers."""
    return tmp_path_factory.mktemp("processes").resolve()


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run by two processes, teacher included, of which the first has started the second."""
    ended = crashes.run([*SMALL, *TWO, "name=whole"], folder)
    assert (ended.code, ended.err) == (0, "")
    return run_of(folder, "whole")


@pytest.fixture(scope="module")
def one(folder) -> Path:
    (folder / "one").mkdir()
    process = crashes.SERVER.Process(
        target=watched, args=("train", [*SMALL, *ONE, "name=one"], folder / "one", (), {})
    )
    process.start()
    assert crashes.end(process, folder / "one").code == 0
    return run_of(folder / "one", "one")


@pytest.fixture(scope="module")
def two(folder) -> Path:
    ended = group([*SMALL, *TWO, "name=two"], folder / "two", target=watched)
    assert [(end.code, end.err) for end in ended] == [(0, ""), (0, "")]
    # The first alone speaks.
    assert ended[1].out == ""
    return run_of(folder / "two", "two")


@pytest.mark.slow
class TestTwoProcessesAreLikeOne:
    def test_every_step_sees_the_same_images(self, one, two, folder):
        alone, first, second = (
            [json.loads(line) for line in (folder / path).read_text().splitlines()]
            for path in ("one/images-0", "two/images-0", "two/images-1")
        )

        assert len(alone) == 9
        assert [sorted(step) for step in alone] == [
            sorted([*a, *b]) for a, b in zip(first, second, strict=True)
        ]
        assert [len(step) for step in first] == [len(step) for step in second] == [32] * 9

    @pytest.mark.parametrize("ending", ["_loss", "/acc", "teacher_agreement", "/lr"])
    def test_curves(self, ending, one, two):
        for alone, together in zip(curves(one, ending), curves(two, ending), strict=True):
            assert together == pytest.approx(alone, abs=1e-5)

    def test_figures_although_the_validation_split_is_odd(self, one, two):
        images = 143
        mine, theirs = read(two / "metrics.json"), read(one / "metrics.json")

        assert {k: v for k, v in mine.items() if "acc" in k} == pytest.approx(
            {k: v for k, v in theirs.items() if "acc" in k}, abs=1e-6
        )
        for run in (mine, theirs):
            assert run["val/acc_last"] * images == pytest.approx(
                round(run["val/acc_last"] * images), abs=1e-4
            )
        assert (mine["steps"], mine["epochs"], mine["best_epoch"]) == (9, 3, theirs["best_epoch"])

    def test_the_weights_are_shared(self, two):
        """A second process that did not take part would leave no trace in the first one's weights."""
        saved = torch.load(two / "checkpoints" / "last.ckpt", weights_only=True)

        assert saved["random_state"]["cpu"].shape[0] == 2
        assert not torch.equal(*saved["random_state"]["cpu"])


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["memory", "queue"])
def test_the_banks_of_two_processes_are_those_of_one(bank, whole, folder):
    """Each process writes the embeddings of all, and the first batch of all fixes Z."""
    contrast = ["method=crd", f"method.bank={bank}", "method.negatives=128"]
    for settings, name in ((ONE, f"{bank}-alone"), (TWO, f"{bank}-both")):
        ended = crashes.run([*SMALL, *contrast, *settings, f"name={name}"], folder)
        assert (ended.code, ended.err) == (0, "")
    one, two = (run_of(folder, f"{bank}-{name}") for name in ("alone", "both"))

    for alone, together in zip(curves(one, "_loss"), curves(two, "_loss"), strict=True):
        assert together == pytest.approx(alone, abs=1e-4)
    mine, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (two, one)
    )
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(
        mine["objective.bank.normalizers"], theirs["objective.bank.normalizers"], rtol=1e-5, atol=0
    )
    if bank == "memory":
        # A queue has them in another order.
        torch.testing.assert_close(
            mine["objective.bank.student"], theirs["objective.bank.student"], atol=1e-4, rtol=0
        )


@pytest.mark.slow
class TestWhoStartsThem:
    def test_torchrun_gives_what_the_first_process_gives(self, whole, folder):
        line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        line += ["--rdzv-endpoint=localhost:0", "-m", "vitkd.train", *SMALL, *TWO, "name=torchrun"]
        ended = subprocess.run(
            line, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

        assert ended.returncode == 0, ended.stderr
        assert are_equal(whole, run_of(folder, "torchrun"))

    def test_a_multirun_starts_them_for_each_job(self, folder):
        ended = crashes.run(["-m", "method=none", "optimizer.lr=1e38,0.001", *SMALL, *TWO], folder / "multi")

        states = [
            read(record)["state"]
            for record in sorted((folder / "multi" / "outputs" / "sweeps").glob("*/job-*.json"))
        ]
        assert (ended.code, states) == (1, ["failed", "done"])
        assert "Traceback" not in ended.err
        assert all_ended(folder / "multi", 0)

    def test_a_multirun_of_torchruns_continues_after_a_job_that_only_the_first_found_wrong(self, folder):
        places = ["paths.outputs=/proc/nowhere,outputs", "hydra.sweep.dir=outputs/sweeps/here"]

        first, second = group(["-m", *places, "method=none", *SMALL, *TWO], folder / "torchruns")

        records = [
            read(folder / "torchruns" / "outputs" / "sweeps" / "here" / f"job-{n}.json") for n in range(2)
        ]
        assert [job["state"] for job in records] == ["failed", "done"], first.err + second.err
        assert first.code == 1
        assert first.err == f"error: job 0 failed: {records[0]['error']}\n"
        assert "Traceback" not in second.err


class TestWrongNumbers:
    @pytest.mark.parametrize(
        ("settings", "asked"),
        [
            (["trainer.devices=1"], 1),
            (["trainer.devices=3", "trainer.strategy=ddp"], 3),
            (["trainer.devices=2", "trainer.num_nodes=2", "trainer.strategy=ddp"], 4),
        ],
        ids=["fewer", "more", "more hosts"],
    )
    def test_than_torchrun_has_started_are_one_line(self, settings, asked, command, tmp_path, monkeypatch):
        for name, value in (torchruns_variables(0, 2) | {"MASTER_PORT": str(free_port())}).items():
            monkeypatch.setenv(name, value)

        ended = command("train", *SMALL, *settings, f"paths.outputs={tmp_path / 'outputs'}")

        assert ended.code == 2
        assert ended.err == (
            f"error: trainer.devices and num_nodes ask for {asked} process(es), torchrun has started 2;"
            " make them equal\n"
        )
        assert not (tmp_path / "outputs").exists()

    def test_of_hosts_without_torchrun_are_one_line(self, command, tmp_path):
        hosts = ["trainer.num_nodes=2", "trainer.devices=4", "trainer.strategy=ddp"]

        ended = command("train", *SMALL, *hosts, f"paths.outputs={tmp_path / 'outputs'}")

        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert "torchrun --nnodes=2 --nproc-per-node=4" in ended.err
        assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
class TestKilled:
    """Whichever process is killed however, none is left, and the same command resumes without loss."""

    def test_sigterm_to_the_first(self, whole, folder):
        arguments = [*SMALL, *TWO, "name=stopped", "resume=auto"]
        stopped = crashes.run(arguments, folder, Strike(STEP, 5, signal.SIGTERM))

        assert stopped.code == 143
        assert state_of(run_of(folder, "stopped")) == "stopped"
        assert stopped.out.count("SIGTERM: saved at step 5; resume=auto resumes from there") == 1
        assert stopped.err.splitlines().count("error: stopped by SIGTERM") == 1
        assert "Traceback" not in stopped.err
        assert all_ended(folder, 0)

        ended = crashes.run(arguments, folder)

        assert (ended.code, ended.err) == (0, "")
        assert "resuming" in ended.out
        assert are_equal(whole, run_of(folder, "stopped"))

    def test_sigterm_to_the_second_alone(self, whole, folder):
        arguments = [*SMALL, *TWO, "name=second", "resume=auto"]
        stopped = group(arguments, folder, (), (Strike(STEP, 5, signal.SIGTERM),))

        assert [end.code for end in stopped] == [143, 143]
        assert "saved at step 5" in stopped[0].out
        assert [len(end.err.splitlines()) for end in stopped] == [1, 1]

        assert [end.code for end in group(arguments, folder)] == [0, 0]
        assert are_equal(whole, run_of(folder, "second"))

    def test_sigterm_while_the_first_measures_alone(self, whole, folder):
        arguments = [*SMALL, *TWO, "name=measuring", "resume=auto"]
        stopped = group(arguments, folder, (Strike("vitkd.train.student:measure_both", 1, signal.SIGTERM),))

        assert [end.code for end in stopped] == [143, 1]
        assert stopped[0].err == "error: stopped by SIGTERM\n"
        assert stopped[1].err.startswith(f"error (process 1): {LOST}")
        assert stopped[1].err.count("\n") == 1

        assert [end.code for end in group(arguments, folder)] == [0, 0]
        assert are_equal(whole, run_of(folder, "measuring"))

    def test_kill_9_of_the_second(self, whole, folder):
        arguments = [*SMALL, *TWO, "name=bereft", "resume=auto", "checkpoint_minutes=0"]
        first, second = group(arguments, folder, (), (Strike(STEP, 5),))

        assert (first.code, second.code) == (1, -signal.SIGKILL)
        assert first.err.startswith(f"error: {LOST}")
        assert first.err.count("\n") == 1
        assert state_of(run_of(folder, "bereft")) == "failed"

        assert [end.code for end in group(arguments, folder)] == [0, 0]
        assert are_equal(whole, run_of(folder, "bereft"))

    def test_kill_9_of_the_second_before_they_have_met(self, whole, folder):
        """The first waits for it where nothing would ever wake it."""
        process = crashes.start([*SMALL, *TWO, "name=alone"], folder)
        os.kill(other_process(process), signal.SIGKILL)
        start = time.monotonic()

        ended = crashes.end(process, folder)

        assert time.monotonic() - start < 20
        assert ended.code == 1
        assert "error: a process of this run ended with code -9" in ended.out + ended.err
        assert "Traceback" not in ended.err
        assert all_ended(folder, 0)

    def test_kill_9_of_the_first(self, whole, folder):
        arguments = [*SMALL, *TWO, "name=orphaned", "resume=auto"]
        process = crashes.start(arguments, folder, Strike(STEP, 5))

        assert crashes.end(process, folder).code == -signal.SIGKILL
        assert all_ended(folder, 15)
        message = (folder / f"{process.pid}.err").read_text()
        assert message.startswith(f"error (process 1): {LOST}")
        assert message.count("\n") == 1

        ended = crashes.run(arguments, folder)

        assert (ended.code, ended.err) == (0, "")
        assert are_equal(whole, run_of(folder, "orphaned"))


@pytest.mark.slow
def test_kill_9_of_a_run_ends_the_workers_that_read_its_images(tmp_path):
    for number in range(80):
        (tmp_path / "photos" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "photos" / f"{number % 2}" / f"{number}.png")
    photos = ["dataset=image_folder", "dataset.root=photos", "dataset.image_size=8", "dataset.patch_size=4"]
    photos += ["dataset.resident_limit_gib=0", "dataset.workers=2", "dataset.batch_size=12", "method=none"]

    killed = crashes.run([*SMALL, *photos], tmp_path, Strike(STEP, 3))

    assert killed.code == -signal.SIGKILL, killed.err
    assert all_ended(tmp_path.resolve(), 15)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_ends_both_before_the_step(whole, folder):
    arguments = [*SMALL, *TWO, "name=poisoned", "resume=auto"]
    first, second = group(arguments, folder, target=poisoned)

    assert (first.code, second.code) == (1, 1)
    for prefix, ended in (("error: ", first), ("error (process 1): ", second)):
        assert ended.err.startswith(f"{prefix}step 5 (epoch 2) is not finite: ")
        assert ended.err.count("\n") == 1
    # Only the second knows which images did it.
    assert "class loss nan" in second.err
    assert "class loss nan" not in first.err
    assert state_of(run_of(folder, "poisoned")) == "failed"

    assert [end.code for end in group(arguments, folder)] == [0, 0]
    assert are_equal(whole, run_of(folder, "poisoned"))


class Host:
    """A network namespace with a name, an address and the processes in it."""

    def __init__(self, number: int, mark: str) -> None:
        self.name, self.device, self.number = f"vitkd{mark}{number}", f"v{mark}{number}", number
        self.address = f"10.213.7.{number}"

    def start(self, endpoint: str, arguments: Sequence[str], cwd: Path) -> "subprocess.Popen[str]":
        """What is typed on this host."""
        # On each host: --local-addr, or torchrun tells the others the host's name; is_host, or it looks for
        # the endpoint behind that name; the variable, or gloo listens where that name leads. Where the name
        # leads to the right network, as on most clusters, none of these is needed.
        torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        torchrun += [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf=is_host={int(self.number == 1)}"]
        torchrun += [f"--local-addr={self.address}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.device}
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.name,
                sys.executable,
                "-m",
                *torchrun,
                "-m",
                "vitkd.train",
                *arguments,
            ],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill_all(self) -> None:
        """Pull the plug."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout
        for process in listed.split():
            os.kill(int(process), signal.SIGKILL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them and one file system."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    mark = f"{os.getpid() % 10000}h"
    pair = Host(1, mark), Host(2, mark)
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip("link", "add", pair[0].device, "type", "veth", "peer", "name", pair[1].device)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for host in pair:
            ip("link", "set", host.device, "netns", host.name)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                ip("-n", host.name, "link", "set", device, "up")
        yield pair
    finally:
        for host in pair:
            host.kill_all()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", pair[0].device], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_of_which_one_dies(hosts, tmp_path):
    settings = ["trainer.num_nodes=2", "trainer.devices=1", "trainer.strategy=ddp", "trainer.max_epochs=60"]
    endpoint = f"{hosts[0].address}:29517"

    def start(name: str) -> list["subprocess.Popen[str]"]:
        arguments = [*SMALL, *settings, f"name={name}", "resume=auto"]
        return [host.start(endpoint, arguments, tmp_path) for host in hosts]

    def codes(processes: list["subprocess.Popen[str]"]) -> list[int]:
        outputs = [process.communicate(timeout=120) for process in processes]
        print(*(text for out in outputs for text in out), sep="\n")
        return [process.returncode for process in processes]

    assert codes(start("whole")) == [0, 0]
    killed = start("killed")
    while not (run_of(tmp_path, "killed") / "checkpoints" / "last.ckpt").exists():
        assert [process.poll() for process in killed] == [None, None]
        time.sleep(0.01)
    hosts[1].kill_all()
    first, second = codes(killed)

    assert first > 0
    assert second < 0
    assert state_of(run_of(tmp_path, "killed")) == "failed"
    assert not (run_of(tmp_path, "killed") / "metrics.json").exists()

    assert codes(start("killed")) == [0, 0]
    assert are_equal(run_of(tmp_path, "whole"), run_of(tmp_path, "killed"))
