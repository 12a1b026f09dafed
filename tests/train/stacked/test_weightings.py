"""Students of several weightings train in one stack as each would alone, epoch by epoch."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import lightning as L
import pytest
import torch

from tests.train.objectives import compare_maps
from tests.train.stacked.test_architectures import randomised
from tests.train.stacked.test_module import EXACT
from tests.train.test_fit import Batches, Curves
from vitkd.methods.weighting import (
    WSLD,
    Confidence,
    Constant,
    Cosine,
    GradientBalance,
    Linear,
    Step,
    StudentCorrect,
    TeacherCorrect,
    Weighting,
)
from vitkd.optim import AdamW, WarmupCosine
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

pytestmark = [pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")]
EPOCHS = 3
# At a class weight of 1 the transfer loss does not count: in a first or last epoch, or in all of them.
STUDENTS: list[tuple[Weighting, float]] = [
    (Constant(), 0.3),
    (Linear(), 0.2),
    (Linear(), 0.6),
    (Linear(end=0.5), 0.4),
    (Linear(end=0.5), 1.0),
    (Cosine(end=0.0), 1.0),
    (Step(end=1.0, at=0.4), 0.0),
    (StudentCorrect(), 0.3),
    (TeacherCorrect(), 0.3),
    (Confidence(), 0.5),
    (WSLD(), 0.5),
    (WSLD(), 0.2),
    (GradientBalance(ratio=0.5), 0.5),
    (GradientBalance(ratio=2.0), 0.5),
    (GradientBalance(), 1.0),
    (Constant(), 1.0),
]


@pytest.fixture
def modules(tiny) -> list[DistillModule]:
    teacher = randomised(tiny(depth=6))
    students = [randomised(tiny()) for _ in STUDENTS]
    return [
        DistillModule(
            student, AdamW(lr=1e-2), WarmupCosine(), 0.1,
            teacher=teacher, objective=compare_maps(student, teacher), weighting=weighting, alpha=alpha,
        )
        for student, (weighting, alpha) in zip(students, STUDENTS, strict=True)
    ]  # fmt: skip


def fit(module: DistillModule, train: Batches, val: Batches, curves: Sequence[Curves], folder: Path) -> None:
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        accelerator="cpu", precision="64-true", max_epochs=EPOCHS, log_every_n_steps=2, logger=list(curves),
        num_sanity_val_steps=0, default_root_dir=folder, **dict.fromkeys(quiet, False),
    )  # fmt: skip
    trainer.fit(module, train, val)


def test_weights_and_curves_are_those_of_separate_runs(modules, tmp_path):
    train, val = Batches(6, 6, 6), Batches(5, 3)
    separate = [deepcopy(module) for module in modules]
    together = [Curves(tmp_path) for _ in modules]
    stacked = StackedModule(modules, [0] * len(modules), range(len(modules)))

    fit(stacked, train, val, together, tmp_path)

    for s, (module, mine) in enumerate(zip(separate, together, strict=True)):
        alone = Curves(tmp_path)
        fit(module, train, val, [alone], tmp_path)
        for name, weight in module.model.state_dict().items():
            torch.testing.assert_close(stacked.model.state_dict()[name][s], weight, **EXACT), (s, name)
        assert [step for step, _ in mine.logged] == [step for step, _ in alone.logged]
        for (step, found), (_, expected) in zip(mine.logged, alone.logged, strict=True):
            for curves in (found, expected):
                curves.pop("train/images_per_second", None)
            assert found.keys() == expected.keys(), (STUDENTS[s], step)
            assert found == pytest.approx(expected, rel=1e-9), (STUDENTS[s], step)
