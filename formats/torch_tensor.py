"""Tensors in a torch archive: views of storages, checked against the records that hold them.

A torch tensor is any strided window on a storage, so one of 1.5 kB can claim 10^11 elements with stride 0, and two can
share bytes. Only dense views are taken: every element of the view is a different element of the storage and they lie
side by side, in whatever order of axes.

Reading rows of a transposed view passes over the whole view, 8 MiB at a time. Checksums: see :mod:`.checked_record`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from . import dtypes
from .arena import empty
from .base import Array, Index, Tensor, iter_row_blocks, leading_rows
from .checked_record import Record
from .errors import (
    DtypeError,
    FormatError,
    LayoutError,
    LimitError,
    MissingTensorError,
    printable,
)
from .torch_globals import Storage, TensorView

_BLOCK = 8 << 20
_BY_NAME = {row.dtype.name: row.dtype for row in dtypes.TABLE}  # NumPy's names are torch's
_UNTYPED = "UntypedStorage"
_RESAVE = "re-save it with torch.save after calling .contiguous() on the tensor."


class TorchTensor(Tensor):
    """A dense view of a storage.

    Args:
        name: key in the state dict.
        dtype: element type.
        shape: as torch says it.
        where: the archive.
        record: holds the storage.
        first: byte of the record where the view begins.
        order: the axes from the slowest to the fastest in the record.
    """

    def __init__(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        where: Path,
        record: Record,
        first: int,
        order: tuple[int, ...],
    ) -> None:
        super().__init__(name, dtype, shape, where, dtype.name)
        self.record = record
        self.first = first
        self.order = order

    def read(self, index: Index = ()) -> Array:
        """See :meth:`.base.Tensor.read`.

        Raises:
            ChecksumError: the record is damaged; raised when the last row is read, or before.
        """
        start, stop, rest = leading_rows(self.shape, index)
        out = empty((stop - start, *self.shape[1:]) if self.shape else (), self.dtype)
        if out.size:
            if self.order == tuple(range(len(self.shape))):
                row = math.prod(self.shape[1:]) * self.dtype.itemsize
                self._read_run(start * row, out)
            else:
                self._read_transposed(start, stop, out)
            if not self.shape or stop == self.shape[0]:
                self.record.verify()
        return np.asarray(out[rest], order="C") if rest else out

    def _read_run(self, offset: int, out: Array) -> None:
        # reshape before view: a 0-d array has no axis to reinterpret as bytes
        self.record.read_into(self.first + offset, out.reshape(-1).view(np.uint8))

    def _read_transposed(self, start: int, stop: int, out: Array) -> None:
        shape = tuple(self.shape[axis] for axis in self.order)
        row = math.prod(shape[1:]) * self.dtype.itemsize
        where = self.order.index(0)  # the axis of the record that ``start`` and ``stop`` count
        target = out.transpose(self.order)
        begin, end = (start, stop) if where == 0 else (0, shape[0])
        wanted = (slice(None),) * where + (slice(start, stop),) if where else ()
        for a, b in iter_row_blocks((end - begin, *shape[1:]), self.dtype.itemsize, _BLOCK):
            block = np.empty((b - a, *shape[1:]), self.dtype)
            self._read_run((begin + a) * row, block)
            target[a:b] = block[wanted]


def open_views(
    views: Mapping[str, TensorView], records: Mapping[str, Record], where: Path
) -> tuple[dict[str, TorchTensor], list[str]]:
    """Lazy tensors for the views of a state dict, and notes on those that share bytes.

    Raises:
        DtypeError: an element type g2kit does not move.
        MissingTensorError: a storage is not in the archive.
        FormatError: one storage is described in two ways, or values are pending an operation.
        LimitError: a view is larger than its storage, or a storage is not as large as its record.
        LayoutError: a view has holes or leaves its storage.
    """
    tensors = {}
    seen: dict[str, Storage] = {}
    for name, view in views.items():
        s = view.storage
        first = seen.setdefault(s.key, s)
        if (first.type, first.count) != (s.type, s.count):
            raise FormatError(
                f"storage {printable(s.key)} is described as {first.count} x {first.type} and as "
                f"{s.count} x {s.type}.",
                where=where,
                tensor=name,
            )
        tensors[name] = _open_view(name, view, records, where)
    return tensors, _shared(tensors)


def _open_view(
    name: str, view: TensorView, records: Mapping[str, Record], where: Path
) -> TorchTensor:
    s = view.storage
    dtype = _dtype(name, view, where)
    if view.lazy:
        raise FormatError(
            f"its values are stored with a pending {view.lazy}.",
            where=where,
            tensor=name,
            fix="re-save it after calling .resolve_conj().resolve_neg() on the tensor.",
        )
    record = records.get(f"data/{s.key}")
    if s.location == "meta" or record is None:
        raise MissingTensorError(
            "it was saved on the meta device, without data."
            if s.location == "meta"
            else f"its record data/{printable(s.key)} is not in the archive.",
            where=where,
            tensor=name,
        )
    size = s.count * (1 if s.type == _UNTYPED else dtype.itemsize)
    if size != record.size:
        raise LimitError(
            f"its storage claims {size} bytes ({s.count} x {s.type}), the record "
            f"data/{printable(s.key)} has {record.size}.",
            where=where,
            tensor=name,
        )
    order = _storage_order(name, view, where)
    _check_bounds(name, view, size // dtype.itemsize, where)
    return TorchTensor(name, dtype, view.shape, where, record, view.offset * dtype.itemsize, order)


def _dtype(name: str, view: TensorView, where: Path) -> np.dtype[Any]:
    kind = view.storage.type
    if (view.dtype is None) == (kind == _UNTYPED):
        raise FormatError(
            f"a view of {kind} says its dtype {'twice' if view.dtype else 'nowhere'}.",
            where=where,
            tensor=name,
        )
    found = _BY_NAME.get(view.dtype) if view.dtype else dtypes.BY_TORCH_STORAGE.get(kind)
    if found is None:
        raise DtypeError(
            f"element type {view.dtype or kind.removesuffix('Storage')} is not supported; "
            f"supported are {', '.join(_BY_NAME)}.",
            where=where,
            tensor=name,
        )
    return found


def _storage_order(name: str, view: TensorView, where: Path) -> tuple[int, ...]:
    """The axes from the slowest to the fastest; the natural order when the view is contiguous."""
    natural = tuple(range(len(view.shape)))
    if 0 in view.shape:
        return natural
    long = [axis for axis in natural if view.shape[axis] > 1]  # others have arbitrary strides
    order = sorted(long, key=lambda axis: -view.strides[axis])
    expected = 1
    for axis in reversed(order):
        if view.strides[axis] < expected:
            raise LimitError(
                f"shape {list(view.shape)} with strides {list(view.strides)} counts elements of "
                "its storage more than once.",
                where=where,
                tensor=name,
                fix=_RESAVE,
            )
        if view.strides[axis] > expected:
            raise LayoutError(
                f"shape {list(view.shape)} with strides {list(view.strides)} leaves out elements "
                "of its storage.",
                where=where,
                tensor=name,
                fix=_RESAVE,
            )
        expected *= view.shape[axis]
    if order == long:
        return natural
    return (*(axis for axis in natural if view.shape[axis] == 1), *order)


def _check_bounds(name: str, view: TensorView, count: int, where: Path) -> None:
    needed = math.prod(view.shape)
    if needed > count:
        raise LimitError(
            f"shape {list(view.shape)} needs {needed} elements, its storage has {count}.",
            where=where,
            tensor=name,
        )
    if needed and view.offset + needed > count:
        raise LayoutError(
            f"it lies at elements {view.offset} to {view.offset + needed} of a storage that has "
            f"{count}.",
            where=where,
            tensor=name,
        )


def _shared(tensors: Mapping[str, TorchTensor]) -> list[str]:
    """One sentence for every tensor that lies in bytes of another one."""
    by_record: dict[str, list[TorchTensor]] = {}
    for tensor in tensors.values():
        if tensor.nbytes:
            by_record.setdefault(tensor.record.name, []).append(tensor)
    notes = []
    for group in by_record.values():
        for a, b in pairwise(
            sorted(group, key=lambda t: t.first)
        ):  # stable: the earlier name first
            if b.first >= a.first + a.nbytes:
                continue
            same = (a.first, a.dtype, a.shape, a.order) == (b.first, b.dtype, b.shape, b.order)
            how = "is the same storage as" if same else "overlaps in storage with"
            notes.append(f"{printable(b.name)} {how} {printable(a.name)}.")
    return notes
