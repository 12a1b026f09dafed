"""The runs of `debug=…`, by which one looks for mistakes."""

from typing import Any

OPTIONS = ("fast", "overfit", "profile")


def leave_out_randomness(plain: dict[str, Any]) -> None:
    """Set augmentation, mixing and dropout of plain settings to none, whatever models there are."""
    for name in ("augment", "mix", "passes", "repeats"):
        plain["dataset"].pop(name, None)
    methods = plain["method"], plain["method"].get("attention", {})
    for settings in (plain["student"], plain["teacher"], *methods):
        drops = {k: v for k, v in settings.items() if "drop" in k and isinstance(v, int | float)}
        settings |= {key: type(value)(0) for key, value in drops.items()}
