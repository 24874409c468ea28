"""Numbers as people read them: rounded, with a unit."""

import math

_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def significant(value: float, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits and no exponent: 12345 -> 12,300."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def count(value: float) -> str:
    """Return a count such as parameters or tokens: 1228800 -> 1.23 M, 39.2e9 -> 39.2 B."""
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{significant(value / size)} {name}"
    return f"{value:,.0f}"


def flops(value: float) -> str:
    """Return an amount of work: 3.1e13 -> 31.0 TFLOP."""
    for size, prefix in _LARGE:
        if abs(value) >= size:
            return f"{significant(value / size)} {prefix}FLOP"
    return f"{value:,.0f} FLOP"


def size_in_bytes(value: float) -> str:
    """Return a size: 131072 -> 128 KiB."""
    for size, name in _BINARY:
        if abs(value) >= size:
            return f"{significant(value / size)} {name}"
    return f"{value:,.0f} B"


def scale_of(value: float) -> tuple[float, str]:
    """Return divisor and SI prefix for an axis that goes up to ``value``."""
    return next(((size, prefix) for size, prefix in _LARGE if value >= size), (1.0, ""))
