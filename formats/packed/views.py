"""Lazy tensors computed from stored ones: a packed layout opens as views of codes, scales and zeros.

Nothing is read until rows are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ..base import Array, Index, Tensor, leading_rows

_SMALL = 4 << 20  # bytes; scales and zeros are smaller
_KEPT = {
    False: 2,
    True: 16,
}  # whether small -> matrices kept: one per thread that reads tensors, and its small ones


class RowView(Tensor):
    """A tensor whose rows are computed when read.

    Args:
        name: for messages.
        dtype: of the rows.
        shape: of the whole.
        where: file the stored tensor is in.
        stored: what the container calls it.
        rows: ``(start, stop)`` -> rows ``start:stop`` of axis 0.
    """

    def __init__(
        self,
        name: str,
        dtype: np.dtype,
        shape: Sequence[int],
        where: Path,
        stored: str,
        rows: Callable[[int, int], Array],
    ) -> None:
        super().__init__(name, dtype, shape, where, stored)
        self._rows = rows

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`."""
        start, stop, rest = leading_rows(self.shape, index)
        out = self._rows(start, stop)
        return np.asarray(out[rest] if rest else out, order="C")


class Columns:
    """Columns of a stored matrix as rows. Thread-safe.

    A row-major file gives columns only with everything between them, so the whole matrix is read and kept transposed;
    the two matrices used last stay in memory, and some small ones.

    Args:
        tensor: ``[n, columns]``.
    """

    _lock = threading.Lock()
    _kept: ClassVar[dict[bool, OrderedDict[int, tuple[Columns, Array]]]] = {
        small: OrderedDict() for small in _KEPT
    }

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._reading = threading.Lock()

    def read(self, start: int, stop: int) -> Array:
        """Columns ``start:stop`` as ``[stop - start, n]``; not to be changed."""
        return self._whole()[start:stop]

    def _whole(self) -> Array:
        small = self.tensor.nbytes <= _SMALL
        kept = self._kept[small]
        with self._reading:
            with self._lock:
                if id(self) in kept:
                    kept.move_to_end(id(self))
                    return kept[id(self)][1]
            whole = np.ascontiguousarray(self.tensor.read().T)
            with self._lock:
                kept[id(self)] = self, whole
                while len(kept) > _KEPT[small]:
                    kept.popitem(last=False)
            return whole


def copied(columns: Columns) -> Callable[[int, int], Array]:
    """Columns as rows that may be changed."""
    return lambda start, stop: columns.read(start, stop).copy()
