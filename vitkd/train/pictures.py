"""Attention pictures during training: where the teacher looks, and where its student does.

Shapes: B images, C channels, g patches along one side.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vitkd.explain.gallery.figures import attention_unit, denormalise, figure_1
from vitkd.explain.maps.attention import cls_attention
from vitkd.explain.maps.recording import evaluating, layout, who_reads
from vitkd.explain.maps.windows import received, windows_of
from vitkd.methods.maps.granularity import BlockPair
from vitkd.models import Model, Taps
from vitkd.models.output import OUTER, at_least_float32
from vitkd.runs.curves import CurveLogger
from vitkd.runs.files import write_atomically
from vitkd.train.module import DistillModule

IMAGES = 4


class AttentionPictures(Callback):
    """Draws the report's Figure 1 of a `DistillModule`: where the teacher looks, and where its student does.

    The student is shown in its last distilled block, beside that block's teacher, and in a block that was not
    distilled, if there is one.

    Drawing takes no random number and leaves the model as it was, so training is the same with and without.

    Args:
        images: [B, C, H, W], normalised, on the CPU; the first four are drawn.
        labels: [B], what they show.
        class_names: what each label means.
        mean, std: one value a channel, to undo the normalisation.
        every_n_epochs: how often a picture goes to the loggers, besides the end.
        path: the PNG file to write at the end; None for none.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
        every_n_epochs: int,
        path: Path | None,
    ) -> None:
        self.images = images[:IMAGES]
        self.pixels = denormalise(self.images, mean, std)
        self.labels = [class_names[label] for label in labels[:IMAGES].tolist()]
        self.class_names = class_names
        self.every_n_epochs = every_n_epochs
        self.path = path
        self._logged_step = -1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if trainer.is_global_zero and epoch % self.every_n_epochs == 0:
            module = cast(DistillModule, pl_module)
            picture = rendered(self.draw(module, f"epoch {epoch}"))
            self._log(module, trainer.loggers, picture, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            module = cast(DistillModule, pl_module)
            self.conclude(module, trainer.loggers, trainer.current_epoch, trainer.global_step)

    def conclude(self, module: DistillModule, loggers: Sequence[Logger], epoch: int, step: int) -> None:
        """Draw the trained `module`, for the loggers and as a file."""
        is_logged = self._logged_step == step
        if is_logged and self.path is None:
            return
        picture = rendered(self.draw(module, f"epoch {epoch}"))
        if not is_logged:
            self._log(module, loggers, picture, step)
        if self.path is not None:
            png = io.BytesIO()
            Image.fromarray(picture).save(png, format="png")
            write_atomically(self.path, png.getvalue())

    def state_dict(self) -> dict[str, int]:
        return {"logged_step": self._logged_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._logged_step = state_dict["logged_step"]

    def draw(self, module: DistillModule, when: str) -> Figure:
        """Figure 1 of the last distilled pair; `when` opens its caption."""
        student, teacher = module.model, module.teacher
        pair, other = shown_blocks(module)
        teacher_heads = [head for heads in pair.teacher_heads for head in heads]
        student_heads: dict[int, Sequence[int]] = {pair.student_block: pair.student_heads}
        if other is not None:
            student_heads[other] = range(student.attention[other].heads)
        teacher_maps, teacher_says = look(teacher, self.images, {pair.teacher_block: teacher_heads})
        student_maps, student_says = look(student, self.images, student_heads)
        columns = ["image", f"teacher, block {pair.teacher_block}", f"student, block {pair.student_block}"]
        readers = [who_reads(layout(model, self.images)) for model in (teacher, student)]
        caption = f"{when} · mean over the {'distilled' if distilled_pairs(module) else 'blocks’'} heads"
        return figure_1(
            self.pixels,
            teacher_maps[pair.teacher_block],
            student_maps[pair.student_block],
            None if other is None else student_maps[other],
            labels=self.labels,
            teacher_predictions=[self.class_names[label] for label in teacher_says],
            student_predictions=[self.class_names[label] for label in student_says],
            columns=columns if other is None else [*columns, f"block {other}, not distilled"],
            unit=attention_unit(readers),
            caption=caption if other is None else f"{caption}, in block {other} over all",
        )

    def _log(self, module: DistillModule, loggers: Sequence[Logger], picture: np.ndarray, step: int) -> None:
        pair, _ = shown_blocks(module)
        tag = f"attention/block{pair.student_block}_from_{pair.teacher_block}"
        log_picture(loggers, tag, picture, step)
        self._logged_step = step


def shown_blocks(module: DistillModule) -> tuple[BlockPair, int | None]:
    """The last distilled pair, and the last student block that is not distilled, if there is one.

    Where no map is distilled, the last blocks of both, and no other.
    """
    students, teachers, pairs = module.model.attention, module.teacher.attention, distilled_pairs(module)
    if not pairs:
        heads = tuple(range(students[-1].heads))
        every_head = (tuple(range(teachers[-1].heads)),) * len(heads)
        return BlockPair(len(students) - 1, len(teachers) - 1, heads, every_head), None
    distilled = {pair.student_block for pair in pairs}
    others = [block for block in range(len(students)) if block not in distilled]
    return pairs[-1], others[-1] if others else None


def distilled_pairs(module: DistillModule) -> Sequence[BlockPair]:
    """Which student maps learn from which teacher maps, as far as they are among patches, as pictures are."""
    pairs = () if module.objective is None else module.objective.pairs
    return [pair for pair in pairs if pair.part == OUTER]


@torch.no_grad()
def look(
    model: Model, images: Tensor, heads: Mapping[int, Sequence[int]]
) -> tuple[dict[int, Tensor], list[int]]:
    """Where the tokens look that a model classifies by, and its classes, by one forward pass.

    Args:
        model: stays on its device and in its mode.
        images: [B, C, H, W], normalised.
        heads: block → the heads whose attention is averaged.

    Returns:
        block → [B, h, w] on the CPU, and B labels.
    """
    weight = next(model.parameters())
    with evaluating(model):
        output = model(images.to(weight.device, weight.dtype), Taps(scores=tuple(heads)))
    maps = {
        block: map_of(model, block, scores, heads[block]).cpu() for block, scores in output.scores.items()
    }
    return maps, output.predicted.tolist()


def map_of(model: Model, block: int, scores: Tensor, heads: Sequence[int]) -> Tensor:
    """Where a block's `heads` look, by its scores [B, H, Q, K]: a map [B, h, w] over the image's patches."""
    layout = model.attention[block]
    mask = None if layout.mask is None else layout.mask.to(scores.device)
    if layout.window is None:
        return cls_attention(scores, layout.grid, heads, layout.prefix, mask, layout.readers)
    scores = at_least_float32(scores[:, [*heads]])
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    return received(weights.mean(1), [*map(windows_of, model.attention[: block + 1])])


def log_picture(loggers: Sequence[Logger], tag: str, picture: np.ndarray, step: int) -> None:
    """Show a picture [H, W, 3] uint8 in all loggers that take any."""
    for logger in loggers:
        if isinstance(logger, CurveLogger):
            logger.log_picture(tag, picture, step)


def rendered(figure: Figure) -> np.ndarray:
    """The figure's pixels, [H, W, 3] uint8."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
