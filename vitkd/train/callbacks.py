"""What takes part in a training beside the module: pictures, progress lines, what makes steps faster."""

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from vitkd.cli.console import is_terminal
from vitkd.config.run import Config
from vitkd.data import ImageDataModule, Loader
from vitkd.process.distributed import is_first
from vitkd.runs.folder import RunFolder
from vitkd.train.cuda_graph import GraphedStep
from vitkd.train.module import DistillModule
from vitkd.train.pictures import AttentionPictures
from vitkd.train.teacher_cache import TeacherCache

log = logging.getLogger("vitkd")

EPOCH_COLUMNS = {
    "train/total_loss": "loss {:.4f}",
    "train/transfer_loss": "transfer {:.4g}",
    "train/acc": "train {:.1%}",
    "val/acc": "val {:.1%}",
    "val/teacher_agreement": "agreement {:.1%}",
    "train/images_per_second": "{:,.0f} images/s",
}
SPLITS = {"train": "training", "val": "validation"}


def attention_pictures(config: Config, data: ImageDataModule, folder: RunFolder) -> AttentionPictures | None:
    """Shows where teacher and student look; None where pictures are switched off."""
    if not config.pictures_every_n_epochs:
        return None
    batch = data.first("val" if config.dataset.validates else "test", 4)
    return AttentionPictures(
        batch.image,
        batch.label,
        data.class_names,
        config.dataset.mean,
        config.dataset.std,
        every_n_epochs=config.pictures_every_n_epochs,
        path=folder.pictures,
    )


def faster_steps(config: Config, data: ImageDataModule) -> list[Callback]:
    """Reuses the teacher's outputs, and replays steps from a CUDA graph."""
    callbacks: list[Callback] = []
    if config.method.needs_teacher and config.teacher.cache == "auto":
        callbacks.append(TeacherCaching(data, config.teacher.cache_gib))
    if config.cuda_graph == "auto":
        callbacks.append(CudaGraphs())
    return callbacks


class TeacherCaching(Callback):
    """Asks the teacher before the first step what it would be asked in every epoch, where that saves work.

    A split is kept if its images always look the same, the teacher is asked for all of each and more than
    once, and the answers take no more memory than is left. Each of several processes keeps its own. A resumed
    run asks again, even for its last epoch alone: filling draws no random number, but answers to other
    batches can differ in their last bits, on a GPU they do.

    Args:
        data: the run's.
        gib: the most that the answers may take on each device, in GiB.
    """

    def __init__(self, data: ImageDataModule, gib: float) -> None:
        self.data, self.gib = data, gib

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(DistillModule, pl_module)
        left = self.gib * 2**30
        for split in SPLITS:
            varies = split == "train" and module.shares_drop_path
            is_fixed = module.teacher_taps(split) is not None and not varies
            views = self.data.fixed_views(split) if is_fixed else None
            if views is None or self._passes(trainer, split, views) <= 1:
                continue
            images = torch.cat(views.sampler.batches())
            size = len(images) * self._bytes_per_image(trainer, module, split, views)
            self._log(split, len(images), size, fits=size <= left)
            if size <= left:
                left -= size
                module.cached[split] = self._fill(trainer, module, split, views, images)

    def _passes(self, trainer: L.Trainer, split: str, views: Loader) -> float:
        """How often the whole training goes through the images of `split`."""
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        if split == "train":
            images = trainer.num_training_batches * self.data.dataset.batch_size * trainer.world_size
            return epochs * images / len(views.sampler.index)
        limit = trainer.limit_val_batches
        share = min(limit / len(views), 1.0) if isinstance(limit, int) else limit
        return epochs / (trainer.check_val_every_n_epoch or 1) * share

    def _bytes_per_image(self, trainer: L.Trainer, module: DistillModule, split: str, views: Loader) -> int:
        """What the answer to one image takes; it is asked for to find out."""
        with trainer.precision_plugin.val_step_context():
            image = trainer.precision_plugin.convert_input(next(iter(views))).image[:1]
            return sum(part.nbytes for part in module.ask_teacher(image, split).tensors())

    def _fill(
        self, trainer: L.Trainer, module: DistillModule, split: str, views: Loader, images: Tensor
    ) -> TeacherCache:
        # In another precision than a step's the teacher would answer something else.
        with trainer.precision_plugin.val_step_context():
            return TeacherCache(
                lambda pixels: module.ask_teacher(pixels, split),
                (trainer.precision_plugin.convert_input(batch) for batch in views),
                images,
                len(views.labels),
            )

    def _log(self, split: str, images: int, size: int, fits: bool) -> None:
        amount = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        what = f"teacher: its answers to {images:,} {SPLITS[split]} images"
        if fits:
            log.info("%s are computed once and kept (%s); teacher.cache=off asks it every time", what, amount)
        else:
            log.info(
                "%s would take %s: not kept, with teacher.cache_gib=%g it is asked again in every epoch",
                *(what, amount, self.gib),
            )


class CudaGraphs(Callback):
    """Has a module take its steps by CUDA graph where it can; says why where it cannot."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        device = trainer.strategy.root_device
        reason = why_not(trainer) if device.type == "cuda" else None
        if reason:
            log.info("no CUDA graph: %s; cuda_graph=off leaves it at that", reason)
        can = device.type == "cuda" and not reason
        for optimizer in trainer.optimizers:
            set_capturable(optimizer, can, device)
        if can:
            pl_module.graph = GraphedStep(pl_module.whole_step)  # type: ignore[assignment,arg-type]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # It holds the memory of a whole step.
        pl_module.graph = None  # type: ignore[assignment]

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.on_train_end(trainer, pl_module)


def set_capturable(optimizer: torch.optim.Optimizer, can: bool, device: torch.device) -> None:
    """Have a graph read the learning rate as it is by then, not as it was at the capture; or undo that.

    The settings may be those of a checkpoint, from another device.
    """
    for group in optimizer.param_groups:
        group["capturable"] = can
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if can else rate


def why_not(trainer: L.Trainer) -> str | None:
    """What keeps the steps of a training from being replayed, or None."""
    if trainer.world_size > 1:
        return f"{trainer.world_size} processes exchange gradients"
    if trainer.accumulate_grad_batches > 1:
        return f"a step has {trainer.accumulate_grad_batches} batches (trainer.accumulate_grad_batches)"
    if trainer.precision == "16-mixed":
        return "16-mixed looks at every step's gradients; trainer.precision=bf16-mixed does not"
    if torch.is_anomaly_enabled():
        return "trainer.detect_anomaly looks at every step"
    return None


def progress(whose: str) -> list[Callback]:
    """Shows how far the training of a "student", "teacher" or stack of "students" is."""
    return [EpochLines(whose), *([ProgressBar(whose)] if is_terminal() and is_first() else [])]


class EpochLines(Callback):
    """One plain line an epoch, to the console and the log file; of a stack the median of every metric."""

    def __init__(self, whose: str) -> None:
        self.whose = whose

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        columns = format_metrics({name: values.nanquantile(0.5).item() for name, values in metrics.items()})
        stacked = next(iter(metrics.values())).shape
        median = f"median of {stacked[0]}: " if stacked else ""
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        log.info("%s: %s  %s%s", self.whose, epoch, median, columns)


def format_metrics(metrics: Mapping[str, float]) -> str:
    """An epoch's metrics in columns; what is absent or not a number is left out."""
    known = {
        name: text for name, text in EPOCH_COLUMNS.items() if not math.isnan(metrics.get(name, math.nan))
    }
    return "  ".join(text.format(metrics[name]) for name, text in known.items())


class ProgressBar(Callback):
    """One bar for the whole training, below the epochs' lines; gone when it ends."""

    def __init__(self, whose: str) -> None:
        self.whose = whose
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, transient=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._task = self._progress.add_task("", total=trainer.estimated_stepping_batches)
        self._progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        epoch = f"{self.whose}: epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._progress.update(self._task, description=epoch, completed=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._progress.stop()
