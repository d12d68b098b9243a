"""Figures as a reader wants them: three significant digits and a unit, and a dash for what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TypeGuard

MISSING = "–"

# A unit or a prefix, its size, and from which value on it is taken; 0.412 ms reads better than 412 µs.
_TIMES = (("s", 1.0, 1.0), ("ms", 1e-3, 1e-4), ("µs", 1e-6, 0.0))
_PREFIXES = (*((name, x, x) for name, x in zip("PTGMk", (1e15, 1e12, 1e9, 1e6, 1e3), strict=True)),
             ("", 1.0, 0.0))  # fmt: skip


def known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def number(value: float | None, form: str = "#.3g") -> str:
    """Three significant digits, without an exponent where that is short: 0.0812, 12.0, 1050."""
    if not known(value):
        return MISSING
    rounded = float(f"{value:.2e}")
    if not rounded or 1e3 <= abs(rounded) < 1e6:
        return f"{rounded:.0f}"
    return f"{rounded:{form}}".removesuffix(".")


def plain(value: float) -> str:
    """Without zeros at the end, for what is exact: 0.1, 1000."""
    return number(value, ".3g")


def _scaled(units: Sequence[tuple[str, float, float]], suffix: str, *values: float | None) -> str:
    """Values in the unit of the last."""
    found = [x for x in values if known(x)]
    if len(found) < len(values):
        return MISSING
    rounded = abs(float(f"{found[-1]:.2e}"))
    name, size, _ = next(unit for unit in units if rounded >= unit[2])
    return f"{'–'.join(number(x / size) for x in found)} {name}{suffix}"


time = partial(_scaled, _TIMES, "")
"""0.412 ms, 210 ms, 2.15 s; a range in one unit: 205–214 ms."""
rate = partial(_scaled, _PREFIXES, "FLOP/s")
"""163 GFLOP/s."""
bandwidth = partial(_scaled, _PREFIXES, "B/s")
"""21.3 GB/s."""
size = partial(_scaled, _PREFIXES, "B")
"""Bytes, in powers of ten: 42.1 MB."""


def ratio(value: float | None) -> str:
    """12.2×."""
    return f"{number(value)}×" if known(value) else MISSING


def error(value: float | None) -> str:
    """3.1e-07."""
    if not known(value):
        return MISSING
    return f"{value:.1e}" if value else "0"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
