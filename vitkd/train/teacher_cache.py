"""The teacher's answers, asked for once: what it says of an image that always looks the same never changes.

Shapes: N images held, I any shape of image numbers ([B], or [U, B] for batches of several data orders),
H heads, T tokens, K classes.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vitkd.data import Batch, ImageDataModule, Loader
from vitkd.models import Model, ViTConfig
from vitkd.models.base import Answer
from vitkd.models.layers import Factors

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
        # What is not held points behind the end: a lookup fails, where −1 would give another image's scores.
        self._rows = torch.full((size,), len(images), device=images.device)
        self._rows[images] = torch.arange(len(images), device=images.device)
        self._scores: dict[int, Tensor] = {}
        self._logits: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def fill(
        cls, ask: Callable[[Tensor], Answer], batches: Iterable[Batch], images: Tensor, size: int
    ) -> Self:
        """A cache of what `ask` says of `batches`, which hold each of `images` once.

        Args:
            ask: from [B, C, H, W] to scores [B, H, T, T] a block; it runs in the caller's precision.
            images, size: as the constructor's.
        """
        cache = cls(images, size)
        filled = 0
        for batch in batches:
            cache._put(batch.index, ask(batch.image))
            filled += len(batch.index)
        assert filled == len(images), f"{filled} images for {len(images)} rows"
        return cache

    def answer(self, index: Tensor) -> Answer:
        """What was said of the images `index` [*I]; an IndexError, on CUDA an assertion, if nothing was."""
        rows = self._rows[index]
        logits = None if self._logits is None else _take(self._logits, rows)
        return Answer({block: _take(scores, rows) for block, scores in self._scores.items()}, logits)

    def scores(self, index: Tensor) -> dict[int, Tensor]:
        """The scores [*I, H, T, T] of each block, of the images `index` [*I]; raises as `answer`."""
        return dict(self.answer(index).scores)  # type: ignore[arg-type]

    def _put(self, index: Tensor, answer: Answer) -> None:
        rows = self._rows[index]
        for block, found in answer.scores.items():
            scores = found.scores() if isinstance(found, Factors) else found
            if block not in self._scores:
                self._scores[block] = scores.new_empty(len(self.images), *scores.shape[1:])
            self._scores[block][rows] = scores
        if answer.logits is not None:
            if self._logits is None:
                self._logits = answer.logits.new_empty(len(self.images), answer.logits.shape[-1])
            self._logits[rows] = answer.logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """[*I, …] of [N, …] for rows [*I]; several times faster than indexing where … is large."""
    return values.index_select(0, rows.flatten()).unflatten(0, rows.shape)


class Learner(Protocol):
    """A module that asks a teacher."""

    teacher: Model
    cached: dict[str, TeacherCache]
    """By split; what is not there has to be asked. Whoever moves or casts the module empties it."""

    def teacher_blocks(self, split: str) -> list[int] | None:
        """The blocks whose scores are needed for the images of "train" or "val"; None if no answer is."""

    def ask_teacher(self, images: Tensor, split: str) -> Answer:
        """Run the teacher on `images` [B, C, H, W] as training or validation does."""


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
        learner = cast(Learner, pl_module)
        left = self.gib * 2**30
        for split in SPLITS:
            blocks = learner.teacher_blocks(split)
            views = None if blocks is None else self.data.fixed_views(split)
            if blocks is None or views is None or self._passes(trainer, split, views) <= 1:
                continue
            images = torch.cat(views.sampler.batches())
            size = len(images) * bytes_per_image(learner.teacher, blocks)
            self._tell(split, len(images), size, fits=size <= left)
            if size <= left:
                left -= size
                learner.cached[split] = self._fill(trainer, learner, split, views, images)

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

    def _fill(
        self, trainer: L.Trainer, learner: Learner, split: str, views: Loader, images: Tensor
    ) -> TeacherCache:
        # What Lightning does around a step: in another precision the teacher would say something else.
        precision = trainer.precision_plugin
        with precision.val_step_context():
            return TeacherCache.fill(
                lambda pixels: learner.ask_teacher(pixels, split),
                (precision.convert_input(batch) for batch in views),
                images,
                len(views.labels),
            )

    def _tell(self, split: str, images: int, size: int, fits: bool) -> None:
        what = f"teacher: its answers to {images:,} {SPLITS[split]} images"
        if fits:
            log.info("%s are computed once and kept (%s); teacher.cache=off asks it anew", what, amount(size))
        else:
            log.info(
                "%s would take %s: not kept, with teacher.cache_gib=%g it is asked anew in every epoch",
                *(what, amount(size), self.gib),
            )


def bytes_per_image(teacher: Model, blocks: list[int]) -> int:
    """What the scores of `blocks` and the logits of one image take."""
    entry = torch.promote_types(next(teacher.parameters()).dtype, torch.float32).itemsize
    c = teacher.config
    of_maps = len(blocks) * c.num_heads * c.tokens**2 if isinstance(c, ViTConfig) else 0
    return (of_maps + c.num_classes) * entry


def amount(size: int) -> str:
    """Bytes, as a person reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
