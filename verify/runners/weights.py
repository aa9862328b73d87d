"""Weights for the runners, from any checkpoint: a block at a time, the embedding by rows. Reads; computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...convert.open import Checkpoint, LazyTensor, config_option, open_checkpoint
from ...formats.base import RowTensor
from ...formats.dtypes import BF16
from ...formats.errors import ConfigError, ExtraTensorError
from ...model import canonical
from ...model.config import GemmaConfig
from .base import Table, tile_edges

Array = npt.NDArray[Any]
RUN_GAP = 8  # rows between two wanted ones that are cheaper to read than to skip
HEAD_ROWS = 4096


class Weights:
    """A checkpoint as the runners read it.

    Args:
        checkpoint: a path in any format, or an opened checkpoint (which stays the caller's to close).
        config: as in :func:`g2kit.convert.open_checkpoint`; a GemmaConfig of the same sizes may also replace the
            hyper-parameters of an opened checkpoint.

    Raises:
        G2Error: the checkpoint cannot be opened; or its output head is not the embedding.
    """

    def __init__(
        self, checkpoint: str | Path | Checkpoint, config: str | Path | GemmaConfig | None = None
    ) -> None:
        self._own = not isinstance(checkpoint, Checkpoint)
        if isinstance(checkpoint, Checkpoint):
            self.checkpoint = checkpoint
        else:
            self.checkpoint = open_checkpoint(checkpoint, config=config)
        self.config = self.checkpoint.config
        try:
            if not self._own and config is not None:
                self.config = _same_sizes(config_option(config).config, self.config)
            self._check_head()
        except BaseException:
            self.close()
            raise

    def block(self, layer: int) -> Iterator[tuple[str, Array]]:
        """``(name template, weight)`` of one block, in the dtype stored (float32 where packed), one tensor at a time."""
        for template in canonical.LAYER_AXES[self.config.family]:
            yield template, self.read(template.format(i=layer))

    def read(self, name: str) -> Array:
        """One whole tensor."""
        return self.checkpoint.tensors[name].read()

    def embedding(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the embedding, ``[rows, hidden]``."""
        return self._table.read_rows(start, stop)

    def embedding_tiles(self, edges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int, Array]]:
        """The embedding in tiles; read once where its storage cannot be read by rows."""
        whole = None if self._table.streams_rows else self._table.read()
        for start, stop in edges:
            yield start, stop, self.embedding(start, stop) if whole is None else whole[start:stop]

    def table(self, dtype: str, rows: int | None = None) -> Table:
        """See :meth:`.base.Runner.table`; ``dtype`` is the compute type."""

        def tiles() -> Iterator[tuple[int, int, Array]]:
            for start, stop, tile in self.embedding_tiles(tile_edges(self.config.vocab_size, rows)):
                narrow = dtype == "bfloat16" and tile.dtype != BF16
                yield start, stop, tile.astype(BF16) if narrow else tile

        return tiles

    def embedding_of(self, ids: Array) -> tuple[Array, Array]:
        """Rows of the embedding that ``ids`` need.

        Returns:
            ``(rows, index)``: ``rows[index]`` is the embedding of ``ids``; ``index`` has their shape.
        """
        unique, index = np.unique(ids, return_inverse=True)
        rows = np.empty((len(unique), self.config.hidden_size), self._table.dtype)
        if isinstance(self._table.source, RowTensor) and self._table.streams_rows:
            edges = np.flatnonzero(np.diff(unique) > RUN_GAP) + 1
            runs = [(int(r[0]), int(r[-1]) + 1) for r in np.split(unique, edges)]
            pieces: Iterator[tuple[int, int, Array]] = (
                (a, b, self._table.read_rows(a, b)) for a, b in runs
            )
        else:  # compressed or reordered storage: every single read may decode all of it
            pieces = self._table.blocks()
        for start, stop, piece in pieces:
            lo, hi = np.searchsorted(unique, (start, stop))
            rows[lo:hi] = piece[unique[lo:hi] - start]
        return rows, index.reshape(ids.shape)

    def close(self) -> None:
        """Close the files, if this opened them."""
        if self._own:
            self.checkpoint.close()

    @property
    def _table(self) -> LazyTensor:
        return self.checkpoint.tensors[canonical.EMBED]

    def _check_head(self) -> None:
        """Gemma ties the head to the embedding; a model with another head would be run wrongly."""
        head = self.checkpoint.head
        if head is None:
            return
        for start in range(0, self.config.vocab_size, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self.config.vocab_size)
            a, b = head.read((slice(start, stop),)), self.embedding(start, stop)
            if a.shape != b.shape or not np.array_equal(a, b.astype(a.dtype), equal_nan=True):
                raise ExtraTensorError(
                    f"the output head differs from the embedding in rows {start} to {stop}; Gemma has them tied.",
                    where=head.where,
                    tensor=head.name,
                    fix="this model is no Gemma 1 or 2 as released and cannot be run as one.",
                )


def _same_sizes(config: GemmaConfig, opened: GemmaConfig) -> GemmaConfig:
    """``config``, if the opened tensors have its shapes."""
    a, b = canonical.tensors(config), canonical.tensors(opened)
    if a != b:
        odd = next(n for n in sorted({*a, *b}) if a.get(n) != b.get(n))
        raise ConfigError(
            f"the configuration has other tensors than the opened checkpoint; {odd} is the first.",
            fix="give a configuration of the same family and sizes, or the checkpoint's path instead.",
        )
    return config
