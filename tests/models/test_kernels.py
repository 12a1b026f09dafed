"""The kernels compute what the plain path does, and are used where that is what they do."""

import csv
import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vitkd.models import Taps, kernels
from vitkd.models.dropout import drop_by
from vitkd.models.output import NO_BLOCK_TAPS, BlockTaps
from vitkd.train.stacked.dropout import KeyedStreams
from vitkd.train.stacked.module import stack

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def run(file: str, **environment: str) -> None:
    """Pytest of a file beside this one, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [*command, Path(__file__).with_name(file)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout


@needs_triton
def test_by_tritons_interpreter():
    # It has to be asked for before Triton is imported.
    run("interpreted_kernels.py", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_they_compile_for_an_h100(tmp_path):
    run("compiled_kernels.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_are_not_used_on_the_cpu():
    assert not kernels.can_compute(torch.zeros(1))


@pytest.mark.parametrize(
    ("changes", "taps", "is_used"),
    [
        ({}, NO_BLOCK_TAPS, True),
        ({"attention": "lsa"}, BlockTaps(scores=True, qkv=True), True),
        ({}, BlockTaps(weights=True), False),
        ({"dropout": 0.1}, NO_BLOCK_TAPS, False),
        ({"image_size": 24}, NO_BLOCK_TAPS, False),
        ({"head_dim": 65}, NO_BLOCK_TAPS, False),
    ],
    ids=["plain", "lsa-tapped", "weights", "masks-of-PyTorchs-generator", "37-tokens", "wide-heads"],
)
def test_attends_where_it_can(tiny, changes, taps, is_used, monkeypatch):
    monkeypatch.setattr(kernels, "can_compute", lambda _: True)
    config = tiny(**changes)
    attention = config.build().blocks[0].attention

    projected = torch.zeros(2, config.tokens, 3 * config.num_heads * config.head_dim)

    assert attention._has_kernel(projected, taps) == is_used


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gradients(model, images, precision):
    """Outputs and gradients of a step of `model` on 3 students' images."""
    streams = KeyedStreams([1, 2, 3], images.device)
    drop_by(streams.drop, model.modules(), streams.next_masks)
    streams.next_step()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
        output = model(images, Taps(scores=(0, 2)))
    loss = output.logits.float().square().sum() + sum(
        scores.square().sum() for scores in output.scores.values()
    )
    return [output.logits, *output.scores.values(), *torch.autograd.grad(loss, [*model.parameters()])]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("attention", ["msa", "lsa"])
def test_on_a_gpu_a_stack_is_the_same_with_and_without(tiny, attention, precision):
    shape = {"image_size": 16, "head_dim": 64, "mlp_dim": 32, "attention": attention}
    shape |= {"dropout": 0.2, "drop_path_rate": 0.5}
    stacked = stack([tiny(**shape).build() for _ in range(3)]).cuda().train()
    images = torch.randn(3, 8, 3, 16, 16, device="cuda")
    results = {}
    try:
        for choice in ("off", "auto"):
            kernels.allow_kernels(choice)
            results[choice] = gradients(deepcopy(stacked), images, precision)
    finally:
        kernels.allow_kernels("off")

    close = 1e-4 if precision == "32-true" else 5e-2
    for plain, by_kernels in zip(results["off"], results["auto"], strict=True):
        assert by_kernels.dtype == plain.dtype
        torch.testing.assert_close(by_kernels, plain, rtol=close, atol=close * plain.abs().max().item())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("launcher", ["basic", "stacked"])
def test_captured_steps_are_the_same_with_and_without(command, tmp_path, launcher):
    """One student without dropout, and a stack with."""
    settings = ["trainer=gpu", "trainer.max_epochs=3", "teacher.max_epochs=1", f"hydra/launcher={launcher}"]
    settings += [f"student.dropout={0.1 if launcher == 'stacked' else 0}", "seed=0,1", "name=run${seed}"]
    losses = {}
    for choice in ("auto", "off"):
        outputs = tmp_path / choice
        ended = command("train", "-m", *settings, f"paths.outputs={outputs}", f"kernels={choice}")
        assert ended.code == 0, ended.err
        rows = csv.DictReader((outputs / "digits" / "run1" / "metrics.csv").read_text().splitlines())
        losses[choice] = [float(row["train/total_loss"]) for row in rows if row["train/total_loss"]]

    assert losses["auto"] == pytest.approx(losses["off"], rel=1e-3)
