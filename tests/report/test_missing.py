"""The commands that the report prints train exactly the runs that it lacks."""

import json
import shlex
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from vitkd import __version__
from vitkd.config.run import CONF_DIR, parse
from vitkd.report.experiments import Experiment, find_experiments
from vitkd.report.missing import missing_runs
from vitkd.report.runs import find_runs
from vitkd.report.verdicts import MIN_SEEDS


@cache
def composed_of(*settings: str) -> DictConfig:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", [*settings])


class Started:
    """Run folders as `python -m vitkd.train ARGUMENTS` leaves them, but for the training."""

    def __init__(self, outputs: Path) -> None:
        self.outputs, self.number = outputs, 0

    def add(self, *arguments: str) -> None:
        *settings, seed = (each for each in arguments if not each.startswith(("-", "hydra", "sweep=")))
        composed = composed_of(*settings).copy()
        composed.seed = int(seed.removeprefix("seed="))
        config = parse(composed).resolved
        self.number += 1
        path = self.outputs / str(self.number)
        path.mkdir(parents=True)
        files = {
            "config.yaml": yaml.safe_dump({"version": __version__, **config}),
            "status.json": '{"state": "done"}',
            "metrics.json": '{"test/acc_last": 0.5, "test/acc_best": 0.5}',
            "command.json": json.dumps(arguments),
        }
        for name, text in files.items():
            (path / name).write_text(text)

    def follow(self, command: str) -> None:
        """What typing the command does."""
        python, dash, module, many, *arguments = shlex.split(command)
        assert (python, dash, module, many) == ("python", "-m", "vitkd.train", "-m")
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(arguments), None)
        for job in jobs:
            self.add(*job)

    @property
    def experiment(self) -> Experiment:
        (experiment,) = find_experiments(find_runs([self.outputs]))
        return experiment


@pytest.fixture
def started(tmp_path) -> Started:
    return Started(tmp_path / "outputs")


GRID = [
    [f"granularity={granularity}", f"loss={loss}", "alpha=0.3"]
    for granularity, loss in product(("head", "block"), ("kl", "mse"))
]
RATES = ["optimizer.lr=0.01", "schedule@teacher.schedule=constant", "+trainer.limit_val_batches=2"]
CASES = {
    "nothing was typed": [([], [0])],
    "one run": [(["alpha=0.3", "loss=mse"], [0])],
    "seeds of one's own": [(["alpha=0.3"], [5, 6, 7])],
    "a grid": [(arguments, [0, 1]) for arguments in GRID],
    "a part of a grid": [(arguments, [0, 1]) for arguments in GRID[1:]],
    "a grid of different seeds": [(arguments, [seed]) for seed, arguments in enumerate(GRID)],
    "the student alone with too few": [(["method=none"], [0]), (["loss=mse"], [0, 1]), (["alpha=0.1"], [2])],
    "the student alone with others": [(["alpha=1", "loss=mse"], [0, 1, 2]), (["loss=kl"], [3, 4, 5])],
    "rates": [([*RATES, "teacher.max_epochs=3", "student.depth=2", "granularity.blocks=[0,1]"], [0])],
    "controls": [
        (["experiment=control/attention"], [0]),
        (["experiment=control/logits"], [0, 1]),
        (["experiment=control/untrained_teacher", "alpha=0.1"], [0]),
    ],
    "the course report": [(["experiment=report/block_kl"], [0]), (["experiment=report/encoder_mse"], [1])],
    "another method's settings": [(["method=logit", "method.temperature=2", "label_smoothing=0.1"], [0])],
    "a token": [(["experiment=report/deit_flowers", *alpha], [0]) for alpha in ([], ["alpha=0.9"])],
    "a weighting": [(["weighting=cosine", "weighting.end=0.9"], [0])],
    "a teacher a seed": [(["teacher.seed=${seed}"], [0, 1])],
    "one that is set": [(["teacher.depth=3", "student.depth=${teacher.depth}"], [0])],
    "what is one run's": [(["sweep=grid", "name=x", "resume=auto", "hydra.mode=RUN", "loss=mse"], [0])],
    "words with spaces": [(["paths.data='my data'", "loss=mse"], [0])],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_with_what_the_commands_train_nothing_is_missing(case, started):
    for arguments, seeds in case:
        for seed in seeds:
            started.add(*arguments, f"seed={seed}")
    before = started.experiment

    for line in missing_runs(before).values():
        started.follow(line)

    after = started.experiment
    assert missing_runs(after) == {}
    assert after.baseline.method == "none" or before.baseline
    for arm, earlier in zip(after.arms, before.arms, strict=True):
        assert (arm.objective, arm.alpha) == (earlier.objective, earlier.alpha)
    for arm in after.arms:
        assert len(arm.runs.keys() & after.baseline.runs.keys()) >= MIN_SEEDS
        assert sorted(arm.runs) == [*arm.runs]
    runs = sum(len(arm.runs) for arm in after.rows)
    assert runs == started.number, "a run that was there was trained again"


def test_teachers_that_were_set_one_a_seed_stay_so(started):
    for seed in (0, 1):
        started.add("loss=mse", f"teacher.seed={seed}", f"seed={seed}")

    for line in missing_runs(started.experiment).values():
        started.follow(line)

    (arm,) = started.experiment.arms
    assert {seed: run.settings["teacher.seed"] for seed, run in arm.runs.items()} == {0: 0, 1: 1, 2: 2}


def test_a_grid_is_completed_by_one_command(started):
    for arguments in GRID:
        started.add(*arguments, "seed=0")

    train = "python -m vitkd.train -m"
    assert missing_runs(started.experiment) == {
        "train the student alone": f"{train} method=none seed=0,1,2",
        "add seeds to 4 arms": f"{train} granularity=head,block loss=kl,mse alpha=0.3 seed=1,2",
    }


@pytest.mark.parametrize("content", ["", "{}", '[["a"]]', '["a\\nb"]', "[1]", None])
def test_a_run_that_does_not_say_how_it_was_started_has_no_command(content, started):
    started.add("loss=mse", "seed=0")
    started.add("loss=mse", "teacher.seed=1", "seed=1")
    (started.outputs / "2" / "command.json").unlink()
    command = started.outputs / "1" / "command.json"
    command.unlink()
    if content is not None:
        command.write_text(content)

    assert missing_runs(started.experiment) == {}


def test_typed_in_they_make_the_comparison(command, report, tmp_path, monkeypatch):
    """From the first run to the verdict, by what the report says."""
    monkeypatch.chdir(tmp_path)
    brief = ["trainer.max_epochs=1", "teacher.max_epochs=1", "trainer.limit_train_batches=1"]
    brief += ["teacher.trainer.limit_train_batches=1", "student.depth=1", "teacher.depth=1"]
    assert command("train", *brief, "loss=mse", "paths.outputs=runs").code == 0
    printed = report("runs")
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  python")]
    for page in ("md", "html"):
        assert all(line in (tmp_path / "runs" / "report" / f"report.{page}").read_text() for line in lines)
    assert len(lines) == 2

    for line in lines:
        ended = command("train", *shlex.split(line)[3:])
        assert ended.code == 0, ended.err

    printed = report("runs")
    assert "1 arm against the student alone" in printed
    assert "python -m vitkd.train" not in printed
    content = json.loads((tmp_path / "runs" / "report" / "report.json").read_text())
    (experiment,) = content["experiments"]
    assert [arm["seeds"] for arm in experiment["arms"]] == [3, 3]
    assert experiment["arms"][1]["paired_with_seeds"] == [0, 1, 2]
