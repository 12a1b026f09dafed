"""`method=crd`: contrastive representation distillation (Tian, Krishnan and Isola 2020, arXiv 1910.10699).

Both models' features before their last layer are projected to D numbers, by linear layers that are trained,
and normalised to length 1. A student's embedding s is compared with teacher embeddings t of a bank: the
positive, of the same image, and K negatives, of images of other classes. With P = exp(s·t/τ)/Z, where Z is N
times the mean of exp(s·t/τ) in the first batch and fixed afterwards,

    L_student = −[ln P₊/(P₊ + K/N + ε) + Σ over negatives of ln (K/N)/(P₋ + K/N + ε)]      (equation 18)
    L = L_student + L_teacher

where L_teacher compares a teacher's embedding with a bank of student embeddings likewise. The paper adds
β = 0.8 times L to the class loss. Ours is alpha·L_class + (1 − alpha)·L, so alpha = 1/(1 + β) = 0.5556 weighs
them as the paper does; the total is 0.5556 of the paper's, to which AdamW's steps are indifferent.

Shapes: N training images, B batch, R rows of a bank, D width of an embedding.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.errors import ConfigError, check, check_at_least, check_choice, check_positive
from vitkd.methods.banks import Bank, BothSides, MemoryBank, Queue
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.models import Model, Output, Taps
from vitkd.models.output import at_least_float32
from vitkd.process.distributed import rows_of_all

log = logging.getLogger("vitkd")

FEATURES = "pre_logits"
TAPS = Taps(features=(FEATURES,), logits=False)
EPSILON = 1e-7


class ContrastiveObjective(Objective):
    """Compares embeddings of both models with those in a bank.

    Args:
        widths: of the student's features and of the teacher's.
        bank: holds embeddings of width D.
        temperature: τ.
        num_images: N.
    """

    student_taps = teacher_taps = TAPS
    curves = "crd_student", "crd_teacher"
    # No row of a bank is of a validation image.
    validates = False

    def __init__(self, widths: tuple[int, int], bank: Bank, temperature: float, num_images: int) -> None:
        super().__init__()
        self.temperature, self.num_images = temperature, num_images
        self.project_student, self.project_teacher = (nn.Linear(width, bank.width) for width in widths)
        self.bank = bank

    def start_epoch(self, epoch: int, epochs: int) -> None:
        self.bank.start_epoch(epoch)

    # A compiled backward pass recomputes what it needs of the bank, which is written by then.
    @torch.compiler.disable
    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        embeddings = BothSides(
            F.normalize(at_least_float32(self.project_student(student.features[FEATURES])), dim=-1),
            F.normalize(at_least_float32(self.project_teacher(teacher.features[FEATURES])), dim=-1),
        )
        positives, counts = self.bank.positives(batch, embeddings), self.bank.counts(batch)
        # Each side is compared with the other.
        sides = zip(
            *(embeddings, reversed(positives), reversed(self.bank.embeddings), self.bank.normalizers),
            strict=True,
        )
        losses = [with_gradient(*self.contrast(*side, counts), of=side[0]) for side in sides]
        if self.training:
            self.bank.write(batch, embeddings)
        return {"crd_loss": torch.stack(losses, dim=-1)}

    @torch.no_grad()
    def contrast(
        self, anchor: Tensor, positive: Tensor, rows: Tensor, normalizer: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_student or L_teacher of each image [B], and its gradient by `anchor` [B, D].

        That is (Σ over negatives of P₋/(P₋ + K/N + ε)·t₋ − (K/N + ε)/(P₊ + K/N + ε)·t₊)/τ: written down, it
        takes neither the scores nor the bank, which changes, into the backward pass.

        Args:
            anchor, positive: [B, D].
            rows: [R, D], of the bank.
            normalizer: Z; 0 in the first batch, which sets it.
            counts: [B, R], how often each row is a negative.
        """
        rows, negatives = at_least_float32(rows), counts.sum(-1, keepdim=True)
        with torch.autocast(anchor.device.type, enabled=False):
            of_rows = (anchor @ rows.mT / self.temperature).exp()
            of_positive = ((anchor * positive).sum(-1, keepdim=True) / self.temperature).exp()
            first = self.num_images * (of_positive.sum() + (counts * of_rows).sum()) / (1 + negatives).sum()
            z = self.fixed(normalizer, first)
            noise = negatives.clamp(min=1) / self.num_images
            p_positive, p_rows = of_positive / z, of_rows / z
            share_positive = p_positive / (p_positive + noise + EPSILON)
            # −ln (K/N)/(P₋ + K/N + ε), without rounding what is nearly 1.
            missed = ((p_rows + EPSILON) / noise).log1p()
            loss = (counts * missed).sum(-1) - share_positive.log().squeeze(-1)
            pushed = (counts * p_rows / (p_rows + noise + EPSILON)) @ rows
            return loss, (pushed - (1 - share_positive) * positive) / self.temperature

    def fixed(self, normalizer: Tensor, first: Tensor) -> Tensor:
        """Z as it is or, in the first batch, `first`, averaged over all processes; training keeps it."""
        # Without a branch: a CUDA graph takes all steps alike, and nothing waits for the device.
        z = torch.where(normalizer > 0, normalizer, rows_of_all(first[None]).mean())
        if self.training:
            normalizer.copy_(z)
        return z


def with_gradient(values: Tensor, gradient: Tensor, of: Tensor) -> Tensor:
    """The values [B], whose gradients by the rows `of` [B, D] are `gradient` [B, D]."""
    return values + ((of - of.detach()) * gradient).sum(-1)


@dataclass
class CRDDistillation(Method):
    """The student learns labels and, by contrast with other images, the teacher's features."""

    bank: str = "memory"
    """memory: a row for every training image | queue: the last images"""
    negatives: int = 16384
    """K; in a queue its length, so that those of an image's own class are fewer"""
    width: int = 128
    """D"""
    temperature: float = 0.07
    momentum: float = 0.5
    """of the rows of a memory bank"""
    bank_gib: float = 2.0
    """the most memory that the banks may take, in GiB"""

    trains_parameters = True
    why_unmixed = "method=crd contrasts an image with those of other classes, and mixed images are of two"

    def __post_init__(self) -> None:
        check_choice(self, "bank", ("memory", "queue"))
        check_at_least(1, self, "negatives", "width", most=10**6)
        check_positive(self, "temperature", "bank_gib")
        check(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1); at 1 no row would ever change")

    @property
    def ignores(self) -> tuple[str, ...]:
        return ("granularity", "loss", *(("method.momentum",) if self.bank == "queue" else ()))

    def check_data(self, data: DataFacts) -> None:
        positions, _ = data.labels()
        rows = len(positions) if self.bank == "memory" else self.negatives
        gib = 2 * rows * self.width * 4 / 2**30
        what = f"two banks of {rows:,} embeddings, {self.width} numbers each, take"
        if gib > self.bank_gib:
            fix = "bank=queue keeps the last images' alone" if self.bank == "memory" else "lower negatives"
            raise ConfigError(
                f"method.bank_gib={self.bank_gib:g}: {what} {gib:,.1f} GiB; raise it, or method.{fix}"
            )
        log.info("crd: %s %s MiB of the device and of each checkpoint", what, f"{1024 * gib:,.1f}")

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> ContrastiveObjective:
        positions, _ = data.labels()
        widths = feature_width(student), feature_width(teacher)
        return ContrastiveObjective(widths, self.make_bank(data), self.temperature, len(positions))

    def make_bank(self, data: DataFacts) -> Bank:
        """The bank as training begins with it, from PyTorch's global generator."""
        if self.bank == "queue":
            return Queue(self.negatives, self.width)
        return MemoryBank(data, self.width, self.negatives, self.momentum)


@torch.no_grad()
def feature_width(model: Model) -> int:
    """How many numbers the model classifies by; no random number is drawn."""
    config, was_training = model.config, model.training
    image = next(model.parameters()).new_zeros(1, config.channels, config.image_size, config.image_size)
    features = model.eval()(image, TAPS).features
    model.train(was_training)
    return features[FEATURES].shape[-1]
