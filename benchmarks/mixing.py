"""Batches a second with mixup and CutMix: vitkd's loader against its own without, and against timm's Mixup.

All start from the images of `benchmarks.data`, and vary them as it does: batches of 64, cut out after
padding, mirrored, normalised. vitkd mixes them by mixup (alpha 0.8) or CutMix (1.0), one for each batch, on
the device; timm's `Mixup` by the same settings, on the batches of vitkd's loader or as collate function of
a DataLoader over torchvision's transforms, in the training process.

The ratio is the arm's time by that of vitkd's mixed batches: how many times faster vitkd is.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler, default_collate

from benchmarks import subject
from benchmarks.data import Epoch, PerSample, ours, use
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run
from vitkd.config.run import Config
from vitkd.data import Mix
from vitkd.data.mix import Mixer

MIX = Mix(mixup_alpha=0.8, cutmix_alpha=1.0)
MIXED, PLAIN = "vitkd, mixed", "vitkd, not mixed"
AFTER, COLLATED = "vitkd's batches, mixed by timm", "torchvision's images, mixed by timm"
BARS = {COLLATED: Bar(5, at_least=True)}


def measure(settings: Settings) -> list[Row]:
    """Time epochs of every arm."""
    config = subject.configure(settings)
    count, batches = (64, 4) if settings.quick else (50_000, 40 if settings.on_cpu else 400)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(config.student.num_classes, (count,))
    chosen = torch.arange(batches * config.dataset.batch_size) % count
    mixer = Mixer(MIX, config.dataset.image_size, config.student.num_classes)
    mixup, of_vitkd = timms(config), partial(ours, config, images, labels, chosen, settings.device)
    dataset = PerSample(images, labels, config)
    epochs: dict[str, Epoch] = {
        MIXED: of_vitkd(mixer=mixer),
        PLAIN: of_vitkd(),
        AFTER: of_vitkd(step=lambda batch: mixup(batch.image, batch.label)),
        COLLATED: partial(use, collated(dataset, chosen, config), settings.device),
    }
    samples = interleave(epochs, settings)
    return [
        row(
            name,
            [1e3 * len(chosen) / milliseconds for milliseconds in samples[name]],
            "images/s",
            ratio=divided(samples[name], samples[MIXED]),
            bar=BARS.get(name),
        )
        for name in epochs
    ]


def timms(config: Config) -> Mixup:
    """timm's mixing by the same settings."""
    classes = config.student.num_classes
    return Mixup(MIX.mixup_alpha, MIX.cutmix_alpha, label_smoothing=0.0, num_classes=classes)


def collated(dataset: PerSample, chosen: Tensor, config: Config) -> Iterable[Sequence[Tensor]]:
    """Batches of the images `chosen` [M], mixed when they are put together."""
    mixup = timms(config)
    return DataLoader(
        dataset,
        config.dataset.batch_size,
        sampler=SubsetRandomSampler(chosen.tolist()),
        collate_fn=lambda samples: mixup(*default_collate(samples)),
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("mixing", __doc__, measure, argv, rounds=10)


if __name__ == "__main__":
    main()
