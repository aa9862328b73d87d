"""Where two models part: the first layer beyond the floor, the first position, then the first intermediate inside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .block_errors import BlockError
from .runners.base import TAPS, Runner
from .taps import DIAGONAL, first_tap, tap_errors

if TYPE_CHECKING:
    from .batches import ProbeLike
    from .floor import Floor
    from .lockstep import LockstepResult

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Divergence:
    """A layer that is beyond the floor.

    Attributes:
        layer: -1 for the embedding, the number of blocks for the final norm.
        kind: ``embedding``, ``local``, ``global``, ``final``.
        error: its largest relative error; None where hidden states are not finite.
        threshold: what it may be.
        isolated: whether that is the block's own error on the reference's input.
        probe, position: the earliest position beyond the threshold.
        tap: the first intermediate, once :func:`bisect_taps` has looked.
    """

    layer: int
    kind: str
    error: float | None
    threshold: float
    isolated: bool
    probe: str
    position: int
    tap: str | None = None


def exceeds(e: BlockError, floor: Floor) -> tuple[float, float, bool] | None:
    """``(error, threshold, isolated)`` of a layer beyond the floor, else None."""
    alone = e.own is not None
    error = e.own if alone else e.reached
    limit = floor.threshold("isolated" if alone else "hidden", e.layer)
    if error is None or limit is None or error <= limit:
        return None
    return error, limit, alone


def divergent(result: LockstepResult, floor: Floor) -> list[Divergence]:
    """Every layer beyond the floor, in forward order.

    A block counts by its isolated error where that was measured, else by the accumulated one. The final norm has only the
    latter, so it counts where nothing before it is beyond the floor.
    """
    found: list[Divergence] = []
    for e in result.errors:
        bad = next((n for n in result.non_finite if n.layer == e.layer), None)
        over = exceeds(e, floor)
        if e.kind == "final" and found:
            break
        if bad is not None:
            limit = floor.threshold("hidden", e.layer) or 0.0
            found.append(Divergence(e.layer, e.kind, None, limit, False, bad.probe, bad.position))
        elif over is not None:
            error, limit, alone = over
            probe, position = _first_place(result, e.layer, alone, limit)
            found.append(Divergence(e.layer, e.kind, error, limit, alone, probe, position))
    return found


def first_divergent(result: LockstepResult, floor: Floor) -> Divergence | None:
    """The first layer beyond the floor; None where there is none, or no runner gave hidden states."""
    return next(iter(divergent(result, floor)), None)


def _first_place(result: LockstepResult, layer: int, alone: bool, limit: float) -> tuple[str, int]:
    kind = "isolated" if alone else "accumulated"
    places = [
        (at, t.probe)
        for t in result.traces
        if t.layer == layer and t.kind == kind and (at := t.first_above(limit)) is not None
    ]
    position, probe = min(places)
    return probe, position


@dataclass(frozen=True)
class Inside:
    """Where a block goes wrong.

    Attributes:
        layer: the block.
        tap: the first intermediate beyond the floor, of :data:`g2kit.verify.runners.TAPS`.
        position: the first position where.
        error: its largest relative error; None where it is not finite.
        diagonal: for ``scores``, whether those of a token with itself are beyond the floor too.
        threshold: what the error may be.
    """

    layer: int
    tap: str
    position: int
    error: float | None
    diagonal: bool | None
    threshold: float = 0.0


def look_inside(
    ref: Runner, cand: Runner, tokens: Array, layer: int, floor: Floor
) -> Inside | None:
    """The first intermediate of a block that is beyond the floor, the candidate's block on the reference's input.

    Args:
        ref: a runner with taps (torch, jax).
        cand: one with taps and replay.
        tokens: ids ``[length]`` that show the divergence; whole score matrices of them are held in memory.
        layer: the block.
        floor: of the comparison.

    Returns:
        None if no intermediate is beyond the floor.

    Raises:
        UsageError: a runner does not give that.
    """
    return inside(dict(tap_errors(ref, cand, tokens, only=layer))[layer], layer, floor)


def bisect_taps(
    ref: Runner, cand: Runner, probe: ProbeLike | Array, layer: int, floor: Floor
) -> str | None:
    """The name :func:`look_inside` finds, for a probe or ids."""
    tokens = probe if isinstance(probe, np.ndarray) else probe.tokens
    found = look_inside(ref, cand, tokens, layer, floor)
    return None if found is None else found.tap


def shortest_showing(
    result: LockstepResult, probes: Iterable[ProbeLike], at: Divergence
) -> Array | None:
    """Ids that show a divergence in the fewest tokens: a probe cut behind its first position beyond the threshold."""
    kind = "isolated" if at.isolated else "accumulated"
    first = {
        t.probe: where
        for t in result.traces
        if t.layer == at.layer
        and t.kind == kind
        and (where := t.first_above(at.threshold)) is not None
    }
    ends = [(first[p.id], p.id, p) for p in probes if p.id in first]
    if not ends:
        return None
    where, _, best = min(ends, key=lambda e: e[:2])
    return best.tokens[: where + 1]


def scan_taps(ref: Runner, cand: Runner, tokens: Array, floor: Floor) -> list[Inside]:
    """:func:`look_inside` of every block: finer than a block's output, in which a small error of one step drowns.

    Args:
        ref: a runner with taps.
        cand: one with taps and replay.
        tokens: ids ``[length]``; a hundred are enough.
        floor: of the comparison.

    Returns:
        The blocks with an intermediate beyond the floor, in order.
    """
    found = [inside(errors, layer, floor) for layer, errors in tap_errors(ref, cand, tokens)]
    return [f for f in found if f is not None]


def inside(errors: dict[str, Array], layer: int, floor: Floor) -> Inside | None:
    """The first intermediate beyond the floor, from errors as of :func:`.taps.tap_errors`."""
    thresholds = {n: floor.threshold(n, layer) or 0.0 for n in TAPS}
    found = first_tap(errors, thresholds)
    if found is None:
        return None
    tap, position = found
    worst = float(errors[tap].max())
    diagonal = bool((errors[DIAGONAL] > thresholds[tap]).any()) if tap == "scores" else None
    return Inside(
        layer, tap, position, worst if math.isfinite(worst) else None, diagonal, thresholds[tap]
    )
