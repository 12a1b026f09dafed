"""A run is saved where it can go on: with no gradients waiting, and no validation about to be left out."""

import signal
from typing import Any

import lightning as L
import pytest

from tests.train.test_fit import Batches
from vitkd.optim import AdamW, Constant
from vitkd.process.signals import PostponedSignals
from vitkd.runs.folder import RunFolder
from vitkd.train.checkpointing import Checkpointing
from vitkd.train.module import DistillModule

TRAINING, VALIDATION, EPOCH_END = "training", "validation", "epoch end"


class Saves(Checkpointing):
    """Notes when it would save, as often as it may: a checkpoint is always due, and a signal always waits."""

    def __init__(self, folder: RunFolder) -> None:
        signals = PostponedSignals()
        signals.waiting = [signal.SIGTERM]
        super().__init__(folder, 0, signals)
        self.seen: list[tuple[int, str]] = []
        self._is_at_the_end = False

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._is_at_the_end = True
        super().on_train_epoch_end(trainer, *_)
        self._is_at_the_end = False

    def _save(self, trainer: L.Trainer) -> None:
        when = EPOCH_END if self._is_at_the_end else VALIDATION if trainer.validating else TRAINING
        self.seen.append((trainer.global_step, when))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("batches", "settings", "expected"),
    [
        (3, {}, [(1, TRAINING), (2, TRAINING), (3, VALIDATION), (3, EPOCH_END)]),
        # In the middle of the epoch, after batch 2, too.
        (
            4,
            {"val_check_interval": 0.5},
            [(1, TRAINING), (2, VALIDATION), (3, TRAINING), (4, VALIDATION), (4, EPOCH_END)],
        ),
        # Batches 2, 4 and 5 end a step.
        (5, {"accumulate_grad_batches": 2}, [(1, TRAINING), (2, TRAINING), (3, VALIDATION), (3, EPOCH_END)]),
        # Validation after batch 3 finds the gradients of one batch waiting.
        (
            6,
            {"accumulate_grad_batches": 2, "val_check_interval": 0.5},
            [(1, TRAINING), (2, TRAINING), (3, VALIDATION), (3, EPOCH_END)],
        ),
        (
            4,
            {"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 2},
            [
                *((1, TRAINING), (2, TRAINING), (3, VALIDATION), (4, EPOCH_END)),
                *((5, TRAINING), (6, VALIDATION), (7, TRAINING), (8, EPOCH_END)),
            ],
        ),
        (2, {"num_sanity_val_steps": 1}, [(1, TRAINING), (2, VALIDATION), (2, EPOCH_END)]),
        (2, {"check_val_every_n_epoch": 2}, [(1, TRAINING), (2, EPOCH_END)]),
    ],
    ids=[
        "plain",
        "val inside",
        "accumulate",
        "accumulate and val inside",
        "val by step",
        "sanity",
        "rare val",
    ],
)
def test_a_run_is_saved_where_nothing_of_it_would_be_left_out(batches, settings, expected, tiny, tmp_path):
    saves = Saves(RunFolder(tmp_path))
    trainer = L.Trainer(
        **({"max_epochs": 1, "num_sanity_val_steps": 0} | settings),
        accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[saves],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip

    trainer.fit(DistillModule(tiny().build(), AdamW(), Constant()), Batches(*[2] * batches), Batches(2))

    assert saves.seen == expected
