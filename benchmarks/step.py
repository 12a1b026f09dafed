"""What distillation adds to a training step.

Every arm is a whole step on one and the same batch of 64 images: teacher forward, student forward, losses,
backward, fused AdamW, with the dropout of the configuration. The ratio is to the floor: the whole teacher
and a student that learns from labels alone, no map recorded or compared.

Rows `head`, `block`, `encoder` learn from the default maps (the last blocks, or all of them). `truncated`
learns from the middle of the teacher, above which nothing is run; `cached` looks the teacher's scores up
by image number, as runs do where images are not varied. `student alone` has no teacher at all. What is
marked `no dropout` is set beside a floor without it: on a CPU, dropout is a good part of the student's step.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import subject
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from vitkd.config.run import Config
from vitkd.data import Batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.methods.maps.losses import CE, KL, MSE, AttentionLoss
from vitkd.models import Taps, ViT
from vitkd.train.cuda_graph import WARM_UP
from vitkd.train.teacher_cache import TeacherCache

GRANULARITIES: dict[str, Granularity] = {"head": Head(), "block": Block(), "encoder": Encoder()}
LOSSES: dict[str, AttentionLoss] = {"mse": MSE(), "ce": CE(), "kl": KL()}
FLOOR = "floor: whole teacher, no maps"
DRY = ", no dropout"
BARS = {
    "head": Bar(1.05),
    "block": Bar(1.05),
    "encoder": Bar(1.10),
    "truncated": Bar(0.70),
    "cached": Bar(0.50),
}
BATCHES_IN_CACHE = 64

Step = Callable[[], None]


def measure(settings: Settings) -> list[Row]:
    """Time every arm against the floor of its dropout."""
    config = subject.configure(settings)
    dry = subject.configure(settings, *(f"student.{name}=0" for name in ("dropout", "emb_dropout")))
    teacher = subject.build_teacher(config, settings.device)
    batch = subject.random_batch(config, settings.device)
    steps = arms(config, teacher, batch)
    steps |= {f"{name}{DRY}": step for name, step in ends(dry, teacher, batch).items()}
    # A GPU's steps are graphs by then.
    samples = interleave(
        steps, settings, repeat=1 if settings.on_cpu else 10, warmup=3 if settings.on_cpu else WARM_UP + 2
    )
    return [
        row(
            name,
            times,
            ratio=divided(times, samples[FLOOR + DRY if name.endswith(DRY) else FLOOR]),
            bar=BARS.get(name.split()[0]) if settings.on_cpu and not name.endswith(DRY) else None,
        )
        for name, times in samples.items()
    ]


def arms(config: Config, teacher: ViT, batch: Batch) -> dict[str, Step]:
    """Every kind of step, each with a student of its own."""
    steps = ends(config, teacher, batch)
    for name, granularity in GRANULARITIES.items():
        for loss_name, loss in LOSSES.items():
            steps[f"{name} {loss_name}"] = distilled(config, teacher, batch, granularity, loss)
    return steps


def ends(config: Config, teacher: ViT, batch: Batch) -> dict[str, Step]:
    """The floor, and the steps that run less of the teacher or none."""
    middle = Block(teacher_blocks=[len(teacher.blocks) // 2 - 1])
    return {
        FLOOR: alone(config, teacher, batch),
        "student alone": alone(config, None, batch),
        "truncated at half of the teacher": distilled(config, teacher, batch, middle, KL()),
        "cached teacher scores": cached(config, teacher, batch),
    }


def alone(config: Config, teacher: ViT | None, batch: Batch) -> Step:
    """A step on labels alone; a teacher, if any, is run for nothing."""
    student = subject.build_student(config, batch.image.device)

    def loss() -> Tensor:
        if teacher is not None:
            with torch.no_grad():
                teacher(batch.image)
        return F.cross_entropy(student(batch.image).logits, batch.label)

    return subject.training_step([*student.parameters()], config.optimizer, loss, batch.image.is_cuda)


def distilled(
    config: Config, teacher: ViT, batch: Batch, granularity: Granularity, loss: AttentionLoss
) -> Step:
    """A step on labels and attention."""
    student = subject.build_student(config, batch.image.device)
    objective = subject.objective_of(student, teacher, granularity, loss)
    scores = partial(subject.recorded, teacher, objective.teacher_taps.scores)
    total = partial(subject.distilled_loss, student, objective, scores, batch, config.alpha)
    return subject.training_step([*student.parameters()], config.optimizer, total, batch.image.is_cuda)


def cached(config: Config, teacher: ViT, batch: Batch) -> Step:
    """As block kl, the teacher's scores looked up."""
    student = subject.build_student(config, batch.image.device)
    objective = subject.objective_of(student, teacher, Block(), KL())
    cache = filled_cache(teacher, objective.teacher_taps, batch)
    scores = lambda each: cache.answer(each.index).scores  # noqa: E731
    total = partial(subject.distilled_loss, student, objective, scores, batch, config.alpha)
    return subject.training_step([*student.parameters()], config.optimizer, total, batch.image.is_cuda)


def filled_cache(teacher: ViT, taps: Taps, batch: Batch) -> TeacherCache:
    """What the teacher says of a data set that is the batch, again and again."""
    size = len(batch.label)
    batches = [batch._replace(index=batch.index + n * size) for n in range(BATCHES_IN_CACHE)]
    images = torch.cat([each.index for each in batches])
    return TeacherCache(lambda image: teacher(image, taps), batches, images, size=len(images))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("step", __doc__, measure, argv, rounds=40)


if __name__ == "__main__":
    main()
