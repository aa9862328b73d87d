"""What a check says, what it needs of a noise floor, and how two sets of logits are compared for one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from .runners.base import Runner

Array = np.ndarray[Any, np.dtype[Any]]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Floor(Protocol):
    """Noise of a runner's arithmetic; :class:`g2kit.verify.floor.Floor` is one."""

    def threshold(self, metric: str) -> float | None:
        """Largest ``kl_max``, ``kl_mean`` (nats) or ``rms_logit`` that is still noise; None where it was not measured."""
        ...


@dataclass(frozen=True)
class Check:
    """One finding about one runner, or about a pair.

    Attributes:
        id: group and name, such as ``P6/padding``.
        title: what was asked.
        verdict: ``PASS``, ``FAIL`` or ``INCONCLUSIVE``.
        value: what was measured; None where nothing was, or where it is not finite.
        threshold: what it was compared with.
        detail: how it was found, or why it was not.
    """

    id: str
    title: str
    verdict: Verdict
    value: float | None
    threshold: float | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """Name of a check."""

    id: str
    title: str

    def unanswered(
        self, why: str, value: float | None = None, threshold: float | None = None
    ) -> Check:
        """INCONCLUSIVE."""
        return Check(self.id, self.title, "INCONCLUSIVE", value, threshold, why)

    def answer(self, passed: bool, value: float, threshold: float | None, detail: str) -> Check:
        """PASS or FAIL; a value that is not finite is always a FAIL."""
        if not math.isfinite(value):
            return Check(
                self.id, self.title, "FAIL", None, threshold, f"not a finite number; {detail}"
            )
        return Check(self.id, self.title, "PASS" if passed else "FAIL", value, threshold, detail)

    def is_noise(self, values: Array, floor: Floor | None, detail: str) -> Check:
        """Whether KL divergences of some positions are noise: the largest of them, and their mean.

        The mean sees a fault that is everywhere, where the largest must allow for the tail of noise. The check's value is
        of the two the one nearer to its limit, or further beyond it.
        """
        value, limit, label = nearest(values, floor)
        detail = f"{label} {detail}"
        if not math.isfinite(value):
            return self.answer(False, value, limit, detail)
        if limit is None:
            return self.unanswered(f"no noise floor was measured; {detail}", value)
        return self.answer(value <= limit, value, limit, detail)


def nearest(values: Array, floor: Floor | None) -> tuple[float, float | None, str]:
    """The largest KL or the mean, whichever is more of its limit; the limit; and which it is."""
    found = [(worst(values), limit_of(floor, "kl_max"), "largest KL")]
    if math.isfinite(found[0][0]):
        found.append((float(np.mean(values)), limit_of(floor, "kl_mean"), "mean KL"))
    known = [f for f in found if f[1] is not None]
    return max(known, key=lambda f: share(f[0], f[1])) if known else found[0]


def share(value: float, limit: float | None) -> float:
    """A value in units of its limit; what is not finite is beyond any, and any value beyond no limit."""
    if not math.isfinite(value):
        return math.inf
    return value / limit if limit else (math.inf if value else 0.0)


def limit_of(floor: Floor | None, metric: str) -> float | None:
    """The threshold, None where there is none."""
    limit = None if floor is None else floor.threshold(metric)
    return limit if limit is not None and math.isfinite(limit) else None


def logits_at(runner: Runner, columns: slice = slice(None)) -> Array:
    """Logits of some columns of the batch that has just run ``[batch, columns, vocab]``."""
    return np.concatenate([tile for _, _, tile in runner.logit_tiles(positions=columns)], axis=-1)


def kl(ref: Array, cand: Array) -> Array:
    """KL divergence of every position of logits ``[positions, vocab]``, in nats; NaN where a logit is not finite."""
    from ..model.logits import compare_logits

    values: Array = compare_logits(ref, cand).kl
    return values


def worst(values: Sequence[float] | Array) -> float:
    """The largest; NaN if any is, or if there are none."""
    found = np.asarray(values, np.float64).ravel()
    return float(found.max()) if len(found) and not np.isnan(found).any() else math.nan
