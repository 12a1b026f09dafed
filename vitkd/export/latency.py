"""How long models take on this machine, side by side.

Shapes: B images, C channels, H × W pixels.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from rich.table import Table
from torch import Tensor

from vitkd.cli.console import new_table
from vitkd.export.classifier import Classify
from vitkd.runs.provenance import device_name

BATCH_SIZES = (1, 64)
MOST_ROUNDS, FEWEST_ROUNDS = 30, 3
SECONDS = 5.0
"""after which no more than the fewest rounds are made"""


def comparison(models: Mapping[str, tuple[Classify, int]], size: Sequence[int]) -> tuple[Table, str]:
    """A table of sizes and latencies of models on the CPU, and how they were measured.

    Args:
        models: by name, what classifies and its bytes.
        size: an image's C, H and W.
    """
    classifiers = {name: classify for name, (classify, _) in models.items()}
    measured = [latencies(classifiers, torch.rand(batch, *size)) for batch in BATCH_SIZES]
    table = new_table("", "size", *(f"batch of {batch}" for batch in BATCH_SIZES))
    for name, (_, num_bytes) in models.items():
        milliseconds = (f"{medians[name] * 1e3:.2f} ms" for medians, _ in measured)
        table.add_row(name, f"{num_bytes / 1e6:.2f} MB", *milliseconds)
    rounds = " and ".join(str(count) for _, count in measured)
    machine = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} thread(s)"
    return table, f"medians of {rounds} rounds; {machine}, torch {torch.__version__}"


@torch.inference_mode()
def latencies(classifiers: Mapping[str, Classify], images: Tensor) -> tuple[dict[str, float], int]:
    """The median seconds that each takes for `images` [B, C, H, W], and of how many rounds.

    In a round they take turns, so that whatever else the machine does slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [seconds_of(each, images)] for name, each in classifiers.items()}
    rounds, end = 0, time.perf_counter() + SECONDS
    while rounds < FEWEST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        rounds += 1
        for name, classify in classifiers.items():
            seconds[name].append(seconds_of(classify, images))
    # The first call does what is done only once.
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}, rounds


def seconds_of(classify: Classify, images: Tensor) -> float:
    """What one call takes."""
    start = time.perf_counter()
    classify(images)
    return time.perf_counter() - start
