"""An opened checkpoint with some tensors or hyper-parameters changed, in memory only and read on demand.

For functions that must stay the same (floors) and faults that must be noticed (mutants). The files stay the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..convert.open import BLOCK_BYTES, Checkpoint, LazyTensor
from ..formats.base import iter_row_blocks
from ..model import canonical
from ..model.config import GemmaConfig

Array = np.ndarray[Any, np.dtype[Any]]
Rows = Callable[[int, int], Array]


class ChangedTensor(LazyTensor):
    """A tensor computed from others when it is read.

    Args:
        base: what it stands for: name, shape and dtype are its.
        whole: the changed array ``shape``, of any float dtype.
        rows: rows ``start:stop`` of it, where those can be computed alone.
    """

    def __init__(
        self, base: LazyTensor, whole: Callable[[], Array], rows: Rows | None = None
    ) -> None:
        super().__init__(base.source, base.placement, None, base.config)
        self.name, self.shape, self.dtype = base.name, base.shape, base.dtype
        self._whole, self._rows = whole, rows

    @property
    def streams_rows(self) -> bool:
        """See :class:`LazyTensor`."""
        return self._rows is not None

    def read(self) -> Array:
        """See :class:`LazyTensor`."""
        return np.ascontiguousarray(self._whole().astype(self.dtype, copy=False))

    def read_rows(self, start: int, stop: int) -> Array:
        """See :class:`LazyTensor`."""
        if self._rows is None:
            return self.read()[start:stop]
        return np.ascontiguousarray(self._rows(start, stop).astype(self.dtype, copy=False))

    def blocks(self, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Array]]:
        """See :class:`LazyTensor`."""
        if self._rows is None:
            yield 0, self.shape[0], self.read()
            return
        for start, stop in iter_row_blocks(self.shape, self.dtype.itemsize, limit):
            yield start, stop, self.read_rows(start, stop)


def changed(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor] | None = None,
    config: GemmaConfig | None = None,
) -> Checkpoint:
    """The checkpoint with these tensors and this config instead. Closing either closes both."""
    reading = checkpoint.reading if config is None else replace(checkpoint.reading, config=config)
    known = {**checkpoint.tensors, **(tensors or {})}
    source = checkpoint.source
    if canonical.EMBED in (
        tensors or {}
    ):  # a stored head is a copy of the embedding: it goes along
        kept = {n: t for n, t in source.tensors.items() if n != canonical.LM_HEAD}
        source = replace(source, tensors=kept)
    return replace(
        checkpoint,
        source=source,
        tensors={n: known[n] for n in checkpoint.tensors},
        reading=reading,
        notes=list(checkpoint.notes),
    )


def edited(base: LazyTensor, edit: Callable[[Array], Array]) -> ChangedTensor:
    """``base`` with ``edit`` applied to a copy of it, in its dtype; norms and matrices, not the embedding."""
    return ChangedTensor(base, lambda: edit(np.array(base.read())))


def renamed(base: LazyTensor, other: LazyTensor) -> ChangedTensor:
    """``other``'s values under ``base``'s name."""
    return ChangedTensor(base, other.read, other.read_rows if other.streams_rows else None)


def shifted_rows(base: LazyTensor) -> ChangedTensor:
    """Every row one too low, the last one first."""
    count = base.shape[0]

    def rows(start: int, stop: int) -> Array:
        if start > 0:
            return base.read_rows(start - 1, stop - 1)
        parts = [base.read_rows(count - 1, count), base.read_rows(0, max(stop - 1, 0))]
        return np.concatenate(parts)[: stop - start]

    return ChangedTensor(
        base, lambda: np.roll(base.read(), 1, axis=0), rows if base.streams_rows else None
    )
