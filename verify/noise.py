"""Measured noise as data: what each estimator found, the largest of them, and the thresholds that follow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..formats.errors import FormatError, UsageError
from .runners.base import TAPS

K = 10.0  # KL may be this many times its floor; it grows with the square of the error, everything else with its root
# one rounding of the compute type: nothing is expected nearer than that
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-9, "float64": 2.0**-53}


@dataclass(frozen=True)
class Estimate:
    """One estimator's result.

    Attributes:
        name: what was compared.
        dtype: compute type it speaks for.
        tokens, documents: evidence.
        kl_max: upper 95 % bound of the largest KL of as many positions as the comparison has, nats.
        kl_mean: upper 95 % bound of its mean (documents resampled; with few of them, the largest document's mean).
        rms_logit: that of the largest RMS logit difference, its mean over the vocabulary removed.
        hidden: largest accumulated relative error of embedding, blocks and final norm, in this order; may be empty.
        isolated: largest isolated one, the same order (0 where there is none).
        taps: tap -> largest relative error per block, the block's input the same; may be empty.
    """

    name: str
    dtype: str
    tokens: int
    documents: int
    kl_max: float
    kl_mean: float
    rms_logit: float
    hidden: tuple[float, ...] = ()
    isolated: tuple[float, ...] = ()
    taps: dict[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Floor:
    """The largest of all estimates, and what follows.

    Attributes:
        dtype: compute type.
        estimators: in the order they ran.
        k: factor between floor and threshold for KL; its root for the others.
        skipped: ``(estimator, why)``.
    """

    dtype: str
    estimators: tuple[Estimate, ...]
    k: float = K
    skipped: tuple[tuple[str, str], ...] = ()

    METRICS: ClassVar[tuple[str, ...]] = ("kl_max", "kl_mean", "rms_logit")

    @property
    def kl_max(self) -> float:
        """Nats."""
        return max(e.kl_max for e in self.estimators)

    @property
    def kl_mean(self) -> float:
        """Nats."""
        return max(e.kl_mean for e in self.estimators)

    @property
    def rms_logit(self) -> float:
        """Logits."""
        return max(e.rms_logit for e in self.estimators)

    def hidden(self, layer: int, *, isolated: bool = False) -> float | None:
        """Relative error of a layer's output (-1: the embedding); None where no estimator saw hidden states."""
        seen = [e.isolated if isolated else e.hidden for e in self.estimators]
        values = [v[layer + 1] for v in seen if len(v) > layer + 1]
        return max(*values, _UNIT[self.dtype]) if values else None

    def tap(self, name: str, layer: int) -> float:
        """Relative error of an intermediate, on the same input; the block's own where taps were not measured."""
        values = [e.taps[name][layer] for e in self.estimators if e.taps]
        if not values:
            values = [self.hidden(layer, isolated=True) or 0.0]
        return max(*values, _UNIT[self.dtype])

    def threshold(self, metric: str, layer: int | None = None) -> float | None:
        """What a metric may reach.

        Args:
            metric: ``kl_max``, ``kl_mean``, ``rms_logit``; with a layer ``hidden``, ``isolated`` or a tap's name.
            layer: -1 for the embedding, the number of blocks for the final norm.

        Returns:
            None for hidden states no estimator saw.

        Raises:
            UsageError: no such metric.
        """
        if metric in ("kl_max", "kl_mean"):
            return self.k * float(getattr(self, metric))
        root = math.sqrt(self.k)
        if metric == "rms_logit":
            return root * self.rms_logit
        if layer is not None and metric in ("hidden", "isolated"):
            value = self.hidden(layer, isolated=metric == "isolated")
            return None if value is None else root * value
        if layer is not None and metric in TAPS:
            return root * self.tap(metric, layer)
        raise UsageError(f"a floor has no metric {metric!r}.")

    def plus(self, other: Floor) -> Floor:
        """The floor between a run with this one and a run with the other: errors add, so KL does in its root."""
        return Floor(
            self.dtype if _UNIT[self.dtype] >= _UNIT[other.dtype] else other.dtype,
            (_sum(_most(self), _most(other)),),
            max(self.k, other.k),
        )

    def excess(self, own: Floor) -> float:
        """How many times larger than another floor this one is, as errors (KL by its root): the largest of all ratios."""
        ratios = [_ratio(self.rms_logit, own.rms_logit)]
        ratios += [
            math.sqrt(_ratio(getattr(self, m), getattr(own, m))) for m in ("kl_max", "kl_mean")
        ]
        depth = max((len(e.hidden) for e in self.estimators), default=0)
        for layer in range(-1, depth - 1):
            for isolated in (False, True):
                mine, other = (f.hidden(layer, isolated=isolated) for f in (self, own))
                if mine is not None and other is not None:
                    ratios.append(_ratio(mine, other))
        return max(ratios)

    def to_json(self) -> dict[str, Any]:
        """Plain data: what :meth:`from_json` takes, and ``kl_max``, ``kl_mean``, ``rms_logit`` for readers."""
        return {
            "dtype": self.dtype,
            "k": self.k,
            **{m: getattr(self, m) for m in self.METRICS},
            "estimators": [_plain(e) for e in self.estimators],
            "skipped": [list(s) for s in self.skipped],
        }

    @staticmethod
    def from_json(data: Any) -> Floor:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        try:
            estimates = tuple(_estimate(e) for e in data["estimators"])
            skipped = tuple((_text(a), _text(b)) for a, b in data["skipped"])
            k = float(data["k"])
            if not estimates or data["dtype"] not in _UNIT or not (math.isfinite(k) and k > 0):
                raise ValueError
            return Floor(data["dtype"], estimates, k, skipped)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise FormatError("not a noise floor: fields are missing or unknown.") from None


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf if a > 0 else 1.0


def _plain(e: Estimate) -> dict[str, Any]:
    taps = None if e.taps is None else {n: list(v) for n, v in e.taps.items()}
    return {**asdict(e), "hidden": list(e.hidden), "isolated": list(e.isolated), "taps": taps}


def _estimate(data: Any) -> Estimate:
    numbers = {n: float(data[n]) for n in Floor.METRICS}
    lists = {n: tuple(float(x) for x in data[n]) for n in ("hidden", "isolated")}
    taps = data["taps"]
    if taps is not None:
        taps = {n: tuple(float(x) for x in taps[n]) for n in TAPS}
    flat = [*numbers.values(), *lists["hidden"], *lists["isolated"]]
    flat += [x for v in (taps or {}).values() for x in v]
    if any(not math.isfinite(x) or x < 0 for x in flat):
        raise ValueError
    return Estimate(
        _text(data["name"]), _text(data["dtype"]), _count(data["tokens"]), _count(data["documents"]),
        numbers["kl_max"], numbers["kl_mean"], numbers["rms_logit"],
        lists["hidden"], lists["isolated"], taps,
    )  # fmt: skip


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError
    return value


def _most(floor: Floor) -> Estimate:
    """One estimate that says what the floor says."""
    size = max((len(e.hidden) for e in floor.estimators), default=0)
    layers = range(-1, size - 1)
    return Estimate(
        "+".join(e.name for e in floor.estimators), floor.dtype,
        max(e.tokens for e in floor.estimators), max(e.documents for e in floor.estimators),
        floor.kl_max, floor.kl_mean, floor.rms_logit,
        tuple(floor.hidden(i) or 0.0 for i in layers),
        tuple(floor.hidden(i, isolated=True) or 0.0 for i in layers),
    )  # fmt: skip


def _sum(a: Estimate, b: Estimate) -> Estimate:
    def root(x: float, y: float) -> float:
        return (math.sqrt(x) + math.sqrt(y)) ** 2

    def each(x: tuple[float, ...], y: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(p + q for p, q in zip(x, y, strict=False))

    return Estimate(
        f"{a.name} and {b.name}", a.dtype, min(a.tokens, b.tokens), min(a.documents, b.documents),
        root(a.kl_max, b.kl_max), root(a.kl_mean, b.kl_mean), a.rms_logit + b.rms_logit,
        each(a.hidden, b.hidden), each(a.isolated, b.isolated),
    )  # fmt: skip
