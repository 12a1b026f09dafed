"""First weights out of a larger model's (weight selection: Xu et al. 2024, arXiv 2311.18823).

Of the larger model's blocks the first ones are taken, or evenly spaced ones; of each of their tensors evenly
spaced entries along every axis, the same everywhere, so that what belongs together stays so. The head is new.
As in the authors' code heads are not looked at: the rows of queries, of keys and of values are evenly spaced
over all heads. So a student with half as many heads of the same size takes every second dimension of two
neighbouring heads for one of its own, and one with as many heads of half the size half of each.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from vitkd.errors import ConfigError
from vitkd.models.base import Model, ModelConfig

LAYERS = ("first", "uniform")
FUSED = {"qkv": 3, "qk": 2}
"""layers that make several things at once, by name"""
BLOCK = re.compile(r"(.*\bblocks)\.(\d+)\.")


@torch.no_grad()
def select_weights(student: Model, source: Model, layers: str) -> None:
    """Let `student` begin with weights of `source`; raises ConfigError as `sources_of` does."""
    theirs = dict(source.named_parameters())
    for name, origin in sources_of(student, source, layers).items():
        parameter = student.get_parameter(name)
        layer = name.rpartition(".")[0].rpartition(".")[2]
        parameter.copy_(selected(theirs[origin], parameter.shape, FUSED.get(layer, 1)))


def selected(weights: Tensor, shape: Sequence[int], parts: int = 1) -> Tensor:
    """Evenly spaced entries of `weights` along every axis; along the first of each of so many equal parts."""
    for axis, size in enumerate(shape):
        pieces = weights.chunk(parts if axis == 0 else 1, dim=axis)
        indices = torch.tensor(evenly_spaced(pieces[0].shape[axis], size // len(pieces)))
        weights = torch.cat([piece.index_select(axis, indices) for piece in pieces], dim=axis)
    return weights


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """So many of the numbers below `count`, beginning with 0."""
    return [place * count // wanted for place in range(wanted)]


def sources_of(student: Model, source: Model, layers: str) -> dict[str, str]:
    """By the name of a student's parameter outside its head that of the one in `source` to select from.

    Raises ConfigError if a parameter has no counterpart, or one that is smaller.
    """
    check_alike(student.config, source.config)
    theirs, above = {n: p.shape for n, p in source.named_parameters()}, student.layers_above()
    own = {name: p.shape for name, p in student.named_parameters() if above[name]}
    depths = block_counts(own), block_counts(theirs)
    origins = {}
    for name, shape in own.items():
        origin = origins[name] = counterpart(name, *depths, layers)
        found = theirs.get(origin, ())
        fits = len(found) == len(shape) and all(a >= b for a, b in zip(found, shape, strict=True))
        # Pixels of a patch are no entries to choose among.
        if not fits or (found[2:] != shape[2:] and len(shape) == 4):
            has = f"has {origin} {list(found)}" if found else f"has no {origin}"
            raise ConfigError(
                f"init=weight_selection: {source.config} {has}, where {list(shape)} are to be selected; "
                "choose a larger model of the same architecture, or init=null"
            )
    return origins


def check_alike(student: ModelConfig, source: ModelConfig) -> None:
    """ConfigError unless both are of one architecture, and of the same tokens."""
    if type(student) is not type(source):
        problem = f"{source} is of another architecture than {student}"
    else:
        layouts = [config.attention_layouts()[:1] for config in (student, source)]
        tokens = [(each.grid, each.prefix) for layout in layouts for each in layout]
        if len({*tokens}) < 2:
            return
        problem = f"{source} has other patches or tokens than {student}"
    raise ConfigError(f"init=weight_selection: {problem}; choose models that agree, or init=null")


def block_counts(names: dict[str, torch.Size]) -> dict[str, int]:
    """How many blocks each list of blocks has, by its name."""
    found = [match.groups() for name in names if (match := BLOCK.match(name))]
    return {blocks: 1 + max(int(n) for owner, n in found if owner == blocks) for blocks, _ in found}


def counterpart(name: str, own: dict[str, int], theirs: dict[str, int], layers: str) -> str:
    """The parameter of the larger model that `name` selects from, by how many blocks each list has."""
    match = BLOCK.match(name)
    if not match or layers == "first" or theirs.get(match[1], 0) < own[match[1]]:
        return name
    block = evenly_spaced(theirs[match[1]], own[match[1]])[int(match[2])]
    return f"{match[1]}.{block}.{name[match.end() :]}"
