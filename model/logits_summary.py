"""What is said about all positions of a comparison.

A :class:`Summary` is computed from records in the order of their names with exactly rounded sums (``math.fsum``), so any
number of shards gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from ..formats.errors import FormatError
from .bootstrap import DRAWS, Interval, quantile_interval, ratio_interval
from .logits_stats import INTEGERS, VERSION, Array, Floats, Record, Stats, merge, null

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
WORST = 20
METRICS = ("kl", "reverse_kl", "tv", "max_diff", "rms_diff")


@dataclass(frozen=True)
class Spread:
    """Distribution of a metric over positions: mean and percentiles (``"99.9" -> value``; ``"100"`` is the maximum)."""

    mean: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Group:
    """A set of positions: all, a document, a category, a range of positions.

    Attributes:
        name: of the group.
        positions, documents: how many, finite or not.
        non_finite: positions left out of everything below because a logit is NaN or infinite.
        metrics: distribution of kl, reverse_kl, tv, max_diff, rms_diff; empty without a finite position.
        agreement: share of positions with the same top-1 id, None without positions.
        expected_flips, real_flips: top-1 changes with the reference's margin within, beyond the tolerance.
        overlap5, overlap10: mean shares.
        scored: positions with a target.
        perplexity_ref, perplexity_cand: exp of the mean negative log-probability of targets.
        delta_logp: mean log-probability of targets, candidate minus reference.
    """

    name: str
    positions: int
    documents: int
    non_finite: int
    metrics: dict[str, Spread]
    agreement: float | None
    expected_flips: int
    real_flips: int
    overlap5: float | None
    overlap10: float | None
    scored: int
    perplexity_ref: float | None
    perplexity_cand: float | None
    delta_logp: float | None


@dataclass(frozen=True)
class Worst:
    """A position with a large divergence, to be shown with its context.

    ``position`` counts within the sequence, ``index`` within the record's statistics.
    """

    document: str
    position: int
    index: int
    kl: float
    tv: float
    max_diff: float
    margin: float
    top1_ref: int
    top1_cand: int
    target: int
    logp_ref: float | None
    logp_cand: float | None


@dataclass(frozen=True)
class Summary:
    """What is said about a comparison.

    Attributes:
        overall: all positions.
        documents, categories: by name.
        ranges: by position in the sequence; names are ``start-stop``.
        intervals: of ``kl``, ``reverse_kl``, ``tv``, ``agreement``, ``real_flips`` (share), ``delta_logp``,
            ``perplexity_ratio`` (candidate / reference) and ``kl_p99``.
        worst: positions of largest KL, descending.
        first_non_finite: document, position and stream (``reference``, ``candidate``), or None.
        tolerance: margin below which a flip is expected; None: the position's own largest difference, which excuses
            every flip, so that ``real_flips`` says nothing.
    """

    overall: Group
    documents: list[Group]
    categories: list[Group]
    ranges: list[Group]
    intervals: dict[str, Interval]
    worst: list[Worst]
    first_non_finite: tuple[str, int, str] | None
    tolerance: float | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data, finite numbers and null only."""
        return dict(_plain(self))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Summary:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        try:
            if data["version"] != VERSION:
                raise FormatError(
                    f"the summary has version {data['version']!r}, expected {VERSION}."
                )
            first = data["first_non_finite"]
            return Summary(
                overall=_group(data["overall"]),
                documents=[_group(g) for g in data["documents"]],
                categories=[_group(g) for g in data["categories"]],
                ranges=[_group(g) for g in data["ranges"]],
                intervals={n: Interval(**i) for n, i in data["intervals"].items()},
                worst=[Worst(**w) for w in data["worst"]],
                first_non_finite=None if first is None else (first[0], first[1], first[2]),
                tolerance=data["tolerance"],
            )
        except (KeyError, TypeError, AttributeError, IndexError):
            raise FormatError(
                "not a summary of statistics: fields are missing or unknown."
            ) from None


def _group(data: Mapping[str, Any]) -> Group:
    metrics = {n: Spread(**s) for n, s in data["metrics"].items()}
    return Group(**{**data, "metrics": metrics})


def _plain(x: Any) -> Any:
    if hasattr(x, "__dataclass_fields__"):
        return {f.name: _plain(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(v) for v in x]
    return null(x)


def summarise(
    records: Iterable[Record],
    *,
    edges: Sequence[int] = (),
    tolerance: float | None = None,
    worst: int = WORST,
    draws: int = DRAWS,
    seed: int = 0,
) -> Summary:
    """Aggregate records; the same records give the same summary in whatever order they come.

    Args:
        records: one per document.
        edges: positions that cut sequences into ranges (a sliding window's size, say); default: powers of two.
        tolerance: see :meth:`Stats.flips`.
        worst: number of worst positions to keep.
        draws: bootstrap draws.
        seed: of the bootstrap.

    Raises:
        UsageError: a document occurs twice.
    """
    records = merge([records])
    names = sorted({r.category for r in records})
    return Summary(
        overall=_describe("all", records, tolerance),
        documents=[_describe(r.document, [r], tolerance) for r in records],
        categories=[
            _describe(name, [r for r in records if r.category == name], tolerance) for name in names
        ],
        ranges=_ranges(records, edges, tolerance),
        intervals=_intervals(records, tolerance, draws, seed),
        worst=_worst(records, worst),
        first_non_finite=_first_non_finite(records),
        tolerance=tolerance,
    )


def _mean(x: Array) -> float | None:
    return math.fsum(x.tolist()) / len(x) if len(x) else None


def _describe(name: str, records: Sequence[Record], tolerance: float | None) -> Group:
    everything = Stats.join([r.stats for r in records])
    s = everything.select(everything.finite)
    expected, real = s.flips(tolerance)
    scored = s.select(s.scored)
    ref, cand = _mean(scored.logp_ref), _mean(scored.logp_cand)
    return Group(
        name=name,
        positions=len(everything),
        documents=len(records),
        non_finite=len(everything) - len(s),
        metrics={m: _spread(getattr(s, m)) for m in METRICS if len(s)},
        agreement=_mean(s.agree.astype(float)),
        expected_flips=int(expected.sum()),
        real_flips=int(real.sum()),
        overlap5=_mean(s.overlap5),
        overlap10=_mean(s.overlap10),
        scored=len(scored),
        perplexity_ref=_perplexity(ref),
        perplexity_cand=_perplexity(cand),
        delta_logp=_mean(scored.logp_cand - scored.logp_ref),
    )


def _perplexity(mean_logp: float | None) -> float | None:
    """exp(-mean); None where that is beyond a float."""
    return None if mean_logp is None or mean_logp < -700 else math.exp(-mean_logp)


def _spread(x: Floats) -> Spread:
    values = np.percentile(x, PERCENTILES)
    labels = [f"{p:g}" for p in PERCENTILES]
    return Spread(_mean(x) or 0.0, dict(zip(labels, map(float, values), strict=True)))


def _ranges(
    records: Sequence[Record], edges: Sequence[int], tolerance: float | None
) -> list[Group]:
    longest = max((r.offset + len(r.stats) for r in records), default=0)
    cuts = sorted({0, *(edges or (2**i for i in range(4, 40))), longest})
    groups = []
    for start, stop in pairwise(cuts):
        if stop > longest:
            break
        inside = []
        for r in records:
            part = slice(max(0, start - r.offset), max(0, stop - r.offset))
            if len(r.stats.kl[part]):
                inside.append(Record(r.document, r.category, r.stats.select(part)))
        if inside:
            groups.append(_describe(f"{start}-{stop}", inside, tolerance))
    return groups


def _intervals(
    records: Sequence[Record], tolerance: float | None, draws: int, seed: int
) -> dict[str, Interval]:
    """Documents are resampled; both streams' numbers of a document stay together (paired)."""
    finite = [r.stats.select(r.stats.finite) for r in records]
    finite = [s for s in finite if len(s)]
    scored = [s.select(s.scored) for s in finite if s.scored.any()]

    def over(
        group: Sequence[Stats],
        column: Callable[[Stats], Array],
        transform: Callable[[float], float] | None = None,
    ) -> Interval:
        sums = [math.fsum(column(s).astype(float).tolist()) for s in group]
        sizes = [len(s) for s in group]
        return ratio_interval(sums, sizes, draws=draws, seed=seed, transform=transform)

    def delta(s: Stats) -> Array:
        return np.asarray(s.logp_cand - s.logp_ref)

    return {
        "kl": over(finite, lambda s: s.kl),
        "reverse_kl": over(finite, lambda s: s.reverse_kl),
        "tv": over(finite, lambda s: s.tv),
        "agreement": over(finite, lambda s: s.agree),
        "real_flips": over(finite, lambda s: s.flips(tolerance)[1]),
        "delta_logp": over(scored, delta),
        "perplexity_ratio": over(scored, delta, lambda x: math.exp(min(-x, 700.0))),
        "kl_p99": quantile_interval([s.kl for s in finite], 0.99, seed=seed),
    }


def _worst(records: Sequence[Record], count: int) -> list[Worst]:
    found: list[Worst] = []
    for r in records:
        s = r.stats
        order = np.argsort(np.where(s.finite, -s.kl, np.inf), kind="stable")[:count]
        found += [_worst_at(r, int(i)) for i in order if s.finite[i]]
    return sorted(found, key=lambda w: (-w.kl, w.document, w.position))[:count]


def _worst_at(r: Record, i: int) -> Worst:
    def number(name: str) -> float:
        return float(getattr(r.stats, name)[i])

    return Worst(
        document=r.document,
        position=r.offset + i,
        index=i,
        kl=number("kl"),
        tv=number("tv"),
        max_diff=number("max_diff"),
        margin=number("margin"),
        logp_ref=null(number("logp_ref")),
        logp_cand=null(number("logp_cand")),
        **{n: int(getattr(r.stats, n)[i]) for n in INTEGERS},
    )


def _first_non_finite(records: Sequence[Record]) -> tuple[str, int, str] | None:
    for r in records:
        i = r.stats.first_non_finite()
        if i is not None:
            stream = "candidate" if r.stats.finite_ref[i] else "reference"
            return r.document, r.offset + i, stream
    return None
