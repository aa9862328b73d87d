"""Lays out an HDF5 file to the byte without its data: h5py writes it into memory that keeps only what is written.

Datasets are contiguous, allocated early and never filled, so a 50 GB model's skeleton takes the memory of its
headers. Nothing in the bytes depends on time, on the machine or on what the process did before; they may differ
between releases of the HDF5 library. Format version: the earliest, which Keras writes too (superblock 0).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .base import Chunk, FilePlan, Slot
from .dtypes import BF16
from .errors import DependencyError

_PAGE = 4096


class SparseBuffer(io.RawIOBase):
    """A file in memory that keeps the pages written to; the others read as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.pages: dict[int, bytearray] = {}
        self.size = 0
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to ``offset`` from the start, the position or the end."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def truncate(self, size: int | None = None) -> int:
        """Set the size; bytes beyond it are gone."""
        self.size = self._at if size is None else size
        for page in [p for p in self.pages if p * _PAGE >= self.size]:
            del self.pages[page]
        if (tail := self.pages.get(self.size // _PAGE)) is not None:
            tail[self.size % _PAGE :] = bytes(_PAGE - self.size % _PAGE)
        return self.size

    def write(self, data: Any) -> int:
        """Write at the position."""
        data = memoryview(data).cast("B")
        done = 0
        while done < len(data):
            page, inside = divmod(self._at + done, _PAGE)
            n = min(_PAGE - inside, len(data) - done)
            self.pages.setdefault(page, bytearray(_PAGE))[inside : inside + n] = data[
                done : done + n
            ]
            done += n
        self._at += done
        if done:
            self.size = max(self.size, self._at)
        return done

    def readinto(self, out: Any) -> int:
        """Read from the position."""
        out = memoryview(out).cast("B")
        n = max(0, min(len(out), self.size - self._at))
        out[:n] = self.read_at(self._at, n)
        self._at += n
        return n

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``."""
        first, last = offset // _PAGE, -(-(offset + size) // _PAGE)
        whole = b"".join(bytes(self.pages.get(p, bytes(_PAGE))) for p in range(first, last))
        return whole[offset - first * _PAGE :][:size]

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True


def file_plan(
    name: str, slots: Sequence[Slot], groups: Mapping[str, Mapping[str, str]]
) -> tuple[FilePlan, dict[str, tuple[Chunk, ...]]]:
    """One file with a dataset for every slot.

    Args:
        name: of the file.
        slots: names are paths in the file; payloads are laid out in this order.
        groups: path -> text attributes, of groups that need attributes or would be empty.

    Returns:
        The file (``fixed`` is all that is not zero and not payload) and where each slot goes.

    Raises:
        DependencyError: h5py is not installed.
    """
    buffer = SparseBuffer()
    offsets = _write(buffer, slots, groups)
    extents = sorted((offsets[s.name], s.nbytes) for s in slots if s.nbytes)
    fixed, at = [], 0
    for offset, size in [*extents, (buffer.size, 0)]:
        fixed += _runs(buffer, at, offset)
        at = offset + size
    chunks: dict[str, tuple[Chunk, ...]] = {
        s.name: (Chunk((0,) * len(s.shape), s.shape, name, offsets[s.name]),) for s in slots
    }
    return FilePlan(name, buffer.size, tuple(fixed)), chunks


def _runs(buffer: SparseBuffer, start: int, stop: int) -> list[tuple[int, bytes]]:
    """What lies between two payloads; long stretches of zeros are left out."""
    runs: list[tuple[int, bytes]] = []
    while start < stop:
        n = min(_PAGE - start % _PAGE, stop - start)
        data = buffer.read_at(start, n)
        if any(data):
            if runs and runs[-1][0] + len(runs[-1][1]) == start:
                runs[-1] = (runs[-1][0], runs[-1][1] + data)
            else:
                runs.append((start, data))
        start += n
    return runs


def _write(
    buffer: SparseBuffer, slots: Sequence[Slot], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, int]:
    """Write everything but the payloads; byte offset of every slot's."""
    try:
        import h5py
    except ImportError as e:
        raise DependencyError("writing Keras .h5 files needs h5py.", fix="pip install h5py") from e
    from h5py import h5d, h5p, h5s

    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.CONTIGUOUS)
    plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    offsets: dict[str, int] = {}
    with h5py.File(buffer, "w", libver=("earliest", "latest")) as f:
        for path, attributes in groups.items():
            group = f.require_group(path)
            for key, text in attributes.items():
                group.attrs[key] = text
        for slot in slots:
            parent, _, leaf = slot.name.rpartition("/")
            space = h5s.create_simple(slot.shape) if slot.shape else h5s.create(h5s.SCALAR)
            home = f.require_group(parent) if parent else f
            made = h5d.create(home.id, leaf.encode(), _type(h5py, slot), space, plist)
            if slot.dtype == BF16:
                h5py.Dataset(made).attrs["dtype"] = "bfloat16"
            offsets[slot.name] = made.get_offset() or 0  # None when it has no bytes
    return offsets


def _type(h5py: Any, slot: Slot) -> Any:
    """The stored type; Keras keeps bfloat16 as what h5py makes of an unknown two-byte type."""
    return h5py.h5t.py_create(np.dtype("V2") if slot.dtype == BF16 else slot.dtype, logical=True)
