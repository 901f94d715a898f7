"""Numbers as people read them; shared by sentences, tables and labels in charts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Decimals of R and of losses in nats per token: those `bitplan verify` prints.
RATIO_DIGITS = 2
NATS_DIGITS = 4


def number(value: float | None, digits: int = 3) -> str:
    """Spell a number in `digits` significant digits: 12345 as 12.3k, tiny ones as 1.20e-05."""
    if value is None:
        return "n/a"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.{digits - 1}e}"
    if size >= 10_000:
        return f"{value / 1000:.{_decimals(size / 1000, digits)}f}k"
    return f"{value:,.{_decimals(size, digits)}f}"


def _decimals(size: float, digits: int) -> int:
    return 0 if size == 0 else max(0, digits - 1 - math.floor(math.log10(size)))


def count(value: float | None) -> str:
    """Spell a large count: 3145728 as 3.15 million."""
    if value is None:
        return "n/a"
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """Spell a share in percent: 0.4312 as 43 %."""
    return f"{100 * share:.0f} %"


def interval(value: Mapping[str, Any], digits: int) -> str:
    """Spell an estimate with its interval: 2.14 (1.90 to 2.41)."""
    if value.get("estimate") is None:
        return "unknown"
    return f"{estimate(value, digits)} ({bounds(value, digits)})"


def estimate(value: Mapping[str, Any], digits: int) -> str:
    """Spell the estimate of an interval alone."""
    known = value.get("estimate")
    return "unknown" if known is None else f"{known:.{digits}f}"


def bounds(value: Mapping[str, Any], digits: int) -> str:
    """Spell the bounds of an interval alone: 1.90 to 2.41, or no bounds."""
    low, high = value.get("low"), value.get("high")
    if low is None or high is None:
        return "no bounds"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def span(values: Sequence[float]) -> str:
    """Spell the range of some values: 4.1 to 17.2, or the one value they all are."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"
