"""What TensorBoard shows of a run besides plain curves."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

CHARTS = {
    "losses": {
        "training": ["Multiline", ["train/task_loss", "train/transfer_loss", "train/total_loss"]],
        "validation": ["Multiline", ["val/task_loss", "val/transfer_loss", "val/total_loss"]],
    },
    "accuracy": {"student": ["Multiline", ["train/acc", "val/acc", "val/teacher_agreement"]]},
    "alpha": {"gradient norms": ["Multiline", ["train/gradient_norm_task", "train/gradient_norm_transfer"]]},
}
"""TensorBoard's custom scalar page: what belongs together on one chart."""


class Curves(TensorBoardLogger):
    """TensorBoard events in the run folder itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False)
        self.experiment.add_custom_scalars(CHARTS)

    def save(self) -> None:
        """Nothing: config.yaml already holds what Lightning would write here a second time."""

    def conclude(
        self, settings: Mapping[str, Any], ignored: Collection[str], figures: Mapping[str, float]
    ) -> None:
        """Put the finished run on the HParams page."""
        self.log_hyperparams(hyperparameters(settings, ignored), dict(figures))
        self.finalize("success")


def hyperparameters(settings: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """What tells one run from another, less what had no effect.

    TensorBoard sorts the names and shows the first five: alpha, dataset, granularity, loss, method.
    """
    told: dict[str, Any] = {
        "dataset": settings["dataset"]["name"],
        "trainer.max_epochs": settings["trainer"]["max_epochs"],
    }
    for key in {"alpha", "seed"} - set(ignored):
        told[key] = settings[key]
    for group in {"granularity", "loss", "method", "optimizer", "schedule", "student"} - set(ignored):
        for name, value in settings[group].items():
            if name == "_target_":
                told[group] = value.rpartition(".")[2]
            else:
                told[f"{group}.{name}"] = value if isinstance(value, int | float | str) else str(value)
    return told
