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
        """Largest value of ``kl_max`` (nats) or ``rms_logit`` that is still noise; None where that was not measured."""
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

    def at_most(self, value: float, floor: Floor | None, metric: str, detail: str) -> Check:
        """Whether a value is noise."""
        limit = limit_of(floor, metric)
        if not math.isfinite(value):
            return self.answer(False, value, limit, detail)
        if limit is None:
            return self.unanswered(f"no noise floor was measured; {detail}", value)
        return self.answer(value <= limit, value, limit, detail)


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
