"""Which runs may train as one stack: those that differ in what a stack keeps apart."""

import json
from collections.abc import Mapping
from typing import Any

from vitkd.config.roles import Separates, relevant


def shared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a stack have in common, by `group.key`, of their resolved `config`."""
    return relevant(config, Separates.STACKS)


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
