"""Figures as a reader wants them: three significant digits and a unit, and a dash for what is not known."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

MISSING = "–"

# From which value on, the size of the unit, its name; 0.412 ms reads better than 412 µs.
_TIMES = ((1.0, 1.0, "s"), (1e-4, 1e-3, "ms"), (0.0, 1e-6, "µs"))
_PREFIXES = (*((10.0**k, 10.0**k, name) for k, name in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))),
             (0.0, 1.0, ""))  # fmt: skip


def known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None) -> str:
    """Three significant digits, without an exponent where that is short: 0.0812, 12.0, 1050."""
    if value is None or not math.isfinite(value):
        return MISSING
    rounded = float(f"{value:.2e}")
    if rounded and not 1e-4 <= abs(rounded) < 1e6:
        return f"{value:.2e}"
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}" if rounded else "0"


def short(text: str) -> str:
    """Without the zeros at the end of its decimals, for what is exact: 1 ms, 0.1."""
    return re.sub(r"\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)", r"\1", text)


def plain(value: float) -> str:
    return short(number(value))


def _scaled(scales: Sequence[tuple[float, float, str]], unit: str, *values: float | None) -> str:
    """Values in the unit of the last."""
    found = [x for x in values if x is not None and math.isfinite(x)]
    if len(found) < len(values):
        return MISSING
    rounded = abs(float(f"{found[-1]:.2e}"))
    _, size, name = next(scale for scale in scales if rounded >= scale[0])
    return f"{'–'.join(number(x / size) for x in found)} {name}{unit}"


def time(*seconds: float | None) -> str:
    """0.412 ms, 210 ms, 2.15 s; a range in one unit: 205–214 ms."""
    return _scaled(_TIMES, "", *seconds)


def rate(per_second: float | None) -> str:
    """163 GFLOP/s."""
    return _scaled(_PREFIXES, "FLOP/s", per_second)


def bandwidth(per_second: float | None) -> str:
    """21.3 GB/s."""
    return _scaled(_PREFIXES, "B/s", per_second)


def size(count: float | None) -> str:
    """Bytes, in powers of ten: 42.1 MB."""
    return _scaled(_PREFIXES, "B", count)


def ratio(value: float | None) -> str:
    """12.2×."""
    return f"{number(value)}×" if known(value) else MISSING


def error(value: float | None, missing: str = MISSING) -> str:
    """3.1e-07."""
    if not known(value):
        return missing
    return f"{value:.1e}" if value else "0"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
