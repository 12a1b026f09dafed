"""`method=locality`: locality guidance (Li et al. 2022, ECCV, arXiv 2207.10026, section 3).

A small convolutional network shows a ViT early on what is local. The patch tokens of student block l become
a map F_s [D, h, w] again; a 1×1 convolution P_l, trained beside the student, brings it to the channels of
the features F_t of teacher stage l. Both are interpolated bilinearly to the larger of their sides, and

    L_guidance = Σ over pairs l of mean over channels and positions of (F_t − P_l(F_s))²
    L = L_class + β·L_guidance,  β = 2.5

Here L = alpha·L_class + (1 − alpha)·L_guidance: β = (1 − alpha)/alpha, so alpha = 1/(1 + β), 2/7 for the
paper's. The whole is then 1/(1 + β) of the paper's loss, which AdamW's steps do not depend on.

As in the authors' code the sum is over pairs, the blocks are the first, the middle and the last (0, 6, 11
of 12) and the stages all three of a ResNet-56. Two things differ: the teacher is in eval mode (theirs
normalises by the batch, since it is switched to training with its student), and it sees the student's images
as they are (theirs makes 32×32 pixels of 224×224).

Shapes: B batch, T tokens, D the student's width, P pairs, h × w positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd.data import Batch
from vitkd.errors import ConfigError
from vitkd.methods.base import DataFacts, MapSettings, Method, Objective, Terms
from vitkd.models import AttentionLayout, Model, ModelConfig, Output, Taps
from vitkd.models.output import at_least_float32

Sides = tuple[int, int]
"""rows and columns of a map"""


class Pair(NamedTuple):
    """A student block and the teacher's features that guide it."""

    block: int
    stage: int
    """counted from 1, as in the feature's name"""

    @property
    def student(self) -> str:
        """The name of the student's feature."""
        return f"block{self.block}"

    @property
    def teacher(self) -> str:
        """The name of the teacher's feature."""
        return f"stage{self.stage}"


class Guide(nn.Module):
    """Compares one block's tokens with one stage's features.

    Args:
        pair: which block and which stage.
        layout: of the block's tokens.
        width: of these tokens.
        features: the shape [channels, h, w] of the stage's.
    """

    def __init__(self, pair: Pair, layout: AttentionLayout, width: int, features: Sequence[int]) -> None:
        super().__init__()
        channels, rows, columns = features
        self.pair, self.prefix, self.grid = pair, layout.prefix, layout.grid
        self.projection = nn.Conv2d(width, channels, kernel_size=1)
        larger = max(self.grid[0], rows), max(self.grid[1], columns)
        self.resize_student, self.resize_teacher = Resize(self.grid, larger), Resize((rows, columns), larger)

    def forward(self, student: Output, teacher: Output) -> Tensor:
        """The mean squared difference of each image [B]."""
        tokens, features = student.features[self.pair.student], teacher.features[self.pair.teacher]
        projected = self.projection(tokens[:, self.prefix :].mT.unflatten(-1, self.grid))
        with torch.autocast(tokens.device.type, enabled=False):
            ours = self.resize_student(at_least_float32(projected))
            return (self.resize_teacher(at_least_float32(features)) - ours).square().mean((1, 2, 3))


class Resize:
    """Bilinear interpolation of maps, by one matrix an axis; PyTorch's own is not deterministic on a GPU."""

    def __init__(self, before: Sides, after: Sides) -> None:
        self.is_needed = before != after
        # Not buffers: an average of a model's weights would be one of its buffers, too.
        self.rows, self.columns = (interpolation(*sizes) for sizes in zip(before, after, strict=True))

    def __call__(self, maps: Tensor) -> Tensor:
        """[B, channels, *after] of [B, channels, *before]."""
        if not self.is_needed:
            return maps
        # They stay there: a CUDA graph cannot copy from the host.
        self.rows, self.columns = self.rows.to(maps), self.columns.to(maps)
        return self.rows @ maps @ self.columns.mT


def interpolation(before: int, after: int) -> Tensor:
    """The matrix [after, before] that interpolates linearly between the middles of an axis's cells."""
    basis = torch.eye(before, dtype=torch.float64).unsqueeze(0)
    return F.interpolate(basis, size=after, mode="linear", align_corners=False)[0].mT


class LocalityObjective(Objective):
    """Compares blocks with the stages that guide them, and learns to project the one to the other."""

    def __init__(self, guides: Sequence[Guide]) -> None:
        super().__init__()
        self.guides = nn.ModuleList(guides)
        pairs = [guide.pair for guide in guides]
        self.student_taps = Taps(features=tuple(dict.fromkeys(pair.student for pair in pairs)))
        self.teacher_taps = Taps(features=tuple(dict.fromkeys(pair.teacher for pair in pairs)), logits=False)
        self.curves = tuple(f"guidance_loss/{pair.student}.{pair.teacher}" for pair in pairs)

    def forward(self, batch: Batch, student: Output, teacher: Output) -> Terms:
        return {"guidance_loss": torch.stack([guide(student, teacher) for guide in self.guides], dim=-1)}


@dataclass
class LocalityDistillation(Method):
    """The student learns labels and, in some blocks, the features of a small convolutional network."""

    blocks: list[int] | None = None
    """of the student, one for each stage, the last is -1; null spreads them from the first to the last"""
    stages: list[int] | None = None
    """of the teacher, counted from 1; null takes all"""

    trains_parameters = True
    ignores = "granularity", "loss"

    def check(self, student: ModelConfig, teacher: ModelConfig, settings: MapSettings) -> None:
        if not student.attention_layouts():
            raise ConfigError(f"student={student}: has no tokens that could be guided; choose a ViT")
        if not teacher.num_stages:
            raise ConfigError(
                f"teacher={teacher}: has no stages of feature maps to guide by; choose teacher=resnet56 or "
                "teacher=resnet"
            )
        self.pairs(len(student.attention_layouts()), teacher.num_stages)

    def pairs(self, depth: int, num_stages: int) -> list[Pair]:
        """Which block learns from which stage; ConfigError where one of them does not exist."""
        stages = [*range(1, num_stages + 1)] if self.stages is None else self.stages
        blocks = spread(len(stages), depth) if self.blocks is None else self.blocks
        for name, numbers, least, most in (
            ("stages", stages, 1, num_stages),
            ("blocks", blocks, -depth, depth - 1),
        ):
            if not numbers or any(not least <= number <= most for number in numbers):
                raise ConfigError(f"method.{name}={numbers}: name at least one, from {least} to {most}")
        if len(blocks) != len(stages):
            raise ConfigError(
                f"method.blocks={blocks}: name one block for each of the {len(stages)} stages {stages}, or "
                "null to spread them over the student"
            )
        return [Pair(block % depth, stage) for block, stage in zip(blocks, stages, strict=True)]

    def objective(
        self, student: Model, teacher: Model, settings: MapSettings, data: DataFacts
    ) -> LocalityObjective:
        pairs = self.pairs(len(student.attention), teacher.config.num_stages)
        tokens = feature_shapes(student, [pair.student for pair in pairs])
        features = feature_shapes(teacher, [pair.teacher for pair in pairs])
        return LocalityObjective(
            [
                Guide(pair, student.attention[pair.block], tokens[pair.student][-1], features[pair.teacher])
                for pair in pairs
            ]
        )


def spread(count: int, depth: int) -> list[int]:
    """So many of `depth` blocks at equal distances, from the first to the last; one is the last."""
    return [ceil(i * (depth - 1) / (count - 1)) for i in range(count)] if count > 1 else [depth - 1]


@torch.no_grad()
def feature_shapes(model: Model, names: Sequence[str]) -> dict[str, torch.Size]:
    """The shape of each feature of one image; no random number is drawn."""
    config, weight, was_training = model.config, next(model.parameters()), model.training
    image = weight.new_zeros(1, config.channels, config.image_size, config.image_size)
    features = model.eval()(image, Taps(features=tuple(names), logits=False)).features
    model.train(was_training)
    return {name: feature.shape[1:] for name, feature in features.items()}
