"""Every benchmark runs, at tiny sizes, and says what it measured; how fast anything is, no test asks."""

import json
import math
from importlib import import_module
from importlib.metadata import version

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Bar, Row, Settings, Spread
from vitkd.models import Taps, ViTConfig, kernels
from vitkd.process.isolation import isolated

SLOW = pytest.param("overhead", marks=pytest.mark.slow)
BENCHMARKS = ["step", "data", "augment", "mixing", SLOW, "peers"]
QUICK = Settings(torch.device("cpu"), quick=True, rounds=2)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_prints_and_writes_its_rows(name, tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"

    rows = import_module(f"benchmarks.{name}").main(["--quick", "--device", "cpu", "--json", str(path)])

    written = json.loads(path.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert written["benchmark"] == name
    assert written["quick"]
    assert written["provenance"]["versions/torch"] == version("torch")
    assert [line["name"] for line in written["rows"]] == [line.name for line in rows]
    assert all(line.name in printed for line in rows)
    assert f"torch {version('torch')}, float32 products" in printed
    assert any(line.bar for line in rows)
    for line in rows:
        assert_sane(line)


def assert_sane(line: Row) -> None:
    for spread in filter(None, (line.figure, line.ratio)):
        assert spread.low <= spread.median <= spread.high
        assert all(map(math.isfinite, (spread.low, spread.high)))
    assert line.ratio is None or line.ratio.low > 0
    assert (line.met is None) == (line.bar is None)


def test_the_steps_cover_every_granularity_and_loss():
    step = import_module("benchmarks.step")
    config = step.subject.configure(QUICK)
    batch = step.subject.random_batch(config, QUICK.device)

    arms = step.arms(config, step.subject.build_teacher(config, QUICK.device), batch)

    assert {f"{g} {loss}" for g in ("head", "block", "encoder") for loss in ("mse", "ce", "kl")} < set(arms)
    assert step.FLOOR in arms


def test_the_models_are_the_reports():
    subject = import_module("benchmarks.subject")
    config = subject.configure(Settings(torch.device("cpu"), quick=False, rounds=1))
    common = {
        "image_size": 32,
        "channels": 3,
        "num_classes": 100,
        "patch_size": 8,
        "embed_dim": 64,
        "head_dim": 64,
    }
    common |= {"dropout": 0.1, "emb_dropout": 0.1}

    assert config.teacher.model == ViTConfig(**common, depth=10, num_heads=8, mlp_dim=1024)
    assert config.student == ViTConfig(**common, depth=5, num_heads=4, mlp_dim=512)
    assert config.dataset.batch_size == 64


def test_cached_scores_are_the_teachers():
    step = import_module("benchmarks.step")
    config = step.subject.configure(QUICK)
    batch = step.subject.random_batch(config, QUICK.device)
    teacher = step.subject.build_teacher(config, QUICK.device)

    taps = Taps(scores=(1,), logits=False)

    cache = step.filled_cache(teacher, taps, batch)

    torch.testing.assert_close(cache.answer(batch.index).scores[1], teacher(batch.image, taps).scores[1])


def test_every_arm_runs_once_a_round_in_changing_order():
    seen: list[str] = []

    def arm(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    samples = harness.in_turns({name: lambda name=name: arm(name) for name in "abc"}, rounds=20, warmup=1)

    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 21
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert all(len(values) == 20 for values in samples.values())
    assert min(min(values) for values in samples.values()) == 4


def test_repeated_calls_are_averaged():
    calls: list[None] = []

    samples = harness.interleave({"arm": lambda: calls.append(None)}, QUICK, repeat=5, warmup=1)

    assert len(calls) == 5 * (1 + QUICK.rounds)
    assert len(samples["arm"]) == QUICK.rounds


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


def test_ratios_are_taken_round_by_round():
    assert harness.divided([2, 30], [1, 10]) == [2, 3]


@pytest.mark.parametrize(
    ("bar", "good", "bad", "text"),
    [(Bar(1.05), 1.05, 1.06, "≤ 1.05"), (Bar(8, at_least=True), 8, 7.9, "≥ 8")],
)
def test_a_bar_is_for_the_ratio_or_else_the_figure(bar, good, bad, text):
    assert str(bar) == text
    assert harness.row("a", [good], bar=bar).met
    assert not harness.row("a", [bad], bar=bar).met
    assert harness.row("a", [bad], ratio=[good], bar=bar).met
    assert harness.row("a", [bad]).met is None


def test_the_probe_of_a_gpu_passes_where_there_is_nothing_to_capture(tmp_path, capsys):
    code = import_module("benchmarks.gpu").main(["--quick", "--profiles", str(tmp_path / "new")])

    printed = capsys.readouterr().out
    assert code == 0, printed
    assert all(
        check in printed for check in ("captured", "eager", "dropout", "rate", "NaN", "kernels", "bf16")
    )
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        *("teacher.txt", "stack-3-TF32.txt", "stack-3-bf16.txt")
    }


@pytest.mark.parametrize("broken", ["eager", "dropout", "rate", "NaN", "kernels"])
def test_the_probe_of_a_gpu_fails_with_each_of_its_checks(broken, monkeypatch):
    probe = import_module("benchmarks.gpu")
    train = probe.Subject.train

    def wrong(self, module, batches, steps, precision="fp32", graphed=True):
        if broken == "NaN":
            batches = [batch._replace(image=batch.image.nan_to_num()) for batch in batches]
        steps = train(self, module, batches, steps, precision, graphed)
        if broken == "eager" and not graphed:
            steps.weights[-1] += 1
        if broken == "dropout" and len({id(batch) for batch in batches}) == 1:
            steps.losses[:] = [torch.full_like(steps.losses[0], step) for step in range(len(steps.losses))]
        if broken == "kernels" and not kernels._allowed:
            steps.losses[-2] *= 1.01
        if broken == "rate" and isinstance(module.schedule, probe.Drop):
            steps.weights[-1] += 1
        return steps

    monkeypatch.setattr(probe.Subject, "train", wrong)

    with isolated():
        outcomes = probe.checks(*(probe.probe_of(1, dropout, QUICK) for dropout in (0.0, 0.1)))

    assert [name for name, outcome in outcomes.items() if outcome.startswith("NO")] == [broken]
