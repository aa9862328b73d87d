"""One option per item, least total loss within a budget: the multiple-choice knapsack, solved exactly.

Partial solutions are built item by item. One is dropped when another is neither larger nor worse, and when even the
relaxed problem for the remaining items (Sinha and Zoltners, 1979: steps along every item's lower convex hull, best first)
cannot bring it below a solution that is known already. What is left is the optimum; with hundreds of items a
few thousand partial solutions live at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_SLACK = 1e-9  # relative: sums in another order differ in their last digits


@dataclass(frozen=True, eq=False)
class Item:
    """What is decided at once.

    Attributes:
        sizes: of every option.
        losses: as many.
    """

    sizes: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True, eq=False)
class _Options:
    """An item's options that another one does not beat, by growing size and falling loss."""

    index: Longs
    sizes: Longs
    losses: Floats

    def steps(self) -> list[tuple[float, int, float]]:
        """Along the lower convex hull: loss saved per size, size, loss saved."""
        hull: list[int] = []
        for k in range(len(self.sizes)):
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], k):
                hull.pop()
            hull.append(k)
        return [
            (self._slope(a, b), int(self.sizes[b] - self.sizes[a]), self.losses[a] - self.losses[b])
            for a, b in pairwise(hull)
        ]

    def _slope(self, a: int, b: int) -> float:
        return float((self.losses[a] - self.losses[b]) / (self.sizes[b] - self.sizes[a]))


def _undominated(item: Item) -> _Options:
    sizes, losses = np.array(item.sizes, np.int64), np.array(item.losses, np.float64)
    order = np.lexsort((losses, sizes))
    keep = order[_falling(losses[order])]
    return _Options(keep.astype(np.int64), sizes[keep], losses[keep])


def _falling(losses: Floats) -> npt.NDArray[np.bool_]:
    """Where a value is below all before it."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
    return np.asarray(losses < before)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """Least loss of some items within any budget, where options may be mixed: a lower bound."""

    sizes: Floats
    losses: Floats

    @classmethod
    def of(cls, options: Sequence[_Options]) -> _Relaxed:
        """The bound for these items together."""
        steps = sorted((s for o in options for s in o.steps()), key=lambda s: -s[0])
        size, loss = sum(int(o.sizes[0]) for o in options), sum(float(o.losses[0]) for o in options)
        grown = np.cumsum([size, *(s[1] for s in steps)], dtype=np.float64)
        return cls(grown, np.cumsum([loss, *(-s[2] for s in steps)], dtype=np.float64))

    def within(self, budget: Longs) -> Floats:
        """Bounds; for budgets that hold the smallest options."""
        return np.interp(budget, self.sizes, self.losses)


def _greedy(options: Sequence[_Options], budget: int) -> float:
    """Loss of a good solution: from the smallest options upwards, the best saving per size that fits."""
    at = [0] * len(options)
    left = budget - sum(int(o.sizes[0]) for o in options)
    while True:
        best, move = 0.0, None
        for i, o in enumerate(options):
            here = at[i]
            grow = o.sizes[here + 1 :] - o.sizes[here]
            fits = int(np.searchsorted(grow, left, side="right"))
            if not fits:
                continue
            gain = (o.losses[here] - o.losses[here + 1 : here + 1 + fits]) / grow[:fits]
            k = int(gain.argmax())
            if gain[k] > best:
                best, move = float(gain[k]), (i, here + 1 + k)
        if move is None:
            return float(sum(o.losses[k] for o, k in zip(options, at, strict=True)))
        i, k = move
        left -= int(options[i].sizes[k] - options[i].sizes[at[i]])
        at[i] = k


def solve(items: Sequence[Item], budget: int) -> list[int] | None:
    """The options of least total loss whose sizes sum to at most ``budget``.

    Args:
        items: each with at least one option; sizes not negative, losses finite.
        budget: most total size.

    Returns:
        An option's index per item, or None where even the smallest do not fit. Of equally good solutions the smallest.
    """
    options = [_undominated(i) for i in items]
    rest = [0] * (len(options) + 1)
    for i in reversed(range(len(options))):
        rest[i] = rest[i + 1] + int(options[i].sizes[0])
    if rest[0] > budget:
        return None
    known = _greedy(options, budget)
    known += _SLACK * max(abs(known), 1e-300)
    sizes: Longs = np.zeros(1, np.int64)
    losses: Floats = np.zeros(1)
    trail: list[tuple[Any, Any]] = []
    for i, o in enumerate(options):
        count = len(o.sizes)
        grown = (sizes[:, None] + o.sizes).ravel()
        lost = (losses[:, None] + o.losses).ravel()
        live = np.flatnonzero(grown + rest[i + 1] <= budget)
        bound = _Relaxed.of(options[i + 1 :]).within(budget - grown[live])
        live = live[lost[live] + bound <= known]
        live = live[np.lexsort((lost[live], grown[live]))]
        live = live[_falling(lost[live])]
        trail.append((live // count, o.index[live % count]))
        sizes, losses = grown[live], lost[live]
    best = int(losses.argmin())
    chosen: list[int] = []
    for before, option in reversed(trail):
        chosen.append(int(option[best]))
        best = int(before[best])
    return chosen[::-1]
