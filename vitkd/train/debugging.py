"""What runs of `debug=…` do besides training: judge whether a few images are learned, or profile steps."""

import logging
from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, schedule

from vitkd.config.run import Config
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")

NEAR_ZERO = 0.05
"""A class loss, in nats, at which an image's class has a probability of 95 %."""
NEAR_ZERO_SHARE = 0.1
"""Of the transfer loss that training began with: its unit depends on the method."""
SKIPPED, PROFILED = 5, 10
"""Steps before those that are profiled, and those."""
OPERATIONS = 15


def debug_callbacks(config: Config, folder: RunFolder) -> list[Callback]:
    """What takes part in a student's training for `debug=overfit` and `debug=profile`."""
    if config.debug == "overfit":
        return [OverfitVerdict(config.dataset.batch_size, learns_labels=config.alpha > 0)]
    return [StepProfile(folder)] if config.debug == "profile" else []


class OverfitVerdict(Callback):
    """Says at the end whether a student has learned its few images by heart.

    Args:
        images: how many there are.
        learns_labels: judge the class loss; else the transfer loss.
    """

    def __init__(self, images: int, learns_labels: bool) -> None:
        self.images, self.learns_labels = images, learns_labels
        self._first: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if not self._first:
            self._first = losses_of(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first, last = self._first, losses_of(trainer)
        changes = [f"{name} loss {first[name]:.3g} → {last[name]:.3g}" for name in last]
        line = f"overfit: {', '.join(changes)} on {self.images} images in {trainer.global_step} steps"
        if has_overfit(first, last, self.learns_labels):
            log.info("%s: succeeded", line)
        else:
            advice = (
                "try another optimizer.lr, more trainer.max_epochs, then look at the model and its labels"
            )
            log.warning("warning: %s: did not succeed; %s", line, advice)


def losses_of(trainer: L.Trainer) -> dict[str, float]:
    """The latest logged training losses."""
    latest = {name: trainer.callback_metrics.get(f"train/{name}_loss") for name in ("class", "transfer")}
    return {name: value.item() for name, value in latest.items() if value is not None}


def has_overfit(first: Mapping[str, float], last: Mapping[str, float], learns_labels: bool) -> bool:
    """Whether the loss that a student learns by is near 0 after training."""
    if learns_labels:
        return last["class"] <= NEAR_ZERO
    return last["transfer"] <= NEAR_ZERO_SHARE * first["transfer"]


class StepProfile(Callback):
    """Profiles a few training steps: a table of the operations that take longest, and trace.json."""

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "trace.json"
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        steps = schedule(wait=SKIPPED - 1, warmup=1, active=PROFILED, repeat=1)
        self._sorted_by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], schedule=steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._profile.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        self._profile.step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._profile.stop()
        if trainer.global_step < SKIPPED + PROFILED:
            few = f"{trainer.global_step} steps are too few for a profile"
            log.warning("warning: %s; set trainer.limit_train_batches=%d", few, SKIPPED + PROFILED)
            return
        operations = self._profile.key_averages()
        log.info(
            "%s", operations.table(sort_by=self._sorted_by, row_limit=OPERATIONS, max_name_column_width=40)
        )
        self._profile.export_chrome_trace(str(self.path))
        log.info("profile: %d steps in %s, for https://ui.perfetto.dev", PROFILED, self.path)
