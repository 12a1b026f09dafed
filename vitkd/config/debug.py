"""The runs of `debug=…`, by which one looks for mistakes."""

from typing import Any

OPTIONS = ("fast", "overfit", "profile")


def leave_out_randomness(plain: dict[str, Any]) -> None:
    """Set augmentation and dropout of plain settings to none, whatever models there are."""
    plain["dataset"].pop("augment", None)
    for model in (plain["student"], plain["teacher"]):
        model |= {key: 0.0 for key, value in model.items() if "drop" in key and type(value) in (int, float)}
