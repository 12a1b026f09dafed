"""Run folders with chosen metrics, made after one that was really trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitkd.report.__main__ import main


class Runs:
    """Writes run folders into `outputs`, as a run of `vitkd.train` would leave them."""

    def __init__(self, outputs: Path, like: Path) -> None:
        self.outputs = outputs
        self._config = yaml.safe_load((like / "config.yaml").read_text())
        self._metrics = json.loads((like / "metrics.json").read_text())
        self._clock = 0

    def add(
        self,
        name: str = "",
        *,
        acc: float | None = 0.9,
        best: float | None = None,
        seed: int = 0,
        state: str = "done",
        curves: str = "",
        metrics: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        details: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Path:
        """One run. `settings` are dotted names with __ for dots; acc and best are shares of 1."""
        self._clock += 1
        config = copy.deepcopy(self._config) | {"seed": seed}
        chosen = {"method": "attention", "granularity": "block", "loss": "kl"} | settings
        classes = {"attention": "AttentionDistillation", "none": "NoDistillation"}
        classes |= {"logit": "LogitDistillation", "kl": "KL", "mse": "MSE"}
        classes |= {"head": "Head", "block": "Block"}
        for dotted, value in chosen.items():
            *groups, last = dotted.split("__")
            node = config
            for group in groups:
                node = node.setdefault(group, {})
            if dotted in ("method", "granularity", "loss"):
                node[last] = {"_target_": f"vitkd.distill.{dotted}.{classes.get(value, value)}"}
            else:
                node[last] = value
        path = self.outputs / config["dataset"]["name"] / (name or f"run-{self._clock}")
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        time = f"2026-01-01T00:{self._clock // 60:02}:{self._clock % 60:02}+00:00"
        (path / "status.json").write_text(json.dumps({"state": state, "pid": 1, "time": time}))
        if state == "done" and acc is not None:
            accuracies = {"test/acc_last": acc, "test/acc_best": acc if best is None else best}
            written = self._metrics | accuracies | {"seed": seed} | (metrics or {})
            (path / "metrics.json").write_text(json.dumps(written))
        if inputs is not None:
            (path / "inputs.json").write_text(json.dumps(inputs))
        if details is not None:
            (path / "test_details.json").write_text(json.dumps(details))
        if curves:
            (path / "metrics.csv").write_text(curves)
        return path

    def arm(self, accuracies: dict[int, float], **settings: Any) -> list[Path]:
        """One run a seed."""
        return [self.add(acc=acc, seed=seed, **settings) for seed, acc in accuracies.items()]


@pytest.fixture
def runs(tmp_path: Path, finished: Path) -> Runs:
    return Runs(tmp_path / "outputs", finished)


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """report(folder, …) runs the command and returns what it printed."""

    def run(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run
