"""How far apart two models are block by block: per position, then as numbers that add up over probes and shards.

The error of a position is relative: the RMS of the difference over the RMS of the reference, across the hidden axis.
*Isolated*: the candidate's block on the reference's input, so the block's own error. *Accumulated*: on its own input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.errors import FormatError

Array = np.ndarray[Any, np.dtype[Any]]
EMBEDDING = (
    -1
)  # the layer number of the embedded tokens; that of the final norm is the number of blocks
KINDS = ("isolated", "accumulated")
_ROWS = 512  # positions converted to float64 at a time
_TINY = 1e-300


def position_errors(ref: Array, cand: Array) -> Array:
    """Relative error of every position.

    Args:
        ref: ``[positions, …]``; everything behind the first axis is one vector.
        cand: of the same shape.

    Returns:
        ``[positions]`` float64; NaN where either is not finite.
    """
    if np.array_equal(ref, cand):
        return np.zeros(len(ref))
    out = np.empty(len(ref))
    for start in range(0, len(ref), _ROWS):
        part = slice(start, start + _ROWS)
        a = ref[part].reshape(len(ref[part]), -1).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            d = cand[part].reshape(a.shape).astype(np.float64) - a
            size, error = np.einsum("pi,pi->p", a, a), np.einsum("pi,pi->p", d, d)
            ratio = np.sqrt(error / np.maximum(size, _TINY))
        out[part] = np.where(np.isfinite(size) & np.isfinite(error), ratio, np.nan)
    return out


@dataclass(frozen=True)
class Bucket:
    """Errors of some positions: how many, their sum and the largest."""

    count: int
    total: float
    largest: float

    @staticmethod
    def of(errors: Array) -> Bucket:
        """Of ``[positions]``, those that are not finite left out."""
        x = errors[np.isfinite(errors)]
        return Bucket(len(x), math.fsum(x.tolist()), float(x.max()) if len(x) else 0.0)


@dataclass(frozen=True)
class Trace:
    """One block's error over one probe.

    Attributes:
        probe: its id.
        layer: block, :data:`EMBEDDING`, or the number of blocks for the final norm.
        kind: of :data:`KINDS`.
        near, far: positions before, and from, the sliding window's size on.
        steps: ``(position, error)`` of every new maximum in the order of positions, from which the first position above
            any threshold can be told.
    """

    probe: str
    layer: int
    kind: str
    near: Bucket
    far: Bucket
    steps: tuple[tuple[int, float], ...]

    @staticmethod
    def of(probe: str, layer: int, kind: str, errors: Array, window: int | None) -> Trace:
        """From the errors of every position of the probe ``[positions]``."""
        cut = len(errors) if window is None else window
        finite = np.where(np.isfinite(errors), errors, -1.0)
        before = np.concatenate(([0.0], np.maximum.accumulate(finite)[:-1]))
        steps = tuple((int(p), float(errors[p])) for p in np.flatnonzero(finite > before))
        near, far = Bucket.of(errors[:cut]), Bucket.of(errors[cut:])
        return Trace(probe, layer, kind, near, far, steps)

    def first_above(self, threshold: float) -> int | None:
        """First position whose error is larger."""
        return next((p for p, e in self.steps if e > threshold), None)

    def to_json(self) -> list[Any]:
        """Plain data."""
        numbers = [[b.count, b.total, b.largest] for b in (self.near, self.far)]
        return [self.probe, self.layer, self.kind, *numbers, [list(s) for s in self.steps]]

    @staticmethod
    def from_json(data: Any) -> Trace:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        try:
            probe, layer, kind, near, far, steps = data
            if kind not in KINDS:
                raise ValueError
            return Trace(
                str(probe), int(layer), kind, _bucket(near), _bucket(far),
                tuple((int(p), float(e)) for p, e in steps),
            )  # fmt: skip
        except (TypeError, ValueError):
            raise FormatError("not a block's errors: fields are missing or unknown.") from None


def _bucket(data: Sequence[Any]) -> Bucket:
    count, total, largest = data
    return Bucket(int(count), float(total), float(largest))


@dataclass(frozen=True)
class BlockError:
    """One block's error over all probes. Numbers are relative errors; None: no such positions, or not measured.

    Attributes:
        layer: block, :data:`EMBEDDING`, or the number of blocks for the final norm.
        kind: ``local``, ``global``, ``embedding`` or ``final``.
        isolated, isolated_far: largest, at positions before and from the window's size on.
        accumulated, accumulated_far: the same on the candidate's own input.
        isolated_mean, accumulated_mean: over all positions.
        positions: how many.
    """

    layer: int
    kind: str
    isolated: float | None
    isolated_far: float | None
    accumulated: float | None
    accumulated_far: float | None
    isolated_mean: float | None
    accumulated_mean: float | None
    positions: int

    @property
    def own(self) -> float | None:
        """The block's own error: the largest isolated one; None where it was not measured."""
        return largest(self.isolated, self.isolated_far)

    @property
    def reached(self) -> float | None:
        """The largest accumulated error."""
        return largest(self.accumulated, self.accumulated_far)


def largest(*values: float | None) -> float | None:
    """The largest of those that are there."""
    return max((v for v in values if v is not None), default=None)


def block_errors(traces: Iterable[Trace], kinds: Mapping[int, str]) -> list[BlockError]:
    """Errors of every layer in ``kinds`` that has traces, the same in whatever order the traces come."""
    by: dict[tuple[int, str], list[Trace]] = {}
    for t in traces:
        by.setdefault((t.layer, t.kind), []).append(t)
    return [
        _block_error(
            layer, name, by.get((layer, "isolated"), []), by.get((layer, "accumulated"), [])
        )
        for layer, name in kinds.items()
        if (layer, "accumulated") in by
    ]


def _block_error(layer: int, kind: str, own: list[Trace], reached: list[Trace]) -> BlockError:
    return BlockError(
        layer, kind,
        _most([t.near for t in own]), _most([t.far for t in own]),
        _most([t.near for t in reached]), _most([t.far for t in reached]),
        _mean(own), _mean(reached),
        sum(t.near.count + t.far.count for t in reached),
    )  # fmt: skip


def _most(buckets: list[Bucket]) -> float | None:
    return max((b.largest for b in buckets if b.count), default=None)


def _mean(traces: list[Trace]) -> float | None:
    buckets = [b for t in traces for b in (t.near, t.far)]
    count = sum(b.count for b in buckets)
    return math.fsum(sorted(b.total for b in buckets)) / count if count else None
