"""Numbers as people read them: few digits, real exponents, never rounded across a limit."""

from __future__ import annotations

import math

NOTHING = "–"
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(exponent: int) -> str:
    """``10⁻¹²``."""
    return "10" + str(exponent).translate(_RAISED)


def number(x: float | None, digits: int = 3) -> str:
    """``1,234``, ``0.0123``, ``1.23×10⁻¹²``; a dash for None."""
    if x is None:
        return NOTHING
    if isinstance(x, int) and abs(x) < 10**12:
        return f"{x:,}".replace("-", "−")
    if not math.isfinite(x):
        return str(x)
    if x == 0 or 1e-3 <= abs(x) < 1e5:
        return _plain(x, digits).replace("-", "−")
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa}×{power(int(exponent))}".replace("-", "−")


def _plain(x: float, digits: int) -> str:
    if abs(x) >= 10 ** (digits - 1):
        return f"{x:,.0f}"
    return f"{x:.{digits}g}"


def ascii_number(x: float | None, digits: int = 3) -> str:
    """``1.23e-12``: for text that is searched or parsed."""
    return NOTHING if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.{digits}g}"


def percent(share: float | None, digits: int = 2) -> str:
    """``99.97 %``; what is not all is never shown as 100, what is not none never as 0."""
    if share is None:
        return NOTHING
    shown = f"{100 * share:.{digits}f}"
    least = 10.0**-digits
    if share < 1 and float(shown) >= 100:
        return f"> {100 - least:.{digits}f} %"
    if share > 0 and float(shown) == 0:
        return f"< {least:.{digits}f} %"
    return f"{shown.rstrip('0').rstrip('.') if '.' in shown else shown} %"


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 tensor``, ``90 tensors``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def nbytes(n: float | None) -> str:
    """Binary units: ``4.9 GiB``."""
    if n is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def seconds(t: float | None) -> str:
    """``4.2 s`` or ``3 min 5 s``."""
    if t is None:
        return NOTHING
    return f"{t:.1f} s" if t < 100 else f"{int(t // 60)} min {int(t % 60)} s"


def interval(bounds: list[float] | None) -> str | None:
    """``[1.7, 2.2]``."""
    return None if bounds is None else f"[{number(bounds[0])}, {number(bounds[1])}]"
