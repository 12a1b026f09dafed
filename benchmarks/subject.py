"""What is measured: the report's teacher, student and batch, as `dataset=cifar100` configures them.

Shapes: B batch, C channels, H and W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import hydra
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Settings
from vitkd.config.run import CONF_DIR, Config, parse
from vitkd.data import Batch
from vitkd.methods.maps.granularity import Granularity
from vitkd.methods.maps.losses import AttentionLoss
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.models import Taps, ViT
from vitkd.optim import AdamW
from vitkd.train.callbacks import set_capturable
from vitkd.train.cuda_graph import GraphedStep

TINY = [
    *(
        f"{model}.{size}"
        for model in ("teacher", "student")
        for size in ("embed_dim=8", "head_dim=4", "mlp_dim=8")
    ),
    *("teacher.depth=4", "student.depth=2", "dataset.batch_size=4"),
]

TeacherScores = Callable[[Batch], Mapping[int, Tensor]]


def configure(settings: Settings, *overrides: str, dataset: str = "cifar100") -> Config:
    """The configuration of `python -m vitkd.train dataset=cifar100 …`; no images have to be there."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        tiny = TINY if settings.quick else []
        return parse(hydra.compose("train", [f"dataset={dataset}", *tiny, *overrides]))


def random_batch(config: Config, device: torch.device) -> Batch:
    """A batch of noise, normalised as images are, [B, C, H, W]."""
    data, size = config.dataset, config.dataset.batch_size
    images = torch.randn(size, data.channels, data.image_size, data.image_size, device=device)
    labels = torch.randint(config.student.num_classes, (size,), device=device)
    return Batch(images, labels, torch.arange(size, device=device))


def build_teacher(config: Config, device: torch.device) -> ViT:
    """The teacher as a student meets it: frozen and in eval mode. Its weights are random."""
    torch.manual_seed(0)
    return config.teacher.model.build().to(device).requires_grad_(False).eval()


def build_student(config: Config, device: torch.device) -> ViT:
    """The student, with the same random weights each time."""
    torch.manual_seed(1)
    return config.student.build().to(device)


def objective_of(
    student: ViT, teacher: ViT, granularity: Granularity, loss: AttentionLoss
) -> AttentionObjective:
    """What learns from what, and how it is compared."""
    return AttentionObjective(granularity.pairs(student.attention, teacher.attention), loss)


def distilled_loss(
    student: ViT, objective: AttentionObjective, teacher_scores: TeacherScores, batch: Batch, alpha: float
) -> Tensor:
    """alpha·L_class + (1 − alpha)·L_att of one batch."""
    output = student(batch.image, objective.student_taps)
    values = objective.compare(output.scores, teacher_scores(batch))
    attention = objective.transfer({"map_loss": values}).mean()
    return alpha * F.cross_entropy(output.logits, batch.label) + (1 - alpha) * attention


def training_step(
    parameters: Sequence[torch.nn.Parameter],
    optimizer: AdamW,
    loss: Callable[[], Tensor],
    graphed: bool = False,
) -> Callable[[], None]:
    """A step that computes `loss`, its gradients, and updates `parameters` by the fused AdamW.

    Graphed, the first `WARM_UP` + 1 calls are slow, the others replay.
    """
    built = optimizer.build(parameters)

    def step(_: object = None) -> None:
        built.zero_grad()
        loss().backward()
        built.step()

    if not graphed:
        return step
    device = parameters[0].device
    set_capturable(built, True, device)
    # The loss has its batch already, always at the same place.
    nothing = Batch(*[torch.zeros(1, device=device)] * 3)
    return partial(GraphedStep(step).take, nothing)


@torch.no_grad()
def recorded(teacher: ViT, blocks: Sequence[int], batch: Batch) -> Mapping[int, Tensor]:
    """The teacher's scores of `blocks`, at the least cost."""
    scores: Mapping[int, Tensor] = teacher(batch.image, Taps(scores=tuple(blocks), logits=False)).scores
    return scores
