"""The teacher's answers, asked for once: what it says of an image that always looks the same never changes.

Shapes: N images held, I any shape of image numbers ([B], or [U, B] for batches of several data orders),
H heads, T tokens, K classes.
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vitkd.data import Batch, ImageDataModule, Loader
from vitkd.models import Model, Output, Taps

log = logging.getLogger("vitkd")

SPLITS = {"train": "training", "val": "validation"}


class TeacherCache:
    """A teacher's answers to N images, looked up by the images' numbers without waiting for the device.

    A cache belongs to one run: to one teacher, one data set, one fixed view of each image and one precision.
    So an image's position in its official split says all, and nothing is ever replaced. It is derived from
    what the run has anyway and never saved; copies of a module share it, since nobody writes to it.

    Args:
        images: [N] int64, the images' positions in their official split.
        size: of that split.
    """

    def __init__(self, images: Tensor, size: int) -> None:
        self.images = images
        # What is not held points behind the end: a lookup fails, where −1 would give another image's answers.
        self._rows = torch.full((size,), len(images), device=images.device)
        self._rows[images] = torch.arange(len(images), device=images.device)
        self._answers: Output | None = None

    @classmethod
    @torch.no_grad()
    def fill(
        cls, ask: Callable[[Tensor], Output], batches: Iterable[Batch], images: Tensor, size: int
    ) -> Self:
        """A cache of what `ask` answers to `batches`, which hold each of `images` once.

        Args:
            ask: from [B, channels, H, W] to the teacher's answer; it runs in the caller's precision.
            images, size: as the constructor's.
        """
        cache = cls(images, size)
        filled = 0
        for batch in batches:
            cache._put(batch.index, ask(batch.image))
            filled += len(batch.index)
        assert filled == len(images), f"{filled} images for {len(images)} rows"
        return cache

    def answer(self, index: Tensor) -> Output:
        """The answers to the images `index` [*I]; an IndexError, on CUDA an assertion, if there are none."""
        assert self._answers is not None
        rows = self._rows[index]
        # Several times faster than indexing where an answer is large.
        return self._answers.map(lambda all_: all_.index_select(0, rows.flatten()).unflatten(0, rows.shape))

    def _put(self, index: Tensor, answer: Output) -> None:
        if self._answers is None:
            self._answers = answer.map(lambda part: part.new_empty(len(self.images), *part.shape[1:]))
        rows = self._rows[index]
        for all_, part in zip(self._answers.tensors(), answer.tensors(), strict=True):
            all_[rows] = part

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class AsksTeacher(Protocol):
    """A module that asks a teacher."""

    teacher: Model
    cached: dict[str, TeacherCache]
    """By split; what is not there has to be asked. Whoever moves or casts the module empties it."""

    def teacher_taps(self, split: str) -> Taps | None:
        """What is asked for the images of "train" or "val"; None if nothing is."""

    def ask_teacher(self, images: Tensor, split: str) -> Output:
        """The teacher's answer to `images` [B, channels, H, W], as training or validation asks for it."""


class TeacherCaching(Callback):
    """Asks the teacher before the first step what it would be asked in every epoch, where that saves work.

    A split is kept if its images always look the same, it will be gone through more than once, and the
    answers take no more memory than is left. Each of several processes keeps its own. A run that goes on
    from a checkpoint asks again: filling draws no random number.

    Args:
        data: the run's.
        gib: the most that the answers may take on each device, in GiB.
    """

    def __init__(self, data: ImageDataModule, gib: float) -> None:
        self.data, self.gib = data, gib

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = cast(AsksTeacher, pl_module)
        left = self.gib * 2**30
        for split in SPLITS:
            views = None if module.teacher_taps(split) is None else self.data.fixed_views(split)
            if views is None or self._passes(trainer, split, views) <= 1:
                continue
            images = torch.cat(views.sampler.batches())
            size = len(images) * self._bytes_per_image(trainer, module, split, views)
            self._log(split, len(images), size, fits=size <= left)
            if size <= left:
                left -= size
                module.cached[split] = self._fill(trainer, module, split, views, images)

    def _passes(self, trainer: L.Trainer, split: str, views: Loader) -> float:
        """How often the rest of the training goes through the images of `split`."""
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
        left = epochs - trainer.current_epoch
        if split == "train":
            images = trainer.num_training_batches * self.data.dataset.batch_size * trainer.world_size
            return left * images / len(views.sampler.index)
        limit = trainer.limit_val_batches
        share = min(limit / len(views), 1.0) if isinstance(limit, int) else limit
        return left / (trainer.check_val_every_n_epoch or 1) * share

    def _bytes_per_image(self, trainer: L.Trainer, module: AsksTeacher, split: str, views: Loader) -> int:
        """What the answer to one image takes; it is asked for to find out."""
        with asking_as_training(trainer):
            image = trainer.precision_plugin.convert_input(next(iter(views))).image[:1]
            return sum(part.nbytes for part in module.ask_teacher(image, split).tensors())

    def _fill(
        self, trainer: L.Trainer, module: AsksTeacher, split: str, views: Loader, images: Tensor
    ) -> TeacherCache:
        with asking_as_training(trainer):
            return TeacherCache.fill(
                lambda pixels: module.ask_teacher(pixels, split),
                (trainer.precision_plugin.convert_input(batch) for batch in views),
                images,
                len(views.labels),
            )

    def _log(self, split: str, images: int, size: int, fits: bool) -> None:
        what = f"teacher: its answers to {images:,} {SPLITS[split]} images"
        if fits:
            log.info(
                "%s are computed once and kept (%s); teacher.cache=off asks it every time", what, amount(size)
            )
        else:
            log.info(
                "%s would take %s: not kept, with teacher.cache_gib=%g it is asked again in every epoch",
                *(what, amount(size), self.gib),
            )


def asking_as_training(trainer: L.Trainer) -> AbstractContextManager[None]:
    """What Lightning does around a step: in another precision the teacher would answer something else."""
    return trainer.precision_plugin.val_step_context()


def amount(size: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
