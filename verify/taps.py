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
        ours: dict[str, Array] = {}
        found: dict[str, Array] = {}

        def keep(name: str, value: Array, kept: dict[str, Array] = ours) -> None:
            kept[name] = _by_position(name, value)

        def compare(
            name: str, value: Array, kept: dict[str, Array] = ours, out: dict[str, Array] = found
        ) -> None:
            one, two = kept.pop(name), _by_position(name, value)
            out[name] = position_errors(one, two)
            if name == "scores":
                out[DIAGONAL] = position_errors(_diagonal(one), _diagonal(two))

        before, x = x, ref.advance(keep)
        cand.advance()
        cand.replay(before, compare)
        yield layer, found


def _by_position(name: str, value: Array) -> Array:
    """``[length, …]`` of a batch of one; scores ``[1, heads, q, k]`` by query."""
    return np.moveaxis(value[0], 1, 0) if name == "scores" else value[0]


def _diagonal(scores: Array) -> Array:
    """``[q, heads, k]`` -> ``[q, heads]`` where q is k."""
    at = np.arange(len(scores))
    return scores[at, :, at]


def first_tap(errors: dict[str, Array], thresholds: dict[str, float]) -> tuple[str, int] | None:
    """The first intermediate in forward order whose error is above its threshold, and the first position where."""
    for name in TAPS:
        bad = ~(errors[name] <= thresholds[name])  # NaN is bad too
        if bad.any():
            return name, int(np.flatnonzero(bad)[0])
    return None
