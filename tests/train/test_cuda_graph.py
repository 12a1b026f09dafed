"""Training by replays is training: played on the CPU, where a replay runs the captured function once more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.train.objectives import compare_maps
from tests.train.test_fit import Batches, without_validation
from vitkd.data import Batch
from vitkd.errors import RunError
from vitkd.optim import AdamW, WarmupCosine
from vitkd.process import isolation
from vitkd.train import cuda_graph
from vitkd.train.callbacks import CudaGraphs, set_capturable, why_not
from vitkd.train.cuda_graph import WARM_UP, CaptureError, GraphedStep, SideStream
from vitkd.train.fit import run_trainer
from vitkd.train.logged import Meter
from vitkd.train.module import DistillModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*"),
    without_validation,
]


class Recording:
    """Replays what was captured by running it; as with a graph, the host notes nothing but the capture."""

    def __init__(self, work: Callable[[], None], meter: Meter | None = None) -> None:
        self.work, self.meter, self.replays = work, meter, 0

    def replay(self) -> None:
        before = self.meter.counts() if self.meter else None
        self.work()
        if self.meter and self.replays:
            self.meter.set_counts(before)
        self.replays += 1


def at_once(work: Callable[[], None]) -> None:
    work()


class Played(L.Callback):
    """As `CudaGraphs`, on the CPU."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        def capture(work: Callable[[], None]) -> Recording:
            self.recordings.append(Recording(work, pl_module.window.meter))
            return self.recordings[-1]

        pl_module.graph = GraphedStep(pl_module.whole_step, capture, at_once)


class Curves(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        figures = {k: v.item() for k, v in trainer.callback_metrics.items() if "per_second" not in k}
        self.seen.append((trainer.global_step, figures))


@pytest.fixture
def module(tiny) -> DistillModule:
    student, teacher = tiny(dropout=0.1).build(), tiny(depth=6).build()
    objective = compare_maps(student, teacher)
    return DistillModule(
        student, AdamW(lr=1e-2), WarmupCosine(), teacher=teacher, objective=objective, alpha=0.5
    )


def fit(module: DistillModule, folder: Any, *callbacks: L.Callback, batches: Any = None, **settings: Any):
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"log_every_n_steps": 4, **settings},
    )
    trainer.fit(module, batches or Batches(*[4] * 7))
    return trainer


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}])
def test_weights_and_curves_are_those_of_steps_taken_one_by_one(module, tmp_path, settings):
    eager, played, curves, expected = deepcopy(module), Played(), Curves(), Curves()

    by_replay = fit(module, tmp_path, played, curves, **settings)
    one_by_one = fit(eager, tmp_path, expected, **settings)

    assert by_replay.global_step == one_by_one.global_step == 21
    for mine, theirs in zip(module.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert [step for step, _ in curves.seen] == list(range(1, 22))
    for (_, mine), (_, theirs) in zip(curves.seen, expected.seen, strict=True):
        assert mine == pytest.approx(theirs)
    # Of 21 steps six begin a window; of either kind three warm up and the rest are replays of one capture.
    plain, logged = played.recordings
    assert (plain.replays, logged.replays) == (21 - 6 - WARM_UP, 6 - WARM_UP)


def test_a_step_that_cannot_be_captured_is_taken_as_ever_and_the_reason_reported(module, tmp_path, caplog):
    eager, curves, expected = deepcopy(module), Curves(), Curves()

    class Refused(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            def capture(work: Callable[[], None]) -> Recording:
                # What the host has done by the time that CUDA refuses.
                pl_module.window.meter.count(pl_module.window.meter.names, 4)
                pl_module.guard.watch({"class loss": torch.tensor(torch.nan)}, torch.arange(4))
                raise RuntimeError("operation not permitted when stream is capturing")

            pl_module.graph = GraphedStep(pl_module.whole_step, capture, at_once)

    with caplog.at_level("INFO", logger="vitkd"):
        fit(module, tmp_path, Refused(), curves)
    fit(eager, tmp_path, expected)

    assert all(map(torch.equal, module.model.parameters(), eager.model.parameters()))
    assert curves.seen == expected.seen
    reasons = [line for line in caplog.messages if "no CUDA graph" in line]
    assert reasons == [
        "no CUDA graph: operation not permitted when stream is capturing; cuda_graph=off leaves it at that"
    ]


def test_settings_of_a_graph_do_not_outlive_it():
    """A checkpoint's optimiser may have trained by graph, on another device."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW(lr=0.25).build([weight])

    set_capturable(optimizer, True, weight.device)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    set_capturable(optimizer, False, weight.device)

    weight.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - 0.25 * 0.01 - 0.25))


def test_everything_a_step_reads_or_leaves_keeps_its_place_in_memory(module, tmp_path):
    """Else a real graph would read what is freed, or leave what nobody sees."""
    places: list[set[int]] = []

    def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
        return [value for moments in optimizer.state.values() for value in moments.values()]

    class Places(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            tensors = [
                *pl_module.model.parameters(),
                *state(trainer.optimizers[0]),
                *pl_module.window.meter._sums.values(),
                *(pl_module.graph._batch or ())[:3],
            ]
            places.append({tensor.data_ptr() for tensor in tensors})

    fit(module, tmp_path, Played(), Places())

    settled = places[WARM_UP + 2 :]
    assert all(place == settled[0] for place in settled)


def test_a_batch_of_another_size_is_captured_again(module, tmp_path):
    played = Played()

    fit(module, tmp_path, played, batches=Batches(4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2), log_every_n_steps=50)

    assert len(played.recordings) > 1


def test_what_a_graph_was_given_is_its_own():
    """The loader may free or reuse its batches."""
    taken: list[Tensor] = []
    step = GraphedStep(lambda batch: taken.append(batch.image.sum()), Recording, at_once)
    labels, index = torch.zeros(2).long(), torch.arange(2)

    replays = [step.take(Batch(torch.full((2, 1, 1, 1), float(n)), labels, index)) for n in range(6)]

    assert [value.item() for value in taken] == [0, 2, 4, 6, 8, 10]
    assert replays == [False] * (WARM_UP + 1) + [True] * (5 - WARM_UP)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"accumulate_grad_batches": 2}, "2 batches"),
        ({"gradient_clip_val": 1.0}, None),
        ({"detect_anomaly": True}, "detect_anomaly"),
    ],
)
def test_what_keeps_steps_from_being_replayed_is_reported(settings, reason, monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **settings)
    monkeypatch.setattr(torch, "is_anomaly_enabled", lambda: "detect_anomaly" in settings)

    found = why_not(trainer)

    assert found is None if reason is None else reason in found


def test_on_the_cpu_nothing_is_graphed(module, tmp_path):
    fit(module, tmp_path, CudaGraphs())

    assert module.graph is None


@pytest.fixture
def cuda(monkeypatch) -> list[tuple[Any, ...]]:
    """A CUDA that notes on which stream and in which pool it captures; an error breaks the capture."""
    captures: list[tuple[Any, ...]] = []

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any, **_: Any) -> Iterator[None]:
        captures.append((pool, stream))
        try:
            yield
        except Exception:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    for name, fake in {"graph": graph, "CUDAGraph": object, "Stream": object}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(isolation, "_device_lost", [])
    return captures


def wait_for_the_device() -> None:
    raise RuntimeError("a step waits for the device")


def test_all_graphs_of_a_step_share_a_stream_and_a_pool(cuda):
    side = SideStream()

    side.capture(lambda: None)
    side.capture(lambda: None)

    assert len(cuda) == 2
    assert cuda[0] == cuda[1]


def test_the_reason_is_the_first_error_not_that_of_the_captures_end(cuda, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CAN_CONTINUE", True)
    step = GraphedStep(lambda batch: wait_for_the_device(), SideStream().capture, lambda work: None)
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1))
    for _ in range(WARM_UP):
        step.take(batch)

    with pytest.raises(CaptureError, match=r"^a step waits for the device$"):
        step.take(batch)


def test_memory_that_a_capture_lacks_is_reported_as_such(cuda, monkeypatch):
    """So that a stack is halved."""
    monkeypatch.setattr(cuda_graph, "CAN_CONTINUE", True)

    def take_too_much(batch: Batch) -> None:
        raise torch.OutOfMemoryError("too much")

    step = GraphedStep(take_too_much, SideStream().capture, lambda work: None)
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.zeros(1))
    for _ in range(WARM_UP):
        step.take(batch)

    with pytest.raises(torch.OutOfMemoryError, match="too much"):
        step.take(batch)


class TestWherePyTorchCannotContinue:
    """Before 2.12 a failed capture leaves the allocator as in a capture: nothing may allocate any more."""

    @pytest.fixture(autouse=True)
    def old(self, cuda, monkeypatch):
        monkeypatch.setattr(cuda_graph, "CAN_CONTINUE", False)

    def test_the_run_ends_with_what_helps(self, module, tmp_path):
        class Graphed(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
                side = SideStream()

                def capture(work: Callable[[], None]) -> Any:
                    return side.capture(wait_for_the_device)

                pl_module.graph = GraphedStep(pl_module.whole_step, capture, at_once)

        with pytest.raises(RunError, match=r"\(a step waits for the device\).*add cuda_graph=off$"):
            fit(module, tmp_path, Graphed())

    def test_no_job_of_the_process_uses_the_device_after_that(self):
        with pytest.raises(RunError):
            SideStream().capture(wait_for_the_device)

        isolation.check_device(torch.device("cpu"))
        with pytest.raises(RunError, match=r"earlier job.*cuda_graph=off$"):
            isolation.check_device(torch.device("cuda"))

    def test_its_memory_is_not_touched(self, monkeypatch):
        with pytest.raises(RunError):
            SideStream().capture(wait_for_the_device)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", wait_for_the_device)

        isolation.free_memory()

    def test_an_error_of_clearing_the_device_does_not_hide_the_first(self):
        class Clearing:
            def fit(self, *_: Any, **__: Any) -> None:
                try:
                    SideStream().capture(wait_for_the_device)
                finally:
                    raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

        with pytest.raises(RunError, match="cuda_graph=off"):
            run_trainer(cast(Any, Clearing()), cast(Any, None), cast(Any, None), None)
