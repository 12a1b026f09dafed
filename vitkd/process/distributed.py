"""Several processes for one run: who starts them, and how they agree.

They know of each other by the environment variables that torchrun sets. Started by torchrun, on one host or
on many, they are all there already; started as one plain command, this one starts the others on its host.
The first process decides and writes; the others follow.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from vitkd.errors import ConfigError, RunError

log = logging.getLogger("vitkd")

T = TypeVar("T")

# The others wait for the first one's decisions as long as that waits for a teacher that another run trains,
# or measures by itself. In training, PyTorch's own limits hold.
PATIENCE = timedelta(days=7)
GRACE_SECONDS = 10
_LAUNCHED = "TORCHELASTIC_RUN_ID"
_OURS = "vitkd"
_patient: Any = None


def rank() -> int:
    """The number of this process among those of its run, from 0."""
    return int(os.environ["RANK"]) if _LAUNCHED in os.environ else 0


def is_first() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return rank() == 0


def agree(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all of them; an error that it raises, too."""
    if not dist.is_initialized():
        return decide()
    box: list[Any] = [None, False]
    raised = None
    if is_first():
        try:
            box[0] = decide()
        except Exception as error:
            raised, box[1] = error, True
    dist.broadcast_object_list(box, src=0, group=_patient)
    value, has_failed = box
    if raised is not None:
        raise raised
    if has_failed:
        raise RunError("the first process tells what is wrong")
    return cast(T, value)


def gather(tensor: Tensor) -> Tensor:
    """[processes, ...]: the tensor [...] of every process, on the CPU."""
    if not dist.is_initialized():
        return tensor.cpu()[None]
    all_of_them = [torch.empty_like(tensor, device="cpu") for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, tensor.cpu(), group=_patient)
    return torch.stack(all_of_them)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier(_patient)


@contextmanager
def joined(count: int, hosts: int, command: Sequence[str]) -> Iterator[None]:
    """Connect the `count` processes of a run while the body runs; one needs no connection.

    Args:
        count: processes over all hosts.
        hosts: on each of which torchrun has to be started, if there are several.
        command: starts one more process like this one.

    Raises:
        ConfigError: there are not so many processes.
        RunError: another one has ended.
    """
    if _LAUNCHED in os.environ and (found := int(os.environ["WORLD_SIZE"])) != count:
        raise ConfigError(
            f"trainer.devices and num_nodes ask for {count} process(es), torchrun has started {found};"
            " make them equal"
        )
    if count == 1:
        try:
            yield
        finally:
            if dist.is_initialized():
                # Lightning makes a group of one for strategy=ddp, and would leave it to the next job.
                dist.destroy_process_group()
        return
    if hosts > 1 and _LAUNCHED not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={hosts}: on every host start torchrun --nnodes={hosts}"
            f" --nproc-per-node={count // hosts} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
            " -m vitkd.train with the same settings"
        )
    if os.environ.get(_LAUNCHED) == _OURS:
        _end_with_parent()
    with nullcontext() if _LAUNCHED in os.environ else _companions(count, command), _connected():
        yield


@contextmanager
def _connected() -> Iterator[None]:
    """Meet the other processes, and part from them in order."""
    global _patient
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
        wait_for_all()
    except RunError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(
            "the connection to another process of this run is lost; if that one tells of no error, it was"
            " killed: the same command with resume=auto goes on from the last checkpoint"
        ) from error
    finally:
        _patient = None
        dist.destroy_process_group()


@contextmanager
def _companions(count: int, command: Sequence[str]) -> Iterator[None]:
    """Start the other processes, tell them and this one who is who, and see to their end."""
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    group = {
        _LAUNCHED: _OURS,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, for all of them
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    before = dict(os.environ)
    others = []
    try:
        for number in range(1, count):
            os.environ.update(group, RANK=str(number), LOCAL_RANK=str(number))
            others.append(subprocess.Popen([*command]))
        os.environ.update(RANK="0", LOCAL_RANK="0")
        threading.Thread(target=_watch, args=(others,), daemon=True).start()
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for other in others:
            _see_off(other)


def _watch(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process should another one fail before all have met: nothing else would wake it.

    Later the connection breaks, and this process tells the tale itself.
    """
    while not dist.is_initialized():
        if failed := [other for other in others if other.poll()]:
            print(f"error: a process of this run ended with code {failed[0].returncode}", file=sys.stderr)
            os._exit(1)
        time.sleep(0.2)


def _end_with_parent() -> None:
    """Let this process end when the one that started it does, whatever it may be waiting for."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _see_off(other: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process, and bring it about if it does not come."""
    for bring_about in (other.terminate, other.kill):
        try:
            other.wait(GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            bring_about()
    other.wait()
