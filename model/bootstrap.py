"""Confidence intervals that resample documents.

Tokens of one text depend on each other; resampling them would give intervals that are too narrow. So whole documents are
drawn. Means over positions are ratios of per-document sums. Interval: bias-corrected and accelerated (Efron 1987), with
the expansion for few clusters of Hesterberg 2015 (arXiv 1411.5279, section 3.4.1). Deterministic for a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

DRAWS = 10_000
QUANTILE_DRAWS = 1_000
MIN_DOCUMENTS = 6  # resampling fewer has too few distinct outcomes for a 95 % interval
MAX_VALUES = 500_000
CHUNK = 2**20  # drawn indices held at a time
LEVEL = 0.95
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: over all documents; None without any.
        low, high: bounds; None where ``reason`` says why there are none.
        level: probability, e.g. 0.95.
        documents: how many were resampled.
        reason: why there is no interval, else None.
    """

    estimate: float | None
    low: float | None
    high: float | None
    level: float
    documents: int
    reason: str | None = None


def ratio_interval(
    sums: Sequence[float],
    sizes: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
    transform: Callable[[float], float] | None = None,
) -> Interval:
    """Interval of ``sum(sums) / sum(sizes)``.

    Args:
        sums: a metric's sum over the positions of each document.
        sizes: number of positions of each document.
        draws: bootstrap draws.
        seed: of the generator (PCG64).
        level: probability.
        transform: monotone function applied to estimate and bounds.
    """
    pairs = [(s, n) for s, n in zip(sums, sizes, strict=True) if n > 0]
    count = len(pairs)
    if not pairs:
        return Interval(None, None, None, level, 0, "there are no positions")
    value = transform or (lambda x: x)
    total, size = math.fsum(s for s, _ in pairs), sum(n for _, n in pairs)
    estimate = total / size
    if count < MIN_DOCUMENTS:
        return Interval(value(estimate), None, None, level, count, _too_few(count))
    s, n = np.array([p[0] for p in pairs]), np.array([float(p[1]) for p in pairs])
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = np.sort(
        np.concatenate(
            [s[i].sum(1) / n[i].sum(1) for i in _draw(rng, count, draws)] or [np.empty(0)]
        )
    )
    left_out = (total - s) / (size - n)
    low, high = _bca(drawn, estimate, left_out, count, level)
    a, b = sorted((value(low), value(high)))
    return Interval(value(estimate), a, b, level, count)


def quantile_interval(
    values: Sequence[Floats],
    q: float,
    *,
    draws: int = QUANTILE_DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of the ``q`` quantile over all positions; documents are resampled.

    Args:
        values: the metric at every position, one array per document.
        q: 0 to 1. The quantile is the smallest value with at least that share at or below it.
        draws: bootstrap draws.
        seed: of the generator.
        level: probability.
    """
    values = [v for v in values if len(v)]
    count = len(values)
    if not values:
        return Interval(None, None, None, level, 0, "there are no positions")
    flat = np.concatenate(values)
    order = np.argsort(flat, kind="stable")
    ranked = flat[order]
    owner = np.repeat(np.arange(count), [len(v) for v in values])[order]

    def quantile(weights: Floats) -> float:
        mass = np.cumsum(weights[owner])
        at = np.searchsorted(mass, q * mass[-1] * (1 - 1e-12))
        return float(ranked[min(int(at), len(ranked) - 1)])

    estimate = quantile(np.ones(count))
    reason = _too_few(count) if count < MIN_DOCUMENTS else None
    if len(flat) > MAX_VALUES:
        reason = f"{len(flat)} positions are more than {MAX_VALUES}, too many to resample"
    if reason:
        return Interval(estimate, None, None, level, count, reason)
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = np.sort(
        [
            quantile(np.bincount(row, minlength=count).astype(float))
            for index in _draw(rng, count, draws)
            for row in index
        ]
    )
    tail = _NORMAL.cdf(-_expanded(count, level))
    return Interval(estimate, _at(drawn, tail), _at(drawn, 1 - tail), level, count)


def _too_few(count: int) -> str:
    words = "sequence is" if count == 1 else "sequences are"
    return f"{count} {words} too few to resample, at least {MIN_DOCUMENTS} are needed"


def _draw(rng: np.random.Generator, count: int, draws: int) -> Iterator[np.ndarray[Any, Any]]:
    """Indices of drawn documents ``[some, count]``, ``draws`` rows in all."""
    step = max(1, CHUNK // count)
    for start in range(0, draws, step):
        yield rng.integers(0, count, size=(min(step, draws - start), count))


def _bca(
    drawn: Floats, estimate: float, left_out: Floats, count: int, level: float
) -> tuple[float, float]:
    below = float((drawn < estimate).mean() + (drawn == estimate).mean() / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / len(drawn)), 1 - 1 / len(drawn)))
    d = left_out.mean() - left_out
    square = float((d**2).sum())
    skew = float((d**3).sum()) / (6 * square**1.5) if square > 0 else 0.0
    z = _expanded(count, level)

    def bound(side: float) -> float:
        up = bias + side * z
        denominator = 1 - skew * up
        shifted = bias + up / denominator if denominator > 0 else math.copysign(math.inf, side)
        return _at(drawn, _NORMAL.cdf(shifted))

    return bound(-1.0), bound(1.0)


def _at(ordered: Floats, share: float) -> float:
    """Quantile of sorted values, linear between them."""
    return float(np.interp(share * (len(ordered) - 1), np.arange(len(ordered)), ordered))


def _expanded(count: int, level: float) -> float:
    """Normal quantile widened for few clusters: sqrt(n / (n - 1)) times Student's t of n - 1 degrees of freedom."""
    z = _NORMAL.inv_cdf((1 + level) / 2)
    return math.sqrt(count / (count - 1)) * student_t(z, count - 1)


def student_t(z: float, degrees: int) -> float:
    """Student's t quantile from the normal one (Cornish-Fisher; Abramowitz and Stegun 26.7.5); 1e-3 from 5 degrees on."""
    v = float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
