"""Whatever a job changes in the process is as before when it ends."""

import os
import pickle
import random
import signal
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vitkd.process.isolation import isolated, set_matmul_precision
from vitkd.process.signals import set_signal_handlers

backends: Any = torch.backends
CPU = torch.device("cpu")

Setting = tuple[Callable[[], Any], Callable[[], Any]]


def attribute(owner: Any, name: str, value: object) -> Setting:
    """A setting that is an attribute, and a job that sets it."""
    return lambda: getattr(owner, name), lambda: setattr(owner, name, value)


# What tells how the process stands, and a job that changes it.
SETTINGS: dict[str, Setting] = {
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True),
    ),
    "deterministic=warn": (
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "fill_uninitialized_memory": attribute(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "cudnn.benchmark": attribute(backends.cudnn, "benchmark", True),
    "cudnn.deterministic": attribute(backends.cudnn, "deterministic", True),
    "cudnn.allow_tf32": attribute(backends.cudnn, "allow_tf32", False),
    "cuda.matmul.allow_tf32": attribute(backends.cuda.matmul, "allow_tf32", True),
    "matmul precision": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "fp32_precision": attribute(backends, "fp32_precision", "tf32"),
    "cudnn.fp32_precision": attribute(backends.cudnn, "fp32_precision", "ieee"),
    "cudnn.conv": attribute(backends.cudnn.conv, "fp32_precision", "ieee"),
    "cudnn.rnn": attribute(backends.cudnn.rnn, "fp32_precision", "ieee"),
    "cuda.matmul": attribute(backends.cuda.matmul, "fp32_precision", "tf32"),
    "mkldnn.matmul": attribute(backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "mkldnn.conv": attribute(backends.mkldnn.conv, "fp32_precision", "bf16"),
    "mkldnn.rnn": attribute(backends.mkldnn.rnn, "fp32_precision", "bf16"),
    "cuDNN's attention": (
        backends.cuda.cudnn_sdp_enabled,
        lambda: backends.cuda.enable_cudnn_sdp(not backends.cuda.cudnn_sdp_enabled()),
    ),
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(3)),
    "anomaly": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "torch's numbers": (lambda: torch.get_rng_state().tolist(), lambda: torch.rand(1)),
    "numpy's numbers": (lambda: pickle.dumps(np.random.get_state()), lambda: np.random.rand()),
    "python's numbers": (random.getstate, random.random),
    "a new variable": (lambda: dict(os.environ), lambda: os.environ.update(PL_GLOBAL_SEED="1")),
    "another value": (lambda: dict(os.environ), lambda: os.environ.update(PATH="")),
    "a variable less": (lambda: dict(os.environ), lambda: os.environ.pop("PATH")),
    "a signal": (
        lambda: signal.getsignal(signal.SIGUSR1),
        lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    ),
    "warnings": (lambda: [*warnings.filters], lambda: warnings.simplefilter("ignore")),
}


@pytest.fixture
def without_freeing(monkeypatch):
    """Looking through all that the tests have loaded takes a fifth of a second."""
    monkeypatch.setattr("vitkd.process.isolation.free_memory", lambda: None)


def whole_state() -> dict[str, Any]:
    return {name: read() for name, (read, _) in SETTINGS.items()}


@pytest.mark.usefixtures("without_freeing")
@pytest.mark.parametrize("name", SETTINGS)
def test_is_put_back(name):
    read, change = SETTINGS[name]
    before = whole_state()

    with isolated():
        change()
        assert read() != before[name]

    assert whole_state() == before


@pytest.mark.usefixtures("without_freeing")
@pytest.mark.parametrize("name", SETTINGS)
def test_is_put_back_by_a_job_that_breaks_off(name):
    before = whole_state()

    @isolated()
    def job() -> None:
        SETTINGS[name][1]()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()

    assert whole_state() == before


@pytest.mark.usefixtures("without_freeing")
@pytest.mark.parametrize(("precision", "rounds"), [("highest", False), ("high", True), ("medium", True)])
def test_convolutions_are_as_exact_as_products(precision, rounds):
    """By itself cuDNN rounds to TF32; whatever a job asked for is put back."""
    before = whole_state()

    with isolated():
        set_matmul_precision(precision, CPU)

        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == rounds
        assert torch.backends.cuda.matmul.allow_tf32 == rounds

    assert whole_state() == before


@pytest.mark.usefixtures("without_freeing")
@pytest.mark.parametrize(
    ("device", "precision"), [("cuda:0", "high"), ("cpu", "highest"), ("mps", "highest")]
)
def test_products_are_tf32_on_an_nvidia_gpu_alone_unless_asked_otherwise(device, precision):
    with isolated():
        set_matmul_precision("auto", torch.device(device))

        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.usefixtures("without_freeing")
def test_a_precision_can_be_set_again():
    with isolated():
        for precision in ("high", "highest", "medium", "highest"):
            set_matmul_precision(precision, CPU)

        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "error"), [("highest", (0, 1e-5)), ("high", (1e-4, 1e-2))])
def test_convolutions_and_products_on_a_gpu_are_as_exact_as_asked(precision, error):
    """Against float64."""
    images, kernels = torch.randn(8, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    left, right = torch.randn(256, 256, device="cuda"), torch.randn(256, 256, device="cuda")

    with isolated():
        set_matmul_precision(precision, CPU)
        found = [torch.nn.functional.conv2d(images, kernels), left @ right]

    exact = [torch.nn.functional.conv2d(images.double(), kernels.double()), left.double() @ right.double()]
    for one, other in zip(found, exact, strict=True):
        assert error[0] <= ((one - other).norm() / other.norm()).item() < error[1]


def test_all_at_once():
    before = whole_state()

    with isolated():
        for _, change in SETTINGS.values():
            change()

    assert whole_state() == before


def test_as_a_decorator_each_call_finds_what_the_one_before_found():
    found = []

    @isolated()
    def job() -> None:
        found.append(torch.rand(1))
        torch.set_default_dtype(torch.float64)

    torch.manual_seed(1)
    job()
    job()

    assert found[0].dtype == found[1].dtype == torch.float32
    assert torch.equal(*found)


def test_another_thread_leaves_signals_alone():
    """Python lets the main thread alone set them."""
    entered, changed, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        with isolated():
            entered.set()
            changed.wait(10)
        ended.set()

    thread = threading.Thread(target=job)
    thread.start()
    entered.wait(10)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    changed.set()
    thread.join()

    assert ended.is_set()
    assert signal.signal(signal.SIGUSR1, before) == signal.SIG_IGN


def test_a_signal_that_python_did_not_set_stays():
    """A program around Python may have; there `getsignal` gives None, which `signal` does not take."""
    before = signal.getsignal(signal.SIGUSR1)

    set_signal_handlers({signal.SIGUSR1: None})

    assert signal.getsignal(signal.SIGUSR1) == before


class Trainer:
    """Holds what holds it."""

    def __init__(self) -> None:
        self.itself = self


def test_what_holds_itself_is_freed():
    with isolated():
        trainer = weakref.ref(Trainer())

    assert trainer() is None


def test_the_gpu_is_emptied_once_nothing_holds_its_memory(monkeypatch):
    alive: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(trainer()))

    with isolated():
        trainer = weakref.ref(Trainer())

    assert alive == [None]


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA is in use")
def test_without_a_gpu_in_use_nothing_wakes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("CUDA would be started"))

    with isolated():
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_goes_back_to_it():
    torch.ones(1, device="cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()

    @isolated()
    def job() -> None:
        trainer = Trainer()
        trainer.weights = torch.ones(2**26, device="cuda")

    job()

    assert torch.cuda.memory_reserved() == before
