"""Real fits of tiny stacks: one student's misfortune is its own."""

import math
from collections.abc import Callable

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.train.objectives import compare_maps
from tests.train.test_fit import Batches, without_validation
from vitkd.errors import RunError
from vitkd.optim import AdamW, Constant
from vitkd.train.module import DistillModule
from vitkd.train.stacked import StackedModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    without_validation,
]
STUDENTS = 3


@pytest.fixture
def stacked(tiny) -> Callable[[], StackedModule]:
    """stacked() is always the same stack."""

    def build() -> StackedModule:
        torch.manual_seed(0)
        teacher = tiny(depth=6).build()
        modules = []
        for _ in range(STUDENTS):
            student = tiny().build()
            objective = compare_maps(student, teacher)
            modules.append(
                DistillModule(
                    student, AdamW(lr=1e-2), Constant(), teacher=teacher, objective=objective, alpha=0.5
                )
            )
        return StackedModule(modules, [0] * STUDENTS, range(STUDENTS))

    return build


def fit(module: StackedModule, folder: object, **settings: object) -> None:
    """2 epochs of 3 batches."""
    torch.manual_seed(1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        max_epochs=2,
        **quiet,
        **settings,
    )
    train = Batches(4, 4, 4)
    for number, batch in enumerate(train.batches):
        batch.index.add_(100 * number)
    trainer.fit(module, train)


def spoil(module: StackedModule, bad: float, step: int, students: list[int]) -> None:
    """Add `bad` to the gradients of some students in one step, counted from 1."""

    def changed(gradient: Tensor) -> Tensor:
        if module.trainer.global_step + 1 != step:
            return gradient
        gradient = gradient.clone()
        gradient[students] += bad
        return gradient

    module.model.head.weight.register_hook(changed)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("step", [2, 6])
# Finite, the last one: but its square is not, and Adam would never move those weights again.
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
def test_a_gradient_that_is_not_finite_is_reported_and_is_one_students(bad, step, clip, stacked, tmp_path):
    good, spoilt = stacked(), stacked()
    spoil(spoilt, bad, step, [1])

    fit(good, tmp_path, log_every_n_steps=100, gradient_clip_val=clip)
    fit(spoilt, tmp_path, log_every_n_steps=100, gradient_clip_val=clip)

    assert good.failed == {}
    (message,) = spoilt.failed.values()
    assert [*spoilt.failed] == [1]
    norm = "nan" if math.isnan(bad) else "inf"
    epoch, image = (1, 100) if step == 2 else (2, 200)
    images = f"{image}, {image + 1}, {image + 2}, {image + 3}"
    assert message.startswith(
        f"step {step} (epoch {epoch}) is not finite: gradient norm {norm}, on training images {images};"
    )
    for name, values in good.model.state_dict().items():
        assert torch.equal(values[[0, 2]], spoilt.model.state_dict()[name][[0, 2]]), name


def test_where_no_student_is_left_training_ends(stacked, tmp_path):
    module = stacked()
    spoil(module, math.nan, 3, [0, 1, 2])

    with pytest.raises(RunError, match=r"^step 3 \(epoch 1\) is not finite: gradient norm nan"):
        fit(module, tmp_path)

    assert [*module.failed] == [0, 1, 2]
