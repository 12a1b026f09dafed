"""Banks of embeddings belong to a training: its checkpoints hold them, averages and best weights do not."""

from pathlib import Path
from typing import Any

import pytest

from vitkd.runs.checkpoints import read_checkpoint

BRIEF = [
    *("trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3", "pictures_every_n_epochs=0"),
    *("teacher.trained=false", "teacher.depth=1", "student.depth=1", "optimizer.lr=0.01"),
    *("method=crd", "method.negatives=32", "method.width=8"),
]


@pytest.fixture(scope="module")
def checkpoints(command, tmp_path_factory):
    """last.ckpt and best.ckpt of a run whose weights are averaged, and of one whose are not."""
    outputs = tmp_path_factory.mktemp("banks")

    def of(name: str, *settings: str) -> list[dict[str, Any]]:
        ended = command("train", *BRIEF, *settings, f"paths.outputs={outputs}", f"name={name}")
        assert ended.code == 0, ended.err
        folder: Path = outputs / "digits" / name / "checkpoints"
        return [read_checkpoint(folder / f"{which}.ckpt") for which in ("last", "best")]

    return of("averaged", "ema_decay=0.9"), of("plain")


def test_an_average_of_the_weights_leaves_them_alone(checkpoints):
    (averaged, _), (plain, _) = checkpoints
    banks = [name for name in plain["state_dict"] if name.startswith("objective.bank.")]

    assert len(banks) == 3
    for state in (averaged["state_dict"], averaged["current_model_state"]):
        assert all(state[name].equal(plain["state_dict"][name]) for name in banks)
    # What is averaged differs from what trained, which is the same in both runs.
    weight = "model.head.weight"
    assert not averaged["state_dict"][weight].equal(plain["state_dict"][weight])
    assert averaged["current_model_state"][weight].equal(plain["state_dict"][weight])


def test_the_best_weights_are_the_students_alone(checkpoints):
    for last, best in checkpoints:
        assert {name for name in last["state_dict"] if name.startswith("model.")} == {*best["state_dict"]}
