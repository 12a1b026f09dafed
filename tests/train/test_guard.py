"""What is not finite is reported with its step, and never reaches the weights."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tests.train.objectives import compare_maps
from tests.train.test_fit import Batches, without_validation
from vitkd.data import Batch
from vitkd.errors import RunError
from vitkd.optim import AdamW, Constant
from vitkd.train.guard import FiniteGuard
from vitkd.train.losses import Losses
from vitkd.train.module import DistillModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    without_validation,
]
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def losses(task: float, attention: float = 1.0) -> dict[str, Tensor]:
    return {"class loss": torch.tensor(task), "transfer loss": torch.tensor(attention)}


def state_of(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Weights, moments and step counts, copied."""
    moments = [value for p in parameters for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in [*parameters, *moments]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Steps:
    """A guard beside a fused optimiser, taken step by step."""

    def __init__(self) -> None:
        self.guard = FiniteGuard()
        self.weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))]
        self.optimizer = AdamW(lr=0.1).build(self.weights)

    def take(self, loss: float = 1.0, gradient: float = 1.0, batches: int = 1) -> bool:
        """One step; whether the guard could hold it back by itself."""
        for batch in range(batches):
            self.guard.watch(losses(loss), torch.tensor([10 * batch, 10 * batch + 1]))
        for weight in self.weights:
            weight.grad = torch.full_like(weight, gradient)
        holds = self.guard.hold_back(self.optimizer, self.weights)
        self.optimizer.step()
        return holds

    def state(self) -> list[Tensor]:
        return state_of(self.optimizer, self.weights)


@pytest.fixture
def on_device(monkeypatch) -> Steps:
    """Steps whose figures seem to lie on a device; the CPU's fused AdamW heeds the guard's flag as well."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    return Steps()


@BAD
@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_on_a_device_a_bad_step_is_left_out_and_so_are_all_after_it(which, bad, on_device):
    for _ in range(3):
        assert on_device.take()
    before = on_device.state()

    on_device.take(**{which: bad})
    assert same(on_device.state(), before)
    for _ in range(3):
        on_device.take()

    assert same(on_device.state(), before)
    with pytest.raises(RunError, match=r"^step 14 \(epoch 2\) is not finite"):
        on_device.guard.check(step=17, epoch=2)


def test_on_a_device_the_first_step_of_all_can_be_held_back(on_device):
    on_device.take(gradient=math.nan)

    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in on_device.weights)
    assert not any(moment.any() for moment in on_device.state()[2:])


def test_on_a_device_good_steps_are_those_without_a_guard(on_device):
    alone = Steps()
    for _ in range(3):
        on_device.take()
        for weight in alone.weights:
            weight.grad = torch.ones_like(weight)
        alone.optimizer.step()

    assert same(on_device.state(), alone.state())


def test_on_a_device_a_check_in_between_changes_nothing(on_device):
    for step in range(1, 4):
        on_device.take()
        on_device.guard.check(step, epoch=1)
    before = on_device.state()

    on_device.take(loss=math.nan)

    assert same(on_device.state(), before)
    with pytest.raises(RunError, match=r"^step 4 \(epoch 1\)"):
        on_device.guard.check(4, epoch=1)


def test_after_it_was_reported_training_may_start_again(on_device):
    """In a notebook: with the same module, a new optimiser and, say, a lower learning rate."""
    on_device.take(loss=math.nan)
    with pytest.raises(RunError):
        on_device.guard.check(1, epoch=1)
    on_device.optimizer = AdamW(lr=0.1).build(on_device.weights)
    before = on_device.state()

    on_device.take()
    on_device.guard.check(1, epoch=1)

    assert not same(on_device.state()[:2], before[:2])


def test_on_the_cpu_the_step_has_to_wait_for_a_check():
    assert not Steps().take()


def test_an_optimiser_that_heeds_no_flag_has_to_wait_for_a_check(on_device):
    on_device.optimizer = torch.optim.AdamW(on_device.weights, fused=False)

    assert not on_device.take()


@BAD
@pytest.mark.parametrize("term", ["class loss", "transfer loss"])
def test_the_terms_step_epoch_and_images_are_named(term, bad):
    steps = Steps()
    steps.guard.watch(losses(0.5, 0.25) | {term: torch.tensor(bad)}, torch.tensor([7, 3, 41]))
    steps.guard.hold_back(steps.optimizer)

    with pytest.raises(RunError) as raised:
        steps.guard.check(step=12, epoch=4)

    message = str(raised.value)
    other = "transfer loss 0.25" if term == "class loss" else "class loss 0.5"
    assert message.startswith("step 12 (epoch 4) is not finite: ")
    assert f"{term} {bad:.4g}" in message
    assert other in message
    assert "on training images 7, 3, 41; it was not taken" in message
    assert "\n" not in message


def test_of_many_images_the_first_are_named():
    guard = FiniteGuard()
    guard.watch(losses(math.nan), torch.arange(100))

    with pytest.raises(RunError, match=r"images 0, 1, .*, 15, …;"):
        guard.check(1, 1)


def test_the_first_bad_step_of_several_is_named(on_device):
    steps = on_device
    for loss in (1.0, 1.0, math.inf, math.nan):
        steps.take(loss)

    with pytest.raises(RunError, match=r"^step 99 \(epoch 5\) is not finite: class loss inf"):
        steps.guard.check(step=100, epoch=5)


def test_of_accumulated_batches_the_bad_one_is_named():
    steps = Steps()
    steps.take(batches=3)
    steps.guard.check(step=1, epoch=1)
    steps.guard.watch(losses(1.0), torch.tensor([1, 2]))
    steps.guard.watch(losses(math.nan), torch.tensor([3, 4]))
    steps.guard.watch(losses(1.0), torch.tensor([5, 6]))
    steps.guard.hold_back(steps.optimizer, steps.weights)

    with pytest.raises(RunError, match=r"^step 2 \(epoch 1\).*images 3, 4;"):
        steps.guard.check(step=2, epoch=1)


def test_what_was_checked_is_forgotten():
    steps = Steps()
    for step in (1, 2, 3):
        steps.take()
        steps.guard.check(step, epoch=1)

    assert not steps.guard._seen
    steps.guard.check(3, epoch=1)


class Watch(L.Callback):
    """Notes what training left after every step: weights, moments, step counts."""

    def __init__(self) -> None:
        self.states: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.states.append(state_of(trainer.optimizers[0], [*module.model.parameters()]))


@pytest.fixture
def fit(tmp_path) -> Callable[..., RunError | None]:
    """fit(module, batches) trains on the CPU and returns the error that ended it, if one did."""

    def fit(module: DistillModule, train: Batches, **settings: Any) -> RunError | None:
        defaults = {"max_epochs": 3, "log_every_n_steps": 100, "logger": False, "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            num_sanity_val_steps=0,
            **(defaults | quiet | settings),
        )
        try:
            trainer.fit(module, train)
        except RunError as error:
            return error
        return None

    return fit


@pytest.fixture
def module(tiny) -> DistillModule:
    student, teacher = tiny().build(), tiny(depth=6).build()
    objective = compare_maps(student, teacher)
    return DistillModule(student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=0.5)


def spoil(what: str, bad: float, number: int, module: DistillModule) -> None:
    """Make one term of training batch `number` (from 1) `bad`."""
    losses_of, batches = module.losses, 0

    def changed(batch: Batch) -> Losses:
        nonlocal batches
        batches += 1
        losses = losses_of(batch)
        if batches != number or what == "gradient norm":
            return losses
        if what == "class loss":
            return losses._replace(class_loss=losses.class_loss + bad)
        return losses._replace(transfer=losses.transfer._replace(loss=losses.transfer.loss + bad))

    module.losses = changed
    if what == "gradient norm":
        module.model.head.weight.register_hook(lambda grad: grad + bad if batches == number else grad)


@BAD
@pytest.mark.parametrize("what", ["class loss", "transfer loss", "gradient norm"])
def test_a_fit_ends_before_the_bad_step_and_names_it(what, bad, module, fit):
    """Epochs of 3 batches: number 5 is step 5, of epoch 2."""
    train, watch = Batches(4, 4, 4), Watch()
    for number, batch in enumerate(train.batches):
        batch.index.add_(100 * number)
    spoil(what, bad, 5, module)

    error = fit(module, train, callbacks=[watch])

    assert str(error).startswith("step 5 (epoch 2) is not finite: ")
    # A norm is never negative.
    assert f"{what} {abs(bad) if what == 'gradient norm' else bad:.4g}" in str(error)
    assert "on training images 100, 101, 102, 103;" in str(error)
    assert len(watch.states) == 4
    optimizer = module.trainer.optimizers[0]
    assert same(state_of(optimizer, [*module.model.parameters()]), watch.states[-1])


@pytest.mark.parametrize("what", ["class loss", "gradient norm"])
def test_with_accumulated_batches_the_step_is_counted_and_not_the_batch(what, module, fit):
    """Epochs of 5 batches and 3 steps: batch 8 is the third of epoch 2, so of its second step."""
    train, watch = Batches(4, 4, 4, 4, 4), Watch()
    for number, batch in enumerate(train.batches):
        batch.index.add_(100 * number)
    spoil(what, math.nan, 8, module)

    error = fit(module, train, callbacks=[watch], accumulate_grad_batches=2)

    assert str(error).startswith(f"step 5 (epoch 2) is not finite: {what} nan")
    if what == "class loss":
        assert "on training images 200, 201, 202, 203;" in str(error)
    parameters = [*module.model.parameters()]
    # Nothing has changed since the batch that ended step 4.
    assert same(state_of(module.trainer.optimizers[0], parameters), watch.states[6])


def test_a_gradient_is_looked_at_before_it_is_clipped(module, fit):
    """Clipped, an infinite one would make nan of all the others."""
    watch = Watch()
    spoil("gradient norm", math.inf, 2, module)

    error = fit(module, Batches(4, 4, 4), callbacks=[watch], gradient_clip_val=1.0)

    assert str(error).startswith("step 2 (epoch 1) is not finite: gradient norm inf")
    assert same(state_of(module.trainer.optimizers[0], [*module.model.parameters()]), watch.states[0])


@pytest.mark.parametrize(("every", "stopped_at"), [(1, 5), (2, 6), (100, 6)])
def test_on_a_device_it_is_reported_with_the_next_figures(every, stopped_at, module, fit, monkeypatch):
    """Epochs of 3 steps: step 5 is bad, and figures are due at `every` steps and at an epoch's end."""
    watch = Watch()
    spoil("class loss", math.nan, 5, module)
    original = FiniteGuard.hold_back

    def hold_back(self: FiniteGuard, *args: Any) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "is_cuda", True)
            return original(self, *args)

    monkeypatch.setattr(FiniteGuard, "hold_back", hold_back)

    error = fit(module, Batches(4, 4, 4), callbacks=[watch], log_every_n_steps=every)

    assert str(error).startswith("step 5 (epoch 2) is not finite: class loss nan")
    assert module.trainer.global_step == stopped_at
    after = state_of(module.trainer.optimizers[0], [*module.model.parameters()])
    assert same(after, watch.states[3])
    assert all(same(state, watch.states[3]) for state in watch.states[4:])


def test_nothing_that_is_bad_is_ever_saved(module, fit, monkeypatch, tmp_path):
    """A step's end may be saved while the device still holds steps back."""
    monkeypatch.setattr(FiniteGuard, "hold_back", lambda *_: True)
    spoil("class loss", math.nan, 2, module)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    error = fit(module, Batches(4, 4, 4), callbacks=[Save()])

    assert "class loss nan" in str(error)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["1.ckpt"]


def test_overflow_under_16_mixed_is_left_to_its_scaler(module, fit, monkeypatch):
    """There gradients that are too large are everyday: the scale is halved, and the step left out."""
    watched = []
    original = FiniteGuard.hold_back

    def hold_back(self: FiniteGuard, optimizer: Any, parameters: Any = ()) -> bool:
        watched.append([*parameters])
        return original(self, optimizer, parameters)

    monkeypatch.setattr(FiniteGuard, "hold_back", hold_back)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    module.trainer = trainer
    for precision, looks in (("16-mixed", False), ("bf16-mixed", True), ("32-true", True)):
        monkeypatch.setattr(type(trainer), "precision", precision)
        module.guard.watch(losses(1.0), torch.arange(2))
        module.on_before_optimizer_step(AdamW().build(module.model.parameters()))
        assert bool(watched.pop()) is looks, precision


def test_a_loss_that_is_not_finite_is_reported_under_16_mixed_too(module, monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    monkeypatch.setattr(type(trainer), "precision", "16-mixed")
    module.guard.watch(losses(math.nan), torch.arange(2))

    with pytest.raises(RunError, match="class loss nan"):
        module.on_before_optimizer_step(AdamW().build(module.model.parameters()))


def test_a_copy_has_a_guard_of_its_own(module):
    copy = deepcopy(module)
    module.guard.watch(losses(math.nan), torch.arange(2))

    copy.guard.check(1, 1)
