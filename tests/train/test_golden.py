"""Twenty steps of every granularity and loss give the losses that are on record."""

import csv
import json
from functools import cache

import pytest
import torch

from tests.golden import regenerate
from tests.golden.regenerate import FILE, GRANULARITIES, RUNS, SETTINGS, STEPS, Losses, configure
from vitkd.models import save_model

# What may differ elsewhere: two threads, AVX2 or SSE in place of AVX-512, even float64 move no loss of the 20
# steps by more than 6e-7, PyTorch 2.10 and 2.15 agree in every bit, and the record is rounded by up to 5e-7.
# What may not: weight decay left out moves a loss by 4e-4, AdamW's eps ten times as large by 6e-5.
TOLERANCE = 1e-5


@cache
def train(run: str) -> Losses:
    """What the run gives now."""
    return regenerate.train(configure(run))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Losses]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_every_run_is_on_record(recorded):
    assert recorded.keys() == RUNS.keys()
    assert {len(values) for losses in recorded.values() for values in losses.values()} == {STEPS}


@pytest.mark.parametrize("run", RUNS)
def test_losses_are_the_recorded_ones(run, recorded):
    if run == "dropout" and not torch.backends.mkl.is_available():
        pytest.skip("without MKL, PyTorch draws other numbers for dropout")
    losses = train(run)

    assert losses.keys() == recorded[run].keys()
    for term, values in losses.items():
        assert values == pytest.approx(recorded[run][term], rel=TOLERANCE), term


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_cross_entropy_and_divergence_train_alike(granularity):
    """Their gradients are equal: they differ by the teacher's entropy."""
    ce, kl = train(f"{granularity} ce"), train(f"{granularity} kl")

    assert ce["class"] == pytest.approx(kl["class"], rel=1e-6)
    assert all(a > b for a, b in zip(ce["transfer"], kl["transfer"], strict=True))


@pytest.mark.parametrize("run", ["alone", "dropout"])
def test_the_command_takes_the_same_steps(run, command, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    save_model(regenerate.untrained_teacher(configure(run)), teacher)
    choices = [f"{key}={choice}" for key, choice in RUNS[run].items()]
    given = [f"teacher.checkpoint={teacher}"] if run != "alone" else []
    quietly = ["log_every_n_steps=1", "pictures_every_n_epochs=0", "+trainer.limit_val_batches=0"]

    ended = command("train", *SETTINGS, *choices, *given, *quietly, f"paths.outputs={tmp_path}", "name=run")

    assert ended.code == 0, ended.err
    with (tmp_path / "digits" / "run" / "metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    for term, values in train(run).items():
        logged = [float(row[f"train/{term}_loss"]) for row in rows]
        assert logged == pytest.approx(values, rel=1e-6), term
