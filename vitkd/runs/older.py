"""Runs that are older than some of today's settings: what they trained with all the same.

Nothing here imports PyTorch, for `report` reads it too.
"""

from collections.abc import Mapping
from typing import Any

VIT = "vitkd.models.ViTConfig"
LATER: dict[str, Any] = {
    **{"student.tokenizer": "patch", "student.attention": "msa", "student.distillation_token": False},
    **{"teacher.tokenizer": "patch", "teacher.attention": "msa", "teacher.distillation_token": False},
    "teacher.trained": True,
}
"""Settings of ViTs that some runs lack, and what these trained with; null by default need not be named."""


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with the settings that it is too old to have."""
    filled = dict(config)
    for name, value in LATER.items():
        group, _, key = name.partition(".")
        node = filled.get(group)
        if isinstance(node, Mapping) and node.get("_target_") == VIT:
            filled[group] = {key: value, **node}
    return filled
