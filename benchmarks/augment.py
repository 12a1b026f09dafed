"""Images a second with each augmentation of `dataset.augment.then`: vitkd's beside torchvision's transforms.

As `benchmarks.data`, in the training process: both crop, flip and normalise 3×32×32 images of noise into
batches of 64 as well, and torchvision's transforms have the same settings. The ratio is torchvision's time by
vitkd's: how many times faster vitkd is.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torchvision.transforms import v2

from benchmarks import subject
from benchmarks.data import Epoch, PerSample, ours, theirs
from benchmarks.harness import Bar, Row, Settings, divided, interleave, row
from benchmarks.harness import main as run

BAR = Bar(5, at_least=True)


class Arm(NamedTuple):
    """An augmentation of both."""

    then: str
    before: tuple[v2.Transform, ...] = ()
    after: tuple[v2.Transform, ...] = ()
    settings: tuple[str, ...] = ()


NOISE = ("dataset.augment.random_erasing.value=random",)
AUTO = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
ARMS = {
    "crop and flip alone": Arm(""),
    "RandAugment": Arm("rand_augment", (v2.RandAugment(2, 9),)),
    "AutoAugment": Arm("auto_augment", (AUTO,)),
    "TrivialAugment": Arm("trivial_augment", (v2.TrivialAugmentWide(),)),
    "colour jitter": Arm("color_jitter", (v2.ColorJitter(0.4, 0.4, 0.4, 0.1),)),
    "random erasing": Arm("random_erasing", after=(v2.RandomErasing(0.25),)),
    "random erasing, noise": Arm("random_erasing", (), (v2.RandomErasing(0.25, value="random"),), NOISE),
    "AutoAugment, random erasing": Arm("auto_augment,random_erasing", (AUTO,), (v2.RandomErasing(0.25),)),
}


def measure(settings: Settings) -> list[Row]:
    """Time epochs of both pipelines with each augmentation."""
    batches = 4 if settings.quick else 16 if settings.on_cpu else 400
    samples = interleave(
        {
            f"{name}: {whose}": epoch
            for name, arm in ARMS.items()
            for whose, epoch in epochs(arm, batches, settings).items()
        },
        settings,
    )
    images = batches * subject.configure(settings).dataset.batch_size
    return [each for name in ARMS for each in rows(name, samples, images)]


def epochs(arm: Arm, batches: int, settings: Settings) -> dict[str, Epoch]:
    """An epoch of vitkd's loader, and one of torchvision's transforms in a DataLoader."""
    config = subject.configure(settings, f"dataset.augment.then=[{arm.then}]", *arm.settings)
    size = config.dataset.batch_size
    images = torch.randint(256, (batches * size, 3, 32, 32), dtype=torch.uint8)
    labels, every = torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))
    dataset = PerSample(images, labels, config, arm.before, arm.after)
    return {
        "vitkd": ours(config, images, labels, every, settings.device),
        "torchvision": theirs(dataset, every, size, 0, settings.device),
    }


def rows(name: str, samples: dict[str, list[float]], images: int) -> Iterator[Row]:
    """Images a second of both, and how many times faster vitkd is."""
    fast, slow = (samples[f"{name}: {whose}"] for whose in ("vitkd", "torchvision"))
    for whose, times, bar in (("vitkd", fast, None), ("torchvision", slow, BAR)):
        rates = [1e3 * images / milliseconds for milliseconds in times]
        yield row(f"{name}: {whose}", rates, "images/s", ratio=divided(times, fast), bar=bar)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run("augment", __doc__, measure, argv, rounds=10)


if __name__ == "__main__":
    main()
