"""Batches a second: vitkd's resident pipeline against torchvision's transforms in a DataLoader.

Both start from the same 50,000 images of 3×32×32 uint8 in memory and end in batches of 64 on the device: cut
out after padding by 4, mirrored half the time, float32 and normalised. vitkd varies a batch at once, on the
device. torchvision's v2 transforms run sample by sample in a Dataset, as its documentation has it, on
tensors (PIL images took twice as long), in the training process (0 workers) or in 2 that stay alive between
epochs; its batches go to a GPU from pinned memory. A sample is an epoch over some of the images, shuffled
again.

The ratio is the other pipeline's time by vitkd's: how many times faster vitkd is. The last row says how much
of a training epoch is loading: an epoch of steps on the loader's batches beside as many on one batch. The
step is the student's alone, the shortest there is, on a GPU as a CUDA graph, which computes while the host
loads.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from torchvision.transforms import v2

from benchmarks import subject
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from vitkd.config.run import Config
from vitkd.data import Batch, Loader
from vitkd.data.loader import EpochOrder, Pixels
from vitkd.data.mix import Mixer
from vitkd.train.callbacks import set_capturable
from vitkd.train.cuda_graph import WARM_UP, GraphedStep

OURS, FED, UNFED = "vitkd, resident", "steps on the loader's batches", "steps on one batch"
BAR = Bar(8, at_least=True)
SHARE_BAR = Bar(5)

Epoch = Callable[[], None]


class PerSample(Dataset[tuple[Tensor, int]]):
    """Images varied one by one by torchvision.

    Args:
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        config: says how they are cropped, flipped and normalised.
        before, after: what else is done, before or after they are normalised.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        config: Config,
        before: Sequence[v2.Transform] = (),
        after: Sequence[v2.Transform] = (),
    ) -> None:
        data = config.dataset
        self.images, self.labels = images, labels
        self.transform = v2.Compose(
            [
                v2.RandomCrop(data.image_size, padding=data.augment.crop_padding),
                v2.RandomHorizontalFlip(),
                *before,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(data.mean, data.std),
                *after,
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def measure(settings: Settings) -> list[Row]:
    """Time epochs of every pipeline, and a step that would use a batch."""
    config = subject.configure(settings)
    assert config.dataset.augment.crop_padding
    assert config.dataset.augment.flip
    # On a GPU more, or the views of an epoch, computed at once, would be too few to be those of a run.
    count, batches = (64, 4) if settings.quick else (50_000, 40 if settings.on_cpu else 400)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(config.student.num_classes, (count,))
    chosen = torch.arange(batches * config.dataset.batch_size)
    loaders: dict[str, Epoch] = {OURS: ours(config, images, labels, chosen, settings.device)}
    dataset = PerSample(images, labels, config)
    for workers in (0,) if settings.quick else (0, 2):
        loader = theirs(dataset, chosen, config.dataset.batch_size, workers, settings.device)
        loaders[f"torchvision, {workers} workers"] = loader
    step = student_step(config, settings)
    fed = ours(config, images, labels, chosen, settings.device, step)
    steps = {
        FED: fed,
        UNFED: partial(repeat, batches, partial(step, subject.random_batch(config, settings.device))),
    }
    samples = interleave(loaders | steps, settings)
    return [*rates(samples, loaders, len(chosen)), share(samples[FED], samples[UNFED], settings)]


def ours(
    config: Config,
    images: Tensor,
    labels: Tensor,
    chosen: Tensor,
    device: torch.device,
    step: Callable[[Batch], object] | None = None,
    mixer: Mixer | None = None,
) -> Epoch:
    """An epoch of vitkd's loader over the images `chosen` [M], with a step on each batch."""
    data = config.dataset
    loader = Loader(
        Pixels(images.to(device)),
        labels.to(device),
        EpochOrder(chosen.to(device), data.batch_size, shuffle=True),
        mean=data.mean,
        std=data.std,
        augment=data.augment,
        mixer=mixer,
    )

    def epoch() -> None:
        loader.sampler.set_epoch(loader.sampler.epoch + 1)
        if step is None:
            use(loader, device)
        else:
            for batch in loader:
                step(batch)

    return epoch


def theirs(dataset: PerSample, chosen: Tensor, batch_size: int, workers: int, device: torch.device) -> Epoch:
    """An epoch of PyTorch's DataLoader over the images `chosen` [M]."""
    loader = DataLoader(
        dataset,
        batch_size,
        sampler=SubsetRandomSampler(chosen.tolist()),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    return partial(use, loader, device)


def use(loader: Iterable[Sequence[Tensor]], device: torch.device) -> None:
    """Take every batch, on the device."""
    for image, label, *_ in loader:
        image.to(device, non_blocking=True)
        label.to(device, non_blocking=True)


def repeat(times: int, step: Callable[[], None]) -> None:
    for _ in range(times):
        step()


def student_step(config: Config, settings: Settings) -> Callable[[Batch], object]:
    """A training step of the student on labels alone."""
    student = subject.build_student(config, settings.device)
    parameters = [*student.parameters()]
    optimizer = config.optimizer.build(parameters)
    set_capturable(optimizer, not settings.on_cpu, settings.device)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        F.cross_entropy(student(batch.image).logits, batch.label).backward()
        optimizer.step()

    if settings.on_cpu:
        return step
    graphed = GraphedStep(step)
    for _ in range(WARM_UP + 1):
        graphed.take(subject.random_batch(config, settings.device))
    return graphed.take


def rates(samples: dict[str, list[float]], names: Iterable[str], images: int) -> list[Row]:
    """Images a second of each pipeline, and how many times faster vitkd's is."""
    return [
        row(
            name,
            [1e3 * images / milliseconds for milliseconds in samples[name]],
            "images/s",
            ratio=divided(samples[name], samples[OURS]),
            bar=None if name == OURS else BAR,
        )
        for name in names
    ]


def share(fed: Sequence[float], unfed: Sequence[float], settings: Settings) -> Row:
    """How much of a training epoch is loading, in percent."""
    percent = [100 * (1 - b / a) for a, b in zip(fed, unfed, strict=True)]
    return row(
        "loading's share of the student's epoch", percent, "%", bar=None if settings.on_cpu else SHARE_BAR
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("data", __doc__, measure, argv, rounds=10)


if __name__ == "__main__":
    main()
