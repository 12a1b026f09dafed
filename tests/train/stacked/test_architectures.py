"""Students of every architecture train in stacks as they do alone; a line says why one cannot be stacked."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.cli.test_multirun import Sweeps, read
from tests.train.objectives import compare_maps
from tests.train.stacked.test_module import CLASSES, EXACT, assert_trains_as_alone, batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity
from vitkd.methods.maps.losses import JS, KL, MSE, AttentionLoss
from vitkd.models import ViT, ViTConfig
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

STUDENTS: dict[str, dict[str, Any]] = {
    "spt": {"tokenizer": "spt"},
    "lsa": {"attention": "lsa"},
    "deit": {"distillation_token": True},
    "all": {"tokenizer": "spt", "attention": "lsa", "distillation_token": True},
}
TEACHERS: dict[str, dict[str, Any]] = {"plain": {}, "lsa and deit": STUDENTS["lsa"] | STUDENTS["deit"]}
CELLS: list[tuple[Granularity, AttentionLoss, float]] = [
    (Block(), MSE(), 0.3),
    (Encoder(), KL(temperature=0.7), 0.0),
    (Encoder(), KL(temperature=1.3), 0.5),
    (Block(), JS(), 0.6),
    (Encoder(), KL(), 1.0),
]


def randomised(config: ViTConfig) -> ViT:
    """In float64, no weight at a telling 0 or 1."""
    model = config.build().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("orders", "factors"), [(None, False), (2, True)], ids=["one order, scores", "two orders, factors"]
)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_losses_and_gradients_are_those_of_separate_runs(student, teacher, orders, factors, tiny):
    taught_by = randomised(tiny(depth=4, num_heads=2, **TEACHERS[teacher]))
    modules = []
    for granularity, loss, alpha in CELLS:
        model = randomised(tiny(**STUDENTS[student]))
        objective = compare_maps(model, taught_by, granularity, loss, tokens=1000 if factors else 0)
        assert objective.streams == factors
        module = DistillModule(
            model, AdamW(), Constant(), teacher=taught_by, objective=objective, alpha=alpha
        )
        modules.append(module.train())

    assert_trains_as_alone(modules, [s % (orders or 1) for s in range(len(CELLS))], batch(orders))


@pytest.mark.parametrize("taught", [True, False])
def test_each_students_heads_are_distinguished(taught, tiny):
    teacher = randomised(tiny(num_heads=2))
    modules: list[DistillModule] = []
    for _ in range(3):
        model = randomised(tiny(**STUDENTS["all"]))
        beside = {"teacher": teacher, "objective": compare_maps(model, teacher, Block()), "alpha": 0.5}
        modules.append(DistillModule(model, AdamW(), Constant(), **(beside if taught else {})))
    stacked, given = StackedModule(modules, [0, 0, 0], seeds=range(3)).eval(), batch()

    output = stacked.losses(given).output

    for s, module in enumerate(modules):
        expected = module.eval().losses(given).output
        assert expected.heads["class_token"].shape == (len(given.label), CLASSES)
        assert output.heads.keys() == expected.heads.keys() == {"class_token", "distillation_token"}
        for name, alone in expected.heads.items():
            torch.testing.assert_close(output.heads[name][s], alone, **EXACT)


BRIEFLY = [
    *(
        "trainer=cpu",
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=3",
        "teacher.trainer.limit_train_batches=3",
        "+trainer.limit_val_batches=1",
    ),
    *("student.depth=1", "teacher.depth=1", "teacher.max_epochs=1", "dataset.batch_size=32"),
    *("log_every_n_steps=1", "pictures_every_n_epochs=0"),
]
STACKED = "hydra/launcher=stacked"


@pytest.fixture
def sweeps(tmp_path, command) -> Sweeps:
    return Sweeps(tmp_path / "outputs", command)


@pytest.mark.slow
@pytest.mark.parametrize("taught", [[], ["method=token", "teacher=resnet", "teacher.stem=small"]])
def test_a_stack_leaves_what_the_jobs_leave_alone(taught, tmp_path, command):
    """Students with shifted patches, locality attention and two heads, beside a plain ViT or a network."""
    together, alone = (Sweeps(tmp_path / name / "outputs", command) for name in ("many", "one"))
    architecture = [f"student.{key}={value}".lower() for key, value in STUDENTS["all"].items()]
    briefly = [each for each in BRIEFLY if not (taught and each == "teacher.depth=1")]
    jobs = ["seed=0,1", "name=run${seed}", *architecture, *taught, *briefly]

    result = together.run(STACKED, *jobs)
    assert result.states == ["done", "done"], result.err
    assert "jobs 0-1 train as one stack\n" in result.out
    shutil.copytree(together.path / "teachers", alone.path / "teachers")
    assert alone.run(*jobs).states == ["done", "done"]

    for name in ("run0", "run1"):
        mine, theirs = (read_metrics(sweeps.folder(name)) for sweeps in (together, alone))
        assert mine.keys() - theirs.keys() == {"stack/students"}
        heads = [key for key in theirs if key.startswith("test/acc_") and key.endswith("_token")]
        assert len(heads) == 4
        for key in (*heads, "test/acc_last", "test/loss", "val/acc_last"):
            assert mine[key] == pytest.approx(theirs[key], abs=1e-2 if "acc" in key else 1e-4), key
        predictions = [np.load(sweeps.folder(name) / "test_predictions.npz") for sweeps in (together, alone)]
        assert (predictions[0]["last"] != predictions[1]["last"]).sum() <= 1
        again = command("evaluate", f"run={together.folder(name)}")
        assert again.code == 0, again.err
        assert again.out.count("equal") == 16


def read_metrics(run: Path) -> dict[str, Any]:
    return dict(read(run / "metrics.json"))
