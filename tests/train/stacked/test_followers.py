"""Jobs whose students would become the same train one, and each leaves a whole run folder of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import crashes
from tests.cli.test_multirun import read
from tests.crashes import Ended, Strike
from tests.train.stacked.test_resume import SETTINGS, STEP, assert_close, assert_run_equals, run_of

pytestmark = pytest.mark.slow

NAME = "name=${hydra:runtime.choices.loss}-${alpha}-${seed}"
JOBS = ["loss=ce,kl", "alpha=0.5,1", "seed=0,1", NAME]
# Of each seed: ce and kl at alpha = 0.5, and both at alpha = 1.
TRAINED = {"kl-0.5-0": "ce-0.5-0", "kl-0.5-1": "ce-0.5-1", "kl-1-0": "ce-1-0", "kl-1-1": "ce-1-1"}
NAMES = [*TRAINED, *TRAINED.values()]


def launched(way: str) -> list[str]:
    return [f"hydra/launcher={way}" if "launcher" in setting else setting for setting in SETTINGS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """Where all jobs were trained without an interruption."""
    folder = tmp_path_factory.mktemp("reference")
    ended = crashes.run([*launched("stacked"), *JOBS], folder)
    assert ended.code == 0, ended
    assert "jobs 0-7 train as one stack of 4 students, one for all jobs with equal gradients\n" in ended.out
    return folder


@pytest.fixture
def start(reference, tmp_path) -> Callable[..., Ended]:
    """start(way, *settings_and_strikes) runs the command beside a copy of the reference's teacher."""
    shutil.copytree(reference / "outputs" / "teachers", tmp_path / "outputs" / "teachers")

    def run(way: str, *arguments: str | Strike) -> Ended:
        settings = [argument for argument in arguments if isinstance(argument, str)]
        strikes = [argument for argument in arguments if isinstance(argument, Strike)]
        return crashes.run([*launched(way), *JOBS, *settings], tmp_path, *strikes)

    return run


def test_each_run_is_as_if_trained_alone_and_names_the_one_that_was_trained(start, reference, tmp_path):
    ended = start("basic")

    assert ended.code == 0, ended
    for name in NAMES:
        together, alone = run_of(reference, name), run_of(tmp_path, name)
        assert_close(together, alone)
        metrics, expected = read(together / "metrics.json"), read(alone / "metrics.json")
        of_stack = {"stack/students", "stack/trained_as"} if name in TRAINED else {"stack/students"}
        assert metrics.keys() - expected.keys() == of_stack
        assert metrics["stack/students"] == 4
        for key in ("test/acc_last", "test/acc_best", "val/acc_best", "best_epoch"):
            assert metrics[key] == pytest.approx(expected[key], abs=1.5 / 359), key
        if name in TRAINED:
            trained = together / metrics["stack/trained_as"]
            assert trained.resolve() == run_of(reference, TRAINED[name])
            weights = [(run / "student.safetensors").read_bytes() for run in (trained, together)]
            assert len(weights[0]) > 1000
            assert weights[0] == weights[1]


def test_killed_and_resumed(start, reference, tmp_path):
    start("stacked", Strike(STEP, 11))
    resumed = start("stacked")

    assert resumed.code == 0, resumed
    assert "after step 10" in resumed.out
    for name in NAMES:
        assert_run_equals(run_of(tmp_path, name), run_of(reference, name))
    assert not (tmp_path / "outputs" / "stacks").exists()


def test_followers_resume_without_the_jobs_that_they_followed_and_the_others_after_them(
    start, reference, tmp_path
):
    start("stacked", Strike(STEP, 11))

    followers = start("stacked", "loss=kl")
    rest = start("stacked")

    assert (followers.code, rest.code) == (0, 0), (followers, rest)
    assert "after step 10" in followers.out
    assert "after step 10" in rest.out
    for name in NAMES:
        assert_close(run_of(tmp_path, name), run_of(reference, name))
        assert ("stack/trained_as" in read(run_of(tmp_path, name) / "metrics.json")) is False
    assert not (tmp_path / "outputs" / "stacks").exists()


def test_in_smaller_stacks_they_stay_together(start, reference, tmp_path):
    start("stacked", Strike(STEP, 11))

    resumed = start("stacked", "hydra.launcher.max_students=2")

    assert resumed.code == 0, resumed
    assert resumed.out.count("after step 10") == 2
    for name in NAMES:
        assert_close(run_of(tmp_path, name), run_of(reference, name))
        assert ("stack/trained_as" in read(run_of(tmp_path, name) / "metrics.json")) == (name in TRAINED)
