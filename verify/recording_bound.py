"""How far apart two models are at least, from their largest logits and log-sum-exps alone.

Joining tokens into groups never makes two distributions differ more (data processing), so what is found with the recorded
tokens and one group for the rest is a lower bound of KL and total variation. Every term of ``sum p (expm1(x) - x)``,
``x = log q - log p``, is at least 0, so leaving some out is one too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..model.logits_stats import Stats

Array = npt.NDArray[Any]
# what sums of 256 shares are off by in float64; with logits rounded to float32, what exp makes of half an ulp of 30
EXACT, ROUNDED = 1e-13, 4e-6


@dataclass(frozen=True)
class Largest:
    """One stream's side: what :class:`.recording_logits.Kept` has of it.

    Attributes:
        lse: ``[positions]``.
        ids, logits: the largest ``[positions, k]``, descending.
        next_logit: of the target ``[positions]``.
        finite: ``[positions]``.
    """

    lse: Array
    ids: Array
    logits: Array
    next_logit: Array
    finite: Array


def matched(ref_ids: Array, cand: Largest) -> Array:
    """The candidate's logits of the reference's tokens ``[positions, k]``; NaN where they were not kept."""
    out = np.full(ref_ids.shape, np.nan)
    for row, (one, two) in enumerate(zip(ref_ids, cand.ids, strict=True)):
        _, here, there = np.intersect1d(one, two, assume_unique=True, return_indices=True)
        out[row, here] = cand.logits[row, there]
    return out


def lower_bound(
    ref: Largest, cand: Largest, wanted: Array, targets: Array, *, rounded: bool = False
) -> Stats:
    """Statistics of every position from what was kept.

    Args:
        ref: the reference.
        cand: the candidate.
        wanted: its logits of the reference's tokens ``[positions, k]``, NaN where unknown.
        targets: next token's id, -1 for none ``[positions]``.
        rounded: the logits kept are not exactly those the log-sum-exps are of.

    Returns:
        kl, reverse_kl, tv and max_diff are lower bounds; rms_diff and mean_diff are over the tokens known on both sides;
        the rest is exact (overlaps as far as k reaches).
    """
    known = np.isfinite(wanted)
    a = ref.logits.astype(np.float64) - ref.lse[:, None]
    b = np.where(known, wanted, 0.0) - cand.lse[:, None]
    p, q = np.where(known, np.exp(a), 0.0), np.where(known, np.exp(b), 0.0)
    rest = np.stack([np.clip(1 - x.sum(1), 0.0, 1.0) for x in (p, q)])
    rest = _settled(rest, ROUNDED if rounded else EXACT)
    x = np.where(known, b - a, 0.0)
    difference = np.where(known, wanted - ref.logits, np.nan)
    count = np.maximum(known.sum(1), 1)
    mean = np.where(known, difference, 0.0).sum(1) / count
    spread = np.where(known, difference - mean[:, None], 0.0)
    k5, k10 = (_overlap(ref.ids, cand.ids, k) for k in (5, 10))
    floats: dict[str, Array] = {
        "kl": (p * (np.expm1(x) - x)).sum(1) + _term(rest[0], rest[1]),
        "reverse_kl": (q * (np.expm1(-x) + x)).sum(1) + _term(rest[1], rest[0]),
        "tv": (np.abs(p - q).sum(1) + np.abs(rest[0] - rest[1])) / 2,
        "max_diff": np.abs(np.where(known, difference, 0.0)).max(1),
        "mean_diff": mean,
        "rms_diff": np.sqrt((spread**2).sum(1) / count),
        "margin": (ref.logits[:, 0] - ref.logits[:, 1]).astype(np.float64),
        "overlap5": k5,
        "overlap10": k10,
        "lse_ref": ref.lse,
        "lse_cand": cand.lse,
        "logp_ref": np.where(targets >= 0, ref.next_logit - ref.lse, np.nan),
        "logp_cand": np.where(targets >= 0, cand.next_logit - cand.lse, np.nan),
    }
    bad = ~(ref.finite & cand.finite)
    return Stats(
        target=targets.astype(np.int64),
        top1_ref=np.where(bad, -1, ref.ids[:, 0]).astype(np.int64),
        top1_cand=np.where(bad, -1, cand.ids[:, 0]).astype(np.int64),
        finite_ref=ref.finite,
        finite_cand=cand.finite,
        **{name: np.where(bad, np.nan, v).astype(np.float64) for name, v in floats.items()},
    )


def _settled(rest: Array, noise: float) -> Array:
    """The rests' shares, moved towards each other by what they may be off."""
    a, b = rest
    step = np.sign(b - a) * np.maximum(np.abs(b - a) - noise, 0.0)
    return np.stack([a, a + step])


def _term(p: Array, q: Array) -> Array:
    """``p (expm1(x) - x)``; left out where either is 0."""
    both = (p > 0) & (q > 0)
    x = np.log(np.where(both, q, 1.0)) - np.log(np.where(both, p, 1.0))
    return np.asarray(np.where(both, p * (np.expm1(x) - x), 0.0))


def _overlap(one: Array, two: Array, k: int) -> Array:
    k = min(k, one.shape[1])
    same = one[:, :k, None] == two[:, None, :k]
    return np.asarray(same.any(2).mean(1))
