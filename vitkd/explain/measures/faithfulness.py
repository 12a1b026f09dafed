"""Does a map show what the model uses? Remove what it calls relevant, and follow the class's probability.

Shapes: B images, C channels, h × w cells of a map (patches, as a rule), n points of a curve, K classes.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vitkd.errors import ConfigError, suggest
from vitkd.explain.maps.flow import check_classes
from vitkd.explain.maps.recording import logits_of
from vitkd.models.output import at_least_float32

Order = Literal["positive", "negative"]
ORDERS: tuple[Order, ...] = ("positive", "negative")

RANDOM = "random"
"""the name of random order, to which every method is compared"""


class Curve(NamedTuple):
    """The probability of a class while more and more of an image is removed."""

    fractions: Tensor
    """[n] shares of the image removed, from 0 to 1"""
    probability: Tensor
    """[B, n] of the class"""
    correct: Tensor
    """[B, n] bool: whether the model still predicts the class"""
    auc: Tensor
    """[B] area under `probability` over `fractions`, in 0..1"""


class MapsOfClasses(NamedTuple):
    """A method's maps [B, h, w] of either class, where they differ."""

    predicted: Tensor
    target: Tensor


class Faithfulness(NamedTuple):
    """How faithful one method's order of removal is, as means over images."""

    auc: float
    """area under the class's probability: faithful is low in positive order, high in negative order"""
    gap: float
    """by how much it is better than random order, so above 0 is faithful in either order"""
    gap_error: float | None
    """the gap's standard error over images; None for one image"""
    fractions: list[float]
    """[n] shares of the image removed"""
    probability: list[float]
    """[n] mean probability of the class"""
    accuracy: list[float]
    """[n] share of images for which the model predicts the class"""


@torch.no_grad()
def perturbation_curves(
    model: nn.Module,
    pixels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    maps: Tensor,
    *targets: Tensor,
    order: Order,
    steps: int = 10,
    batch_size: int = 256,
) -> list[Curve]:
    """Remove what `maps` call most relevant first ("positive") or least ("negative") (Chefer et al. 2021).

    What is removed becomes black before normalisation. Equal values go in a random order, the same for all.

    Args:
        pixels: [B, C, H, W] in 0..1.
        normalise: makes of pixels what the model takes.
        maps: [B, h, w], each cell standing for its part of the image.
        targets: [B] classes whose probability is followed, one curve each.
        steps: points after the first, at most one a cell.
        batch_size: images in one forward pass.

    Raises:
        ConfigError: no such order or class, or no step.
    """
    if order not in ORDERS:
        raise ConfigError(f"order={order}: {suggest(order, ORDERS)}")
    if steps < 1:
        raise ConfigError(f"steps={steps}: must be at least 1")
    assert len(maps) == len(pixels), f"{len(maps)} maps for {len(pixels)} images"
    ranks = _ranks(maps.to(pixels.device), order)
    cells = maps[0].numel()
    counts = sorted({round(step / steps * cells) for step in range(steps + 1)})
    of_parts = []
    for images, their_ranks in zip(pixels.split(batch_size), ranks.split(batch_size), strict=True):
        kept = (_without(images, their_ranks, count) for count in counts)
        of_parts.append(torch.stack([logits_of(model, normalise(each)) for each in kept], 1))
    logits = at_least_float32(torch.cat(of_parts))
    fractions = torch.tensor(counts, dtype=logits.dtype, device=logits.device) / cells
    return [_follow(fractions, logits, target.to(logits.device)) for target in targets]


@torch.no_grad()
def faithfulness(
    model: nn.Module,
    pixels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    maps_by_method: Mapping[str, Tensor | MapsOfClasses],
    predicted: Tensor,
    labels: Tensor,
    *,
    steps: int = 10,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, dict[str, dict[str, Faithfulness]]]:
    """Every method's curves, beside those of a random order: [method][order]["predicted" or "target"].

    Args:
        pixels, normalise, steps, batch_size: as for `perturbation_curves`.
        maps_by_method: maps [B, h, w], or those of either class; "random" is drawn here if it is not given.
        predicted: [B] the classes that the model predicts.
        labels: [B] the true classes.
        seed: of the random order.
    """
    if RANDOM not in maps_by_method:
        first = next(iter(maps_by_method.values()))
        shape = (first if isinstance(first, Tensor) else first.target).shape
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        maps_by_method = {**maps_by_method, RANDOM: drawn}
    follow = partial(perturbation_curves, model, pixels, normalise, steps=steps, batch_size=batch_size)

    def curves(maps: Tensor | MapsOfClasses, order: Order) -> dict[str, Curve]:
        """Of both classes; where one map serves both, one series of forward passes does too."""
        if isinstance(maps, Tensor):
            both = follow(maps, predicted, labels, order=order)
        else:
            both = follow(maps.predicted, predicted, order=order) + follow(maps.target, labels, order=order)
        return dict(zip(("predicted", "target"), both, strict=True))

    random = {order: curves(maps_by_method[RANDOM], order) for order in ORDERS}
    found: dict[str, dict[str, dict[str, Faithfulness]]] = {}
    for method, maps in maps_by_method.items():
        found[method] = {}
        for order, at_random in random.items():
            of_method = at_random if method == RANDOM else curves(maps, order)
            summaries = {of: _summary(each, at_random[of], order) for of, each in of_method.items()}
            found[method][order] = summaries
    return found


def _ranks(maps: Tensor, order: Order) -> Tensor:
    """The place [B, h, w] of each cell of `maps` in the order of removal, 0 first."""
    values = maps.flatten(1)
    # A map that is zero in many places (a ReLU's) would else lose them from the upper left corner on.
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0)).to(maps.device)
    by_value = values[:, shuffled].argsort(dim=1, descending=order == "positive", stable=True)
    return shuffled[by_value].argsort(dim=1).view_as(maps)


def _without(images: Tensor, ranks: Tensor, count: int) -> Tensor:
    """Images [B, C, H, W] with the `count` cells of lowest rank black."""
    removed = (ranks < count)[:, None].to(images.dtype)
    return images * (1 - interpolate(removed, size=images.shape[-2:], mode="nearest"))


def _follow(fractions: Tensor, logits: Tensor, target: Tensor) -> Curve:
    """The classes `target` [B] along the logits [B, n, K]."""
    check_classes(target, logits.shape[-1])
    index = target[:, None, None].expand(-1, len(fractions), 1)
    probability = logits.softmax(-1).gather(-1, index).squeeze(-1)
    correct = logits.argmax(-1) == target[:, None]
    return Curve(fractions, probability, correct, torch.trapezoid(probability, fractions))


def _summary(curve: Curve, random: Curve, order: Order) -> Faithfulness:
    better = random.auc - curve.auc if order == "positive" else curve.auc - random.auc
    return Faithfulness(
        auc=curve.auc.mean().item(),
        gap=better.mean().item(),
        gap_error=better.std().item() / len(better) ** 0.5 if len(better) > 1 else None,
        fractions=curve.fractions.tolist(),
        probability=curve.probability.mean(0).tolist(),
        accuracy=curve.correct.to(curve.auc.dtype).mean(0).tolist(),
    )
