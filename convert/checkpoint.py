"""An opened checkpoint in canonical terms: its config, and lazy tensors that read one weight out of a foreign file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..formats.base import Source, Tensor, iter_row_blocks
from ..formats.dtypes import short
from ..formats.errors import UsageError
from ..model import canonical
from ..model.config import GemmaConfig
from ..model.config_formats import ConfigReading
from . import sidecar
from .bits import unequal
from .layout import Layout, Placement
from .steps import Step

Array = npt.NDArray[Any]
BLOCK_BYTES = 16 << 20


class LazyTensor:
    """One canonical tensor of an opened checkpoint, read on demand. Thread-safe.

    Attributes:
        name: canonical name.
        shape: canonical shape, ``[out_features, in_features]`` for matrices.
        dtype: element type :meth:`read` returns.
        source: the foreign tensor it lies in; ``source.quantized`` is set when it is stored in fewer bits.
    """

    def __init__(
        self, source: Tensor, placement: Placement, step: Step | None, config: GemmaConfig
    ) -> None:
        self.name = placement.canonical
        self.shape = placement.reorder.canonical_shape
        self.source = source
        self.placement = placement
        self.step = step
        self.config = config
        self.dtype = source.dtype
        self.rounded = 0  # stored elements that undoing the step has rounded, over all reads

    @property
    def nbytes(self) -> int:
        """Bytes of the array :meth:`read` returns."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    @property
    def streams_rows(self) -> bool:
        """Whether any run of rows can be read by itself."""
        return self.placement.reorder.is_identity

    def read(self) -> Array:
        """The whole tensor."""
        return self._undo(
            self.placement.reorder.to_canonical(self.source.read(self.placement.index))
        )

    def read_rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of axis 0; reads more than that where storage order differs.

        Raises:
            UsageError: not ``0 <= start <= stop <= shape[0]``.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise UsageError(
                f"rows {start}:{stop} of a tensor with {self.shape[0]} rows.",
                where=self.source.where,
                tensor=self.name,
                fix=f"pass 0 <= start <= stop <= {self.shape[0]}.",
            )
        if not self.streams_rows:
            return self.read()[start:stop]
        _, index, _ = self.placement.rows(start, stop)
        box = self.source.read(index)
        return self._undo(box.reshape(stop - start, *self.shape[1:]))

    def blocks(self, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int, Array]]:
        """``(start, stop, rows)`` covering axis 0; one block when rows cannot be read apart."""
        if not self.streams_rows or self.placement.reorder.foreign_shape != self.shape:
            yield 0, self.shape[0], self.read()
            return
        for start, stop in iter_row_blocks(self.shape, self.source.dtype.itemsize, limit):
            yield start, stop, self.read_rows(start, stop)

    def _undo(self, stored: Array) -> Array:
        if self.step is None:
            return stored.astype(self.dtype, copy=False)
        x = self.step.inverse(stored, self.config, self.dtype)
        again = self.step.forward(x, self.config, stored.dtype)
        self.rounded += unequal(again, stored)
        return x

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, {self.dtype}, {self.shape})"


@dataclass
class Checkpoint:
    """A checkpoint of any format in canonical terms.

    Attributes:
        path: what the user named.
        source: the container.
        layout: the table that fits, expanded.
        reading: the config, where each value came from, and warnings about it.
        tensors: canonical name -> lazy tensor, in forward order.
        sidecars: tokenizer and other files found beside the weights.
        notes: odd but harmless findings.
        gating: where the orientation of Flax gating matrices is known from, empty for other layouts.
    """

    path: Path
    source: Source
    layout: Layout
    reading: ConfigReading
    tensors: dict[str, LazyTensor]
    sidecars: sidecar.Sidecars
    notes: list[str] = field(default_factory=list)
    gating: str = ""

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<Checkpoint {str(self.path)!r}: {c.family}, {c.num_hidden_layers} layers, {c.num_parameters:,} "
            f"parameters, {_dtypes(self.tensors.values())}, {self.layout.variant.describe}>"
        )

    @property
    def config(self) -> GemmaConfig:
        """The model's hyper-parameters."""
        return self.reading.config

    @property
    def quantized(self) -> list[str]:
        """Canonical names stored in fewer bits."""
        return [n for n, t in self.tensors.items() if t.source.quantized is not None]

    @property
    def head(self) -> Tensor | None:
        """A stored output head, which Gemma ties to the embedding; must be compared before it is dropped."""
        return self.source.tensors.get(canonical.LM_HEAD)

    def close(self) -> None:
        """Close the files."""
        self.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _dtypes(tensors: Iterable[LazyTensor]) -> str:
    return "/".join(dict.fromkeys(stored_dtype(t.source) for t in tensors))


def stored_dtype(tensor: Tensor) -> str:
    """One spelling for every container's types: ``bf16``, or the packed kind of quantized weights, ``Q4_K``."""
    return tensor.stored if tensor.quantized is not None else short(tensor.dtype)
