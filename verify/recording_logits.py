"""What a recording keeps of logits, from tiles over the vocabulary, so that positions x vocabulary is never in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
_LOW = 0xFFFFFFFF
_CHUNK = 1 << 22  # logits worked on at a time


@dataclass(frozen=True)
class Kept:
    """Of some positions.

    Attributes:
        lse: log-sum-exp ``[positions]`` float64.
        ids: the largest logits' tokens ``[positions, k]`` int32, by descending logit, then ascending id.
        logits: those logits ``[positions, k]`` float32.
        rows: all logits of the chosen positions ``[chosen, vocab]``.
        next_logit: the target's logit ``[positions]`` float32; 0 without target.
        wanted: logits of the tokens asked for ``[positions, any]`` float64.
        finite: no NaN and no infinity ``[positions]``.
    """

    lse: Array
    ids: Array
    logits: Array
    rows: Array
    next_logit: Array
    wanted: Array
    finite: Array


class LogitKeeper:
    """Takes tiles in the vocabulary's order.

    Args:
        positions: rows of every tile.
        vocab: columns of all tiles together.
        k: how many of the largest to keep.
        chosen: positions to keep whole.
        targets: next token's id per position, -1 for none.
        dtype: of the logits.
        wanted: further tokens whose logits to keep ``[positions, any]``.
    """

    def __init__(
        self,
        positions: int,
        vocab: int,
        k: int,
        chosen: Array,
        targets: Array,
        dtype: np.dtype,
        wanted: Array | None = None,
    ) -> None:
        self._wanted = np.zeros((positions, 0), np.int64) if wanted is None else wanted
        self._found = np.full(self._wanted.shape, np.nan)
        self._k, self._chosen, self._targets = k, chosen, targets
        self._lse = torch.full((positions,), -torch.inf, dtype=torch.float64)
        self._keys: list[torch.Tensor] = []
        self._rows = np.empty((len(chosen), vocab), dtype)
        self._next = np.zeros(positions, np.float32)
        self._finite = np.ones(positions, bool)
        self._step = 0

    def add(self, start: int, stop: int, tile: Array) -> None:
        """Logits ``[positions, stop - start]`` of tokens ``start:stop``."""
        self._rows[:, start:stop] = tile[self._chosen]
        here = np.flatnonzero((self._targets >= start) & (self._targets < stop))
        self._next[here] = tile[here, self._targets[here] - start]
        if self._wanted.size:
            asked = (self._wanted >= start) & (self._wanted < stop)
            at = np.clip(self._wanted - start, 0, stop - start - 1)
            self._found[asked] = np.take_along_axis(tile, at, 1)[asked]
        self._step = self._step or max(1, _CHUNK // tile.shape[1])
        for index, first in enumerate(range(0, len(tile), self._step)):
            part = slice(first, first + self._step)
            x = torch.from_numpy(np.ascontiguousarray(tile[part]))
            self._finite[part] &= torch.isfinite(x).all(1).numpy()
            found = torch.logsumexp(x.double(), 1)
            self._lse[part] = torch.logaddexp(self._lse[part], found)
            self._take_largest(index, x, start, stop)

    def _take_largest(self, index: int, x: torch.Tensor, start: int, stop: int) -> None:
        """Logit and id make one whole number that orders as (logit, -id), so equal logits leave no choice."""
        x = x.float() + 0.0  # -0 equals 0
        if index == len(self._keys):
            first = _keys(x, torch.arange(start, stop))
            self._keys.append(torch.topk(first, min(self._k, stop - start), dim=1).values)
            return
        kept = self._keys[index]
        count = stop - start
        if (
            kept.shape[1] == self._k
        ):  # an equal logit of a later token loses, so only larger ones count
            above = x > _restored(kept[:, -1:] >> 32)
            count = int(above.sum(1).max())
        if count:
            found = torch.topk(x, count, dim=1)
            more = torch.cat([kept, _keys(found.values, found.indices + start)], 1)
            self._keys[index] = torch.topk(more, min(self._k, more.shape[1]), dim=1).values

    def finish(self) -> Kept:
        """Everything, once all tiles came."""
        keys = torch.cat(self._keys)
        return Kept(
            lse=self._lse.numpy(),
            ids=(_LOW - (keys & _LOW)).to(torch.int32).numpy(),
            logits=_restored(keys >> 32).numpy(),
            rows=self._rows,
            next_logit=self._next,
            wanted=self._found,
            finite=self._finite,
        )


def _keys(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return _ordered(logits) << 32 | (_LOW - ids)


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """float32 as whole numbers of the same order."""
    bits = x.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def _restored(ordered: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_ordered`."""
    bits = ordered.to(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
