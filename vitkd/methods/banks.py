"""Embeddings of earlier images, of both sides, which a contrastive method compares a batch with.

Shapes: N training images, B batch, K negatives, R rows of a bank, D width of an embedding, C classes.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.data.hashing import key_of, random_bits, uniform_int
from vitkd.data.loader import NEGATIVES
from vitkd.methods.base import DataFacts
from vitkd.models.output import at_least_float32, compared_in
from vitkd.process.distributed import rows_of_all


class BothSides(NamedTuple):
    """The embeddings of the same images by both models."""

    student: Tensor
    teacher: Tensor


class Bank(nn.Module, ABC):
    """R rows of embeddings by each model; a row's two are of one image.

    Training writes them, and checkpoints hold them. They are no weights: copies of a module, as an average of
    its weights is one, share the bank.

    Args:
        rows: R.
        width: D.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.width, bound = width, 1 / math.sqrt(width / 3)
        self.student: Tensor
        self.teacher: Tensor
        self.normalizers: Tensor
        """[2]: Z of the student's loss and of the teacher's; 0 before the first batch"""
        self.register_buffer("student", torch.empty(rows, width).uniform_(-bound, bound))
        self.register_buffer("teacher", torch.empty(rows, width).uniform_(-bound, bound))
        self.register_buffer("normalizers", torch.zeros(2))

    @property
    def embeddings(self) -> BothSides:
        """[R, D] each."""
        return BothSides(self.student, self.teacher)

    def start_epoch(self, epoch: int) -> None:
        """Prepare for epoch `epoch`, counted from 0."""

    @abstractmethod
    def positives(self, batch: Batch, embeddings: BothSides) -> BothSides:
        """[B, D] each: what stands for the batch's images on either side, without gradient."""

    @abstractmethod
    def counts(self, batch: Batch) -> Tensor:
        """[B, R]: how often each row is a negative of each image."""

    def write(self, batch: Batch, embeddings: BothSides) -> None:
        """Take in a batch's embeddings, those of all processes: their banks stay equal."""
        label, index = rows_of_all(batch.label), rows_of_all(batch.index)
        self._write(label, index, BothSides(*map(rows_of_all, embeddings)))

    @abstractmethod
    def _write(self, label: Tensor, index: Tensor, embeddings: BothSides) -> None:
        """Take in the embeddings [B, D] of images `index` [B], of classes `label` [B]."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class MemoryBank(Bank):
    """A row for each training image, by class; a moving average of its embeddings (Wu et al. 2018).

    Negatives of an image are K draws, with replacement, from the images of other classes. They depend on
    (seed, epoch, index) alone.

    Args:
        data: the training images.
        width: D.
        negatives: K.
        momentum: the share of a row that stays when its image is seen.
    """

    def __init__(self, data: DataFacts, width: int, negatives: int, momentum: float) -> None:
        positions, labels = data.labels()
        super().__init__(len(positions), width)
        self.negatives, self.momentum, self.seed = negatives, momentum, data.seed
        self.row_of: Tensor
        self.of_class: Tensor
        self.first_row: Tensor
        self.key: Tensor
        # What has no row points behind the end: a lookup fails.
        row_of = torch.full((data.num_images,), len(positions))
        row_of[positions[labels.argsort(stable=True)]] = torch.arange(len(positions))
        of_class = labels.bincount(minlength=data.num_classes)
        known = {"row_of": row_of, "of_class": of_class, "first_row": of_class.cumsum(0) - of_class}
        for name, values in {**known, "key": key_of(data.seed, 0, NEGATIVES)}.items():
            self.register_buffer(name, values, persistent=False)

    def start_epoch(self, epoch: int) -> None:
        # In place: a CUDA graph reads it where it lies.
        self.key.copy_(key_of(self.seed, epoch, NEGATIVES))

    def positives(self, batch: Batch, embeddings: BothSides) -> BothSides:
        rows = self.row_of[batch.index]
        return BothSides(self.student[rows], self.teacher[rows])

    def counts(self, batch: Batch) -> Tensor:
        own, first = self.of_class[batch.label], self.first_row[batch.label]
        bits = random_bits(self.key, batch.index, self.negatives)
        others = uniform_int(bits, len(self.student) - own)
        rows = torch.where(others < first, others, others + own).mT
        counts = at_least_float32(self.student.new_zeros(len(rows), len(self.student)))
        return counts.scatter_add_(1, rows, counts.new_ones(()).expand(rows.shape))

    def _write(self, label: Tensor, index: Tensor, embeddings: BothSides) -> None:
        rows = self.row_of[index]
        # Of several views of one image the last: each copies the same, whichever is copied last.
        last = torch.where(rows[:, None] == rows, torch.arange(len(rows), device=rows.device), -1).amax(1)
        for bank, new in zip(self.embeddings, embeddings, strict=True):
            moved = self.momentum * bank[rows] + (1 - self.momentum) * new[last]
            bank.index_copy_(0, rows, F.normalize(moved, dim=-1).to(bank.dtype))


class Queue(Bank):
    """The last R images' embeddings; those of other classes are an image's negatives (MoCo: He et al. 2020).

    The positive is the batch's own embedding, as the queue need not have one.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.label: Tensor
        self.oldest: Tensor
        # Rows of no image are negatives of every class.
        self.register_buffer("label", torch.full((rows,), -1))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    def positives(self, batch: Batch, embeddings: BothSides) -> BothSides:
        return BothSides(*(side.detach() for side in embeddings))

    def counts(self, batch: Batch) -> Tensor:
        return (self.label != batch.label[:, None]).to(compared_in(self.student))

    def _write(self, label: Tensor, index: Tensor, embeddings: BothSides) -> None:
        size = len(self.label)
        # Of a batch that is larger than the queue only the end.
        label, embeddings = label[-size:], BothSides(*(side[-size:] for side in embeddings))
        rows = (self.oldest + torch.arange(len(label), device=label.device)) % size
        for own, new in zip((self.label, *self.embeddings), (label, *embeddings), strict=True):
            own.index_copy_(0, rows, new.to(own.dtype))
        self.oldest.copy_((self.oldest + len(label)) % size)
