"""Figures as a reader wants them: three significant digits and a unit, and a dash for what is not known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MISSING = "–"

_TIMES = ((1.0, "s"), (1e-4, "ms"), (0.0, "µs"))  # from here on; 0.412 ms reads better than 412 µs
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is short: 0.0812, 12.0, 1050."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    rounded = float(f"{value:.2e}")
    if not 1e-4 <= abs(rounded) < 1e6:
        return f"{value:.2e}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def short(text: str) -> str:
    """Without the zeros at the end of its decimals, for what is exact: 1 ms, 0.1."""
    return re.sub(r"\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)", r"\1", text)


def time(seconds: float | None) -> str:
    """0.412 ms, 210 ms, 2.15 s."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    unit = _time_unit(seconds)
    return f"{number(seconds / _TIME_UNITS[unit])} {unit}"


def times(low: float, high: float) -> str:
    """A range in one unit: 205–214 ms."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return MISSING
    unit = _time_unit(high)
    return f"{number(low / _TIME_UNITS[unit])}–{number(high / _TIME_UNITS[unit])} {unit}"


def duration(seconds: float | None) -> str:
    """Of a whole run: 41 s, 3 min 20 s, 1 h 5 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def rate(per_second: float | None) -> str:
    """163 GFLOP/s."""
    return _prefixed(per_second, "FLOP/s")


def bandwidth(per_second: float | None) -> str:
    """21.3 GB/s."""
    return _prefixed(per_second, "B/s")


def size(count: float | None) -> str:
    """Bytes, in powers of ten: 42.1 MB."""
    return _prefixed(count, "B")


def ratio(value: float | None) -> str:
    """12.2×."""
    return MISSING if not known(value) else f"{number(value)}×"


def error(value: float | None, missing: str = MISSING) -> str:
    """3.1e-07."""
    if value is None or not math.isfinite(value):
        return missing
    return "0" if value == 0 else f"{value:.1e}"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _time_unit(seconds: float) -> str:
    rounded = float(f"{abs(seconds):.2e}")
    return next(unit for least, unit in _TIMES if rounded >= least)


def _prefixed(value: float | None, unit: str) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    rounded = abs(float(f"{value:.2e}"))
    for scale, prefix in _PREFIXES:
        if rounded >= scale:
            return f"{number(value / scale)} {prefix}{unit}"
    return f"{number(value)} {unit}"
