"""Numbers as text."""

from vitkd.report.statistics import LEVEL, Interval, Summary

MINUS, DASH = "−", "–"


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, length: int = 34) -> str:
    """Text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def signed(value: float) -> str:
    """`+0.17` or `−0.67`; `0.00` without a sign."""
    text = f"{value:+.2f}".replace("-", MINUS)
    return "0.00" if text[1:] == "0.00" else text


def mean_std(summary: Summary) -> str:
    """`95.43 ± 1.41`; only the mean of one value, a dash for none."""
    if summary.mean is None:
        return DASH
    return f"{summary.mean:.2f}" if summary.std is None else f"{summary.mean:.2f} ± {summary.std:.2f}"


def mean_interval(summary: Summary) -> str:
    """`+1.20 [0.81, 1.59]`; only the mean without an interval, a dash for none."""
    if summary.mean is None:
        return DASH
    ends = f" {interval(summary.interval)}" if summary.interval else ""
    return f"{signed(summary.mean)}{ends}"


def interval(ends: Interval | None) -> str:
    """`[94.10, 96.02]`, or a dash."""
    return DASH if ends is None else f"[{ends.low:.2f}, {ends.high:.2f}]".replace("-", MINUS)


def p_text(p: float | None) -> str:
    """A p-value in three decimals, or as many as it takes to show on which side of the level it is."""
    if p is None:
        return DASH
    if p < 0.001:
        return "<0.001"
    for decimals in range(3, 7):
        text = f"{p:.{decimals}f}"
        if (float(text) <= LEVEL) == (p <= LEVEL) and float(text) != LEVEL:
            break
    return text


def duration(seconds: float | None) -> str:
    """`7.3 s`, `4 min`, `3.1 h`, or a dash."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
