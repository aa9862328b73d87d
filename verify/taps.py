"""Inside one block: which intermediate parts first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..formats.errors import UsageError
from .block_errors import position_errors
from .runners.base import TAPS, Runner

Array = np.ndarray[Any, np.dtype[Any]]
DIAGONAL = (
    "diagonal"  # scores of a token with itself: RoPE leaves them alone, another scale does not
)


def tap_errors(
    ref: Runner, cand: Runner, tokens: Array, only: int | None = None
) -> Iterator[tuple[int, dict[str, Array]]]:
    """``(layer, tap or DIAGONAL -> relative error of every position)``, the candidate's blocks on the reference's inputs.

    Args:
        ref: gives ``taps``.
        cand: gives ``taps`` and ``replay``.
        tokens: one sequence of ids ``[length]``.
        only: look into this block and stop behind it; default all.

    Raises:
        UsageError: a runner does not give that.
    """
    if "taps" not in ref.gives or not {"taps", "replay"} <= cand.gives:
        raise UsageError("looking into a block needs two runners with taps, such as torch and jax.")
    x = ref.start(tokens)
    cand.start(tokens)
    assert x is not None
    for layer in range(ref.config.num_hidden_layers if only is None else only + 1):
        if only is not None and layer < only:
            x = ref.advance()
            cand.advance()
            continue
        pair = TapPair()
        before, x = x, ref.advance(pair.keep)
        cand.advance()
        cand.replay(before, pair.compare)
        yield layer, pair.errors


class TapPair:
    """Intermediates of one block, the reference's first, then the candidate's.

    Attributes:
        errors: tap or :data:`DIAGONAL` -> relative error of every position, as far as compared.

    Args:
        start: position of the first query.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._kept: dict[str, Array] = {}
        self.errors: dict[str, Array] = {}

    def keep(self, name: str, value: Array) -> None:
        """A tap of the reference."""
        self._kept[name] = _by_position(name, value)

    def compare(self, name: str, value: Array) -> None:
        """The same of the candidate."""
        one, two = self._kept.pop(name), _by_position(name, value)
        self.errors[name] = position_errors(one, two)
        if name == "scores":
            self.errors[DIAGONAL] = position_errors(
                _diagonal(one, self._start), _diagonal(two, self._start)
            )


def _by_position(name: str, value: Array) -> Array:
    """``[length, …]`` of a batch of one; scores ``[1, heads, q, k]`` by query."""
    return np.moveaxis(value[0], 1, 0) if name == "scores" else value[0]


def _diagonal(scores: Array, start: int) -> Array:
    """``[q, heads, k]`` -> ``[q, heads]`` where k is q's position, ``start`` that of the first."""
    at = np.arange(len(scores))
    return scores[at, :, at + start]


def first_tap(errors: dict[str, Array], thresholds: dict[str, float]) -> tuple[str, int] | None:
    """The first intermediate in forward order whose error is above its threshold, and the first position where."""
    for name in TAPS:
        bad = ~(errors[name] <= thresholds[name])  # NaN is bad too
        if bad.any():
            return name, int(np.flatnonzero(bad)[0])
    return None
