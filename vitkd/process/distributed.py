"""Several processes for one run: who starts them, and how they agree.

They find each other by the environment variables that torchrun sets. Under torchrun, on one host or on many,
they all exist already; a plain command starts the others on its host. The first process decides and writes;
the others follow.

A plain command does not use torchrun's launcher (torch.distributed.run): after SIGKILL that leaves workers
running, after SIGTERM it ends with code 1 instead of 143, and each error takes it some 40 lines. As a process
above the training ones, it would also have to bring back what a multirun's table and sweeper read of a job.
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

# How long the others wait for the first process, which may wait for a teacher that another run trains, or
# measure by itself. In training, PyTorch's own limits hold.
DECISION_TIMEOUT = timedelta(days=7)
GRACE_SECONDS = 10
_RUN_ID = "TORCHELASTIC_RUN_ID"
_OWN_RUN_ID = "vitkd"
_decisions: Any = None
"""the process group for decisions, with its own time limit"""


def rank() -> int:
    """The number of this process among those of its run, from 0."""
    return int(os.environ["RANK"]) if _RUN_ID in os.environ else 0


def is_first() -> bool:
    """Whether this is the process that decides, writes and logs."""
    return rank() == 0


def agree(decide: Callable[[], T]) -> T:
    """What `decide` returns in the first process, in all processes.

    If it raises there, so it does here; the other processes raise a RunError.
    """
    if not dist.is_initialized():
        return decide()
    decision: list[Any] = [None, False]
    raised = None
    if is_first():
        try:
            decision[0] = decide()
        except Exception as error:
            raised, decision[1] = error, True
    dist.broadcast_object_list(decision, src=0, group=_decisions)
    value, has_failed = decision
    if raised is not None:
        raise raised
    if has_failed:
        raise RunError("the first process failed; its own line says why")
    return cast(T, value)


def gather(tensor: Tensor) -> Tensor:
    """[processes, ...]: the tensor [...] of every process, on the CPU."""
    if not dist.is_initialized():
        return tensor.cpu()[None]
    gathered = [torch.empty_like(tensor, device="cpu") for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.cpu(), group=_decisions)
    return torch.stack(gathered)


def rows_of_all(tensor: Tensor) -> Tensor:
    """[processes · B, ...]: the tensors [B, ...] of all processes, on this one's device, without gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor.detach()
    own = tensor.detach().contiguous()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    return torch.cat(gathered)


def wait_for_all() -> None:
    """Return when all processes have called it."""
    if dist.is_initialized():
        dist.barrier(_decisions)


@contextmanager
def joined(count: int, hosts: int, command: Sequence[str]) -> Iterator[None]:
    """Connect the `count` processes of a run while the body runs; one needs no connection.

    Args:
        count: processes over all hosts.
        hosts: if there are several, the user starts torchrun on each.
        command: starts one more process like this one.

    Raises:
        ConfigError: torchrun has started another number of processes.
        RunError: another process has ended.
    """
    if _RUN_ID in os.environ and (started := int(os.environ["WORLD_SIZE"])) != count:
        raise ConfigError(
            f"trainer.devices and num_nodes ask for {count} process(es), torchrun has started {started};"
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
    if hosts > 1 and _RUN_ID not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={hosts}: on every host start torchrun --nnodes={hosts}"
            f" --nproc-per-node={count // hosts} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
            " -m vitkd.train with the same settings"
        )
    if os.environ.get(_RUN_ID) == _OWN_RUN_ID:
        _end_with_parent()
    with nullcontext() if _RUN_ID in os.environ else _companions(count, command), _connected():
        yield


@contextmanager
def _connected() -> Iterator[None]:
    """Connect to the other processes, and disconnect when the body ends."""
    global _decisions
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _decisions = dist.new_group(backend="gloo", timeout=DECISION_TIMEOUT)
    try:
        yield
        wait_for_all()
    except RunError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(
            "the connection to another process of this run is lost; if that one printed no error, it was"
            " killed: the same command with resume=auto resumes from the last checkpoint"
        ) from error
    finally:
        _decisions = None
        dist.destroy_process_group()


@contextmanager
def _companions(count: int, command: Sequence[str]) -> Iterator[None]:
    """Start the other processes, set the ranks of all, and end the others when the body ends."""
    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    group = {
        _RUN_ID: _OWN_RUN_ID,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # all connect to the store above
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
            _await_end(other)


def _watch(others: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process if another one fails before all are connected: nothing else would wake it.

    Once connected, this process reports the lost connection itself.
    """
    while not dist.is_initialized():
        if failed := [other for other in others if other.poll()]:
            print(f"error: a process of this run ended with code {failed[0].returncode}", file=sys.stderr)
            os._exit(1)
        time.sleep(0.2)


def _end_with_parent() -> None:
    """End this process when the one that started it ends, whatever it is waiting for."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _await_end(other: subprocess.Popen[bytes]) -> None:
    """Wait for a process to end; terminate it after `GRACE_SECONDS`, kill it after twice as long."""
    for stop in (other.terminate, other.kill):
        try:
            other.wait(GRACE_SECONDS)
            return
        except subprocess.TimeoutExpired:
            stop()
    other.wait()
