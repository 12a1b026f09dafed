"""What must hold on a CUDA device: the same views, the same scores, a whole run."""

import csv
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import crashes
from tests.crashes import Strike
from vitkd.data import Batch
from vitkd.data.augment.color_jitter import ColorJitter
from vitkd.data.augment.policies import AutoAugment, RandAugment, TrivialAugment
from vitkd.data.augment.random_erasing import RandomErasing
from vitkd.data.hashing import key_of, random_bits
from vitkd.errors import RunError
from vitkd.models import Taps
from vitkd.optim import SGD, AdamW, Lion
from vitkd.train.cuda_graph import GraphedStep
from vitkd.train.guard import FiniteGuard
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule
from vitkd.train.stacked.dropout import KeyedStreams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_images_draw_the_same_bits_on_every_device():
    index = torch.arange(1000)

    on_cpu = random_bits(key_of(3, 5), index, 4)
    on_gpu = random_bits(key_of(3, 5, device="cuda"), index.cuda(), 4)

    assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize(
    "augmentation",
    [
        *(RandAugment(), AutoAugment(), TrivialAugment(), ColorJitter()),
        *(RandomErasing(p=0.9, value=value, mean=[0.5] * 3, std=[0.2] * 3) for value in ("mean", "random")),
    ],
    ids=repr,
)
def test_augmentations_are_the_cpus_and_never_wait_for_the_device(augmentation):
    pixels = torch.randint(0, 256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    pixels, index = pixels.to(torch.uint8), torch.arange(200)
    expected = augmentation.apply(pixels, index, key_of(3, 5))
    on_gpu = pixels.cuda(), index.cuda(), key_of(3, 5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = augmentation.apply(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    off = (changed.cpu().float() - expected.float()).abs()
    # Rounding: a level here and there, and a sheared pixel that lies midway between two.
    assert (off > 2).double().mean() < 0.005


def test_recorded_scores_equal_the_cpus(tiny):
    model = tiny().build().eval()
    images = torch.randn(4, 3, 8, 8)

    taps = Taps(scores=(0, 2), logits=False)
    on_cpu = model(images, taps).scores
    on_gpu = model.cuda()(images.cuda(), taps).scores

    assert on_cpu.keys() == {0, 2}
    for block, scores in on_cpu.items():
        torch.testing.assert_close(on_gpu[block].cpu(), scores, atol=1e-5, rtol=1e-5)


def test_locality_attentions_fused_path_is_the_recorded_one(tiny):
    model = tiny(attention="lsa", tokenizer="spt", distillation_token=True).build().eval().cuda()
    images = torch.randn(4, 3, 8, 8, device="cuda")

    with torch.no_grad():
        fused, recorded = model(images).logits, model(images, Taps(scores=(0, 1, 2))).logits

    torch.testing.assert_close(fused, recorded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_whole_run(command, tmp_path, precision):
    settings = ["trainer.max_epochs=6", "trainer.accelerator=gpu", f"trainer.precision={precision}"]

    outcome = command("train", f"paths.outputs={tmp_path}", "name=run", *settings)

    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "digits" / "run" / "metrics.json").read_text())
    assert metrics["test/acc_last"] > 0.3
    assert metrics["hardware/device"] == torch.cuda.get_device_name()


# The first ten steps are the teacher's.
@pytest.mark.parametrize("strike", [20, 25], ids=["between-epochs", "within-an-epoch"])
@pytest.mark.parametrize(
    "own",
    [
        ["student.dropout=0.0"],
        ["student.dropout=0.1"],
        ["student.dropout=0.1", "cuda_graph=off"],
        ["student.dropout=0.1", "-m", "hydra/launcher=stacked", "alpha=0.1,0.5"],
    ],
    ids=["no-dropout", "dropout", "dropout-without-graph", "stack"],
)
def test_a_killed_run_ends_as_an_uninterrupted_one_bit_for_bit(tmp_path, own, strike):
    settings = ["trainer=gpu", "trainer.deterministic=true", "trainer.max_epochs=3", "teacher.max_epochs=1"]
    settings += ["+trainer.limit_train_batches=10", "teacher.trainer.limit_train_batches=10"]
    settings += ["name=run${alpha}", "resume=auto", *own]
    step = "vitkd.train.module:DistillModule.training_step"

    def students(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
        weights = (folder / "outputs" / "digits").glob("run*/student.safetensors")
        return {path.parent.name: load_file(path) for path in weights}

    assert crashes.run(settings, tmp_path / "whole").code == 0
    killed = crashes.run([*settings, "checkpoint_minutes=0"], tmp_path / "killed", Strike(step, strike))
    assert killed.code == -signal.SIGKILL
    assert crashes.run(settings, tmp_path / "killed").code == 0

    whole, resumed = students(tmp_path / "whole"), students(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    for run, weights in whole.items():
        assert [name for name in weights if not torch.equal(weights[name], resumed[run][name])] == []


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_a_replay_draws_the_masks_of_a_step_taken_without_a_graph(backend):
    x = torch.randn(2, 4, 37, 16, device="cuda", requires_grad=True)
    drawn: list[torch.Tensor] = [torch.empty_like(x) for _ in range(2)]

    def step(batch: Batch) -> None:
        with sdpa_kernel(backend):
            y = F.dropout(F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), 0.1)
        drawn[0].copy_(y.detach())
        drawn[1].copy_(torch.autograd.grad(y.sum(), x)[0])

    def draws(take: Callable[[Batch], object]) -> list[torch.Tensor]:
        torch.cuda.manual_seed(3)
        found = []
        for _ in range(8):
            take(batch)
            found += [torch.stack(drawn).cpu(), torch.cuda.get_rng_state()]
        return found

    batch = Batch(*[torch.zeros(1, device="cuda")] * 3)
    for one_by_one, replayed in zip(draws(step), draws(GraphedStep(step).take), strict=True):
        assert torch.equal(one_by_one, replayed)


def test_two_runs_are_equal_bit_for_bit(tmp_path):
    settings = ["trainer=gpu", "trainer.deterministic=true", "trainer.max_epochs=2", "teacher.max_epochs=1"]
    settings += ["student.dropout=0.1", "name=run"]
    students = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert crashes.run(settings, folder).code == 0
        students.append(load_file(folder / "outputs" / "digits" / "run" / "student.safetensors"))

    first, second = students
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("settings", [AdamW(), SGD(), Lion()], ids=["adamw", "sgd", "lion"])
def test_a_bad_step_is_held_back_without_waiting_for_the_device(settings):
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer, guard = settings.build([weight]), FiniteGuard()
    images = torch.arange(2, device="cuda")

    def take(gradient: torch.Tensor) -> None:
        guard.watch({"class loss": gradient.sum()}, images)
        weight.grad = gradient
        assert guard.hold_back(optimizer, [weight])
        optimizer.step()

    good, bad = torch.ones(3, device="cuda"), torch.full((3,), torch.nan, device="cuda")
    take(good.clone())
    before = weight.detach().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(bad)
        take(good)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(weight, before)
    with pytest.raises(RunError, match="step 2 "):
        guard.check(step=3, epoch=1)


def test_steps_between_two_windows_never_wait_for_the_device(command, tmp_path, monkeypatch):
    step = DistillModule.training_step
    steps = []

    def watched(self: DistillModule, batch, batch_idx):
        # The first step of a window measures gradients, its last one is read.
        torch.cuda.set_sync_debug_mode("error" if 2 <= batch_idx % 20 <= 17 else "default")
        steps.append(batch_idx)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillModule, "training_step", watched)
    settings = ["trainer=gpu", "trainer.max_epochs=1", "teacher.max_epochs=1", "name=run"]
    try:
        ended = command("train", f"paths.outputs={tmp_path}", *settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert ended.code == 0, ended.err
    assert len(steps) > 18


TRAINING = ["trainer=gpu", "trainer.max_epochs=3", "teacher.max_epochs=1", "student.dropout=0.1"]


def losses_of(run: Path) -> list[float]:
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [float(row["train/total_loss"]) for row in rows if row["train/total_loss"]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_replayed_steps_are_those_taken_one_by_one(command, tmp_path, precision):
    settings = [*TRAINING, f"trainer.precision={precision}", "student.dropout=0", f"paths.outputs={tmp_path}"]
    for mode in ("auto", "off"):
        ended = command("train", *settings, f"name={mode}", f"cuda_graph={mode}")
        assert ended.code == 0, ended.err

    replayed, one_by_one = (losses_of(tmp_path / "digits" / mode) for mode in ("auto", "off"))
    assert replayed == pytest.approx(one_by_one, rel=1e-3 if precision == "32-true" else 2e-2)


@pytest.mark.parametrize(
    "own",
    [
        ("student.tokenizer=spt", "student.attention=lsa", "granularity=encoder"),
        ("granularity=encoder", "granularity.head_map=squeeze", "student.num_heads=2"),
        ("method=token", "teacher=resnet", "teacher.stem=small", "teacher.max_epochs=1"),
        ("method=token", "method.targets=soft", "method.attention_weight=1"),
        ("optimizer=sgd", "+trainer.gradient_clip_val=1"),
        ("optimizer=lion", "optimizer.decay_all=false", "optimizer.layer_decay=0.5"),
        ("method=logit", "student.distillation_token=true"),
        ("method=logit", "method.standardize=true"),
        ("method=together", "method.parts=[attention,relation,dkd]", "method.weights=[1,1,0.1]"),
    ],
    ids=[
        *("spt-lsa", "squeezed", "resnet", "token-attention", "sgd", "lion", "logit", "standardized"),
        "together",
    ],
)
def test_replayed_steps_of_other_models_are_those_taken_one_by_one(command, tmp_path, own):
    settings = [*TRAINING, "student.dropout=0", *own, f"paths.outputs={tmp_path}"]
    for mode in ("auto", "off"):
        ended = command("train", *settings, f"name={mode}", f"cuda_graph={mode}")
        assert ended.code == 0, ended.err

    replayed, one_by_one = (losses_of(tmp_path / "digits" / mode) for mode in ("auto", "off"))
    assert replayed == pytest.approx(one_by_one, rel=1e-3)


def test_steps_are_replayed(command, tmp_path, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))[1])

    ended = command("train", *TRAINING, f"paths.outputs={tmp_path}", "method=none")

    assert ended.code == 0, ended.err
    assert len(replays) > 30


def test_a_stack_ends_as_its_students_alone(command, tmp_path):
    axes = ["granularity=head,encoder", "loss=mse,kl", "seed=0,1"]
    settings = ["trainer=gpu", "trainer.max_epochs=3", "teacher.max_epochs=1", "trainer.deterministic=true"]
    accuracies = {}
    for launcher in ("basic", "stacked"):
        outputs = f"paths.outputs={tmp_path / launcher}"
        ended = command("train", "-m", f"hydra/launcher={launcher}", outputs, *settings, *axes)
        assert ended.code == 0, ended.err
        runs = (tmp_path / launcher / "digits").glob("*/metrics.json")
        accuracies[launcher] = {r.parent.name: json.loads(r.read_text())["test/acc_last"] for r in runs}

    assert len(accuracies["stacked"]) == 8
    # Within one of the 359 test images.
    assert accuracies["stacked"] == pytest.approx(accuracies["basic"], abs=1.5 / 359)


def test_a_stack_of_several_temperatures_ends_as_its_students_alone(command, tmp_path):
    swept = ["loss.temperature=0.7,1.3", "optimizer.lr=0.001,0.003"]
    settings = ["trainer=gpu", "trainer.max_epochs=3", "teacher.max_epochs=1", "trainer.deterministic=true"]
    students = {}
    for launcher in ("basic", "stacked"):
        outputs = f"paths.outputs={tmp_path / launcher}"
        ended = command("train", "-m", f"hydra/launcher={launcher}", outputs, *settings, *swept)
        assert ended.code == 0, ended.err
        runs = (tmp_path / launcher / "digits").glob("*/metrics.json")
        students[launcher] = {r.parent.name: json.loads(r.read_text())["test/acc_last"] for r in runs}

    assert "jobs 0-3 train as one stack" in ended.out
    assert students["stacked"] == pytest.approx(students["basic"], abs=1.5 / 359)


def test_a_stack_that_a_gpu_has_saved_resumes_on_the_cpu_and_back(tmp_path):
    settings = ["-m", "hydra/launcher=stacked", "seed=0,1", "trainer.max_epochs=2", "method=none"]
    settings += ["+trainer.limit_train_batches=6", "optimizer.lr=0.00${seed}1", "checkpoint_minutes=0"]
    step = "vitkd.train.module:DistillModule.training_step"
    # trainer=auto takes what there is.
    hidden = {"CUDA_VISIBLE_DEVICES": ""}

    crashes.run(settings, tmp_path, Strike(step, 10))
    on_cpu = crashes.run(settings, tmp_path, Strike(step, 2), environment=hidden)
    back = crashes.run(settings, tmp_path)

    assert on_cpu.code == -signal.SIGKILL
    assert back.code == 0, back
    assert "resuming" in on_cpu.out
    assert "resuming" in back.out


def test_a_students_gradients_are_looked_at_in_a_graph(command, tmp_path, monkeypatch):
    def on_train_start(self: StackedModule) -> None:
        def spoilt(gradient: torch.Tensor) -> torch.Tensor:
            second = torch.arange(2, device=gradient.device) == 1
            return gradient.masked_fill((second & (self.streams.step > 5))[:, None, None], math.inf)

        super(StackedModule, self).on_train_start()
        self.model.head.weight.register_hook(spoilt)

    monkeypatch.setattr(StackedModule, "on_train_start", on_train_start, raising=False)
    settings = ["trainer=gpu", "trainer.max_epochs=1", "method=none", f"paths.outputs={tmp_path}"]

    ended = command("train", "-m", "hydra/launcher=stacked", "seed=0,1", "name=run${seed}", *settings)

    assert ended.code == 1
    assert "job 1 failed: step 6 (epoch 1) is not finite: gradient norm inf" in ended.err
    assert (tmp_path / "digits" / "run0" / "student.safetensors").exists()


def test_stacked_students_with_dropout_train(command, tmp_path):
    settings = [*TRAINING, f"paths.outputs={tmp_path}", "hydra/launcher=stacked", "seed=0,1,2"]

    ended = command("train", "-m", *settings)

    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "digits").glob("*/student.safetensors"))) == 3


def test_a_students_masks_do_not_depend_on_its_stack():
    x = torch.randn(3, 40, 50, device="cuda", requires_grad=True)
    together = KeyedStreams([4, 5, 6], x.device)
    alone = KeyedStreams([5], x.device)
    together.next_step()
    alone.next_step()

    y = together.drop(x, 0.3)
    y.sum().backward()

    assert torch.equal(alone.drop(x[1:2], 0.3)[0], y[1])
    torch.testing.assert_close(x.grad * x, y)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
