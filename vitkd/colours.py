"""Colours of the pages: which text can be read on one."""

from collections.abc import Iterable


def readable_on(colour: Iterable[float]) -> str:
    """Black or white, whichever has more contrast to RGB in 0..1 (relative luminance, WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in [*colour][:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "white"
