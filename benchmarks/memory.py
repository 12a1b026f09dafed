"""What memory a training step takes, and what streaming the attention maps saves and costs.

Peak bytes of one step (teacher scores, student forward, losses, backward) beyond what was in use before it,
which is the weights and the images. Student and teacher have the report's widths; the tokens come from
larger images in patches of 8×8, so their number is a square and the class token. Each row names its batch:
64 on CUDA, fewer on the CPU where more tokens take longer. `streamed` is forced, also below the limit from
which on training streams.

CUDA's allocator tells its peak. The CPU's does not, so there every operator's outputs are watched as they
come and go (`LiveBytes`). That counts what is asked for, without the allocator's rounding, and misses only
what a kernel takes and gives back within one call; for whole steps torch.profiler's record of the allocator
has the same peak.

The blocks' dropout is off on the CPU: PyTorch's fused attention has none there, and would make the T×T
weights that it is to avoid. On CUDA it is the configuration's.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import subject
from benchmarks.harness import Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from vitkd.data import Batch
from vitkd.methods.maps.granularity import Block, Encoder, Granularity, Head
from vitkd.methods.maps.losses import KL, MSE, AttentionLoss
from vitkd.methods.maps.objective import AttentionObjective
from vitkd.methods.maps.streaming import STREAM_ABOVE
from vitkd.models import ViT, ViTConfig

GRANULARITIES: dict[str, Granularity] = {"head": Head(), "block": Block(), "encoder": Encoder()}
LOSSES: dict[str, AttentionLoss] = {"mse": MSE(), "kl": KL()}
PATCH = 8
BATCHES_ON_CPU = {4: 64, 8: 64, 14: 16, 28: 4}
"""grid → images a batch that a CPU step of some seconds takes"""
BATCH_ON_CUDA = 64
MIB = 2**20

Step = Callable[[], None]


@dataclass(frozen=True)
class Scene:
    """A student, its teacher and a batch of images of one size."""

    student: ViT
    teacher: ViT
    batch: Batch

    def step(self, granularity: Granularity, loss: AttentionLoss, streams: bool) -> Step:
        """A training step without its optimiser; it streams if `streams`, whatever the number of tokens."""
        pairs = granularity.pairs(self.student.attention, self.teacher.attention)
        objective = AttentionObjective(pairs, loss, tokens=STREAM_ABOVE + 1 if streams else 0)
        return partial(training_step, self, objective)


def training_step(scene: Scene, objective: AttentionObjective) -> None:
    """What a step of `DistillModule` computes."""
    batch = scene.batch
    with torch.no_grad():
        teacher = scene.teacher(batch.image, objective.teacher_taps)
    student = scene.student(batch.image, objective.student_taps)
    class_loss = F.cross_entropy(student.logits, batch.label)
    transfer_loss = objective.transfer(objective(batch, student, teacher)).mean()
    (class_loss + transfer_loss).backward()
    scene.student.zero_grad()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, until each is freed.

    Those that exist already when an operator first meets them are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(storages((args, kwargs)))
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    def _free(self, size: int) -> None:
        self.now -= size


def storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in nested containers."""
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that tensors made by `step` hold at a time."""
    if device.type == "cpu":
        with LiveBytes() as live:
            step()
        return live.peak
    step()  # the first call also takes cuBLAS's workspace
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def measure(settings: Settings) -> list[Row]:
    """Memory and time of every case, materialised and streamed."""
    grids = [2, 3] if settings.quick else list(BATCHES_ON_CPU)
    rows = []
    for grid in grids:
        scene = build_scene(settings, grid)
        for granularity in GRANULARITIES:
            for loss in LOSSES:
                name = f"N={grid**2 + 1} B={len(scene.batch.label)} {granularity} {loss}"
                rows += compare(name, scene, GRANULARITIES[granularity], LOSSES[loss], settings)
    return rows


def compare(
    name: str, scene: Scene, granularity: Granularity, loss: AttentionLoss, settings: Settings
) -> list[Row]:
    """Both arms' memory, and the streamed one's time; ratios are to the materialised one."""
    arms = {
        arm: scene.step(granularity, loss, streams)
        for arm, streams in {"materialised": False, "streamed": True}.items()
    }
    mib = {arm: [peak_bytes(step, settings.device) / MIB] for arm, step in arms.items()}
    times = interleave(arms, settings, warmup=1)
    return [
        row(f"{name} materialised", mib["materialised"], "MiB"),
        row(f"{name} streamed", mib["streamed"], "MiB", divided(mib["streamed"], mib["materialised"])),
        row(
            f"{name} streamed: time",
            times["streamed"],
            "ms",
            divided(times["streamed"], times["materialised"]),
        ),
    ]


def build_scene(settings: Settings, grid: int) -> Scene:
    """Models for images of grid × grid patches, and a batch of those."""
    config = subject.configure(settings)
    teacher, student = (
        resized(shape, grid, settings).build().to(settings.device)
        for shape in (config.teacher.model, config.student)
    )
    size = 4 if settings.quick else BATCHES_ON_CPU[grid] if settings.on_cpu else BATCH_ON_CUDA
    images = torch.randn(size, student.config.channels, PATCH * grid, PATCH * grid, device=settings.device)
    labels = torch.zeros(size, dtype=torch.int64, device=settings.device)
    return Scene(student.train(), teacher.requires_grad_(False).eval(), Batch(images, labels, labels))


def resized(shape: ViTConfig, grid: int, settings: Settings) -> ViTConfig:
    """The same model for images of grid × grid patches."""
    dropout = 0.0 if settings.on_cpu else shape.dropout
    return replace(shape, image_size=PATCH * grid, patch_size=PATCH, dropout=dropout)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("memory", __doc__, measure, argv, rounds=5)


if __name__ == "__main__":
    main()
