"""Which runs may train as one stack: those that differ in what a stack keeps apart."""

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# What each student of a stack has of its own, by where it stands in a run's resolved configuration.
OWN = (
    *(("alpha",), ("seed",), ("label_smoothing",), ("method",), ("weighting",), ("granularity",), ("loss",)),
    ("schedule",),
    *(("optimizer", "lr"), ("optimizer", "weight_decay")),
)
# What a stack takes from its first student. Not `paths`: the images lie there.
NO_MATTER = ("name", "resume", "sweep", "checkpoint_minutes", "pictures_every_n_epochs")


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a stack have in common: the resolved `config` without what each has of its own."""
    shared = {key: deepcopy(value) for key, value in config.items() if key not in NO_MATTER}
    for path in OWN:
        *groups, last = path
        node = shared
        for group in groups:
            node = node.get(group, {})
        node.pop(last, None)
    return shared


def in_stack_order(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sorts runs: those of equal method, granularity, weighting and loss are neighbours, alpha = 1 last."""
    return (
        config["alpha"] == 1,
        json.dumps(config["method"], sort_keys=True),
        json.dumps(config["granularity"], sort_keys=True),
        json.dumps(config["weighting"], sort_keys=True),
        # Not before: losses that differ in their temperature alone are compared in one go.
        json.dumps(config["loss"], sort_keys=True),
        config["seed"],
    )


def portions(count: int, most: int) -> list[range]:
    """`count` students cut into the fewest stacks of at most `most`, of sizes that differ by one at most."""
    stacks = -(-count // most)
    bounds = [stack * count // stacks for stack in range(stacks + 1)]
    return [range(bounds[i], bounds[i + 1]) for i in range(stacks)]
