"""From values to places in a plot, and the ticks in between."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .numerals import number, power

Tick = tuple[float, str]
LANE = 26.0  # where exact zeros live on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """A range of values.

    Attributes:
        label: with the unit.
        low, high: ends; positive where ``log``.
        log: logarithmic.
        zero: a logarithmic axis has a place for exact zeros below ``low``.
        ticks: value and label; None for automatic ones.
    """

    label: str
    low: float
    high: float
    log: bool = False
    zero: bool = False
    ticks: Sequence[Tick] | None = None

    @staticmethod
    def logarithmic(label: str, values: Iterable[float | None]) -> Axis:
        """Whole decades around the positive values (at least two), and a place for zeros where there are some."""
        known = [v for v in values if v is not None]
        positive = [v for v in known if v > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        low, high = (low - 1, high + 1) if high - low < 1 else (low, high)
        return Axis(
            label, 10.0 ** max(low, -307), 10.0 ** min(high, 307), True, any(v <= 0 for v in known)
        )

    def at(self, value: float, start: float, stop: float) -> float:
        """Place of a value between ``start`` (at ``low``) and ``stop`` (at ``high``); outside values at the ends."""
        if not self.log:
            share = (value - self.low) / (self.high - self.low or 1.0)
            return start + min(max(share, 0.0), 1.0) * (stop - start)
        lane = math.copysign(LANE, stop - start) if self.zero else 0.0
        if value <= 0:
            return start
        share = math.log(value) - math.log(self.low)
        share /= math.log(self.high) - math.log(self.low)
        return start + lane + min(max(share, 0.0), 1.0) * (stop - start - lane)

    def marks(self, most: int) -> list[Tick]:
        """At most about ``most`` ticks."""
        if self.ticks is not None:
            step = max(1, math.ceil(len(self.ticks) / most))
            return list(self.ticks[::step])
        if not self.log:
            return linear_ticks(self.low, self.high, most)
        zero = [(0.0, "0")] if self.zero else []
        return zero + decades(self.low, self.high, most)


def decades(low: float, high: float, most: int) -> list[Tick]:
    """Powers of ten."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / most))
    return [(10.0**e, "1" if e == 0 else power(e)) for e in range(first, last + 1, step)]


def linear_ticks(low: float, high: float, most: int) -> list[Tick]:
    """Round values."""
    if high <= low:
        return [(low, number(low))]
    raw = (high - low) / max(most, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = base * next(m for m in (1, 2, 5, 10) if m * base >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    values = [(first + i) * step for i in range(count)]
    whole = step >= 1
    return [(v, number(round(v) if whole else float(f"{v:.6g}"))) for v in values]
