"""Lazy tensors over zarr arrays: which chunks an index touches, where they lie, and how they are read.

Chunks of the usual kinds (little-endian, C order, raw or zstd, gzip, zlib; zarr 3 shards of them) go through
:mod:`.chunk_pool` and are decoded as streams. What else tensorstore can read goes through tensorstore, which decodes a
whole chunk for every read and keeps at most 128 MiB of them.
Absent chunks: tensorstore reads them as zeros without a word, here they are errors unless the metadata says that
the writer left them out on purpose.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any

import numpy as np

from .arena import empty
from .base import Array, Index, Tensor
from .chunk_pool import ChunkPool
from .crc32c import crc32c
from .errors import ChecksumError, FormatError, G2Error, LayoutError, TruncatedError, printable
from .names import listing
from .zarr_decode import MAX_RATIO, Place
from .zarr_meta import ABSENT, ZarrArray
from .zarr_store import Store

_FOREIGN_CACHE = 128 << 20
_CHECKED_INDEX = (
    64 << 10
)  # bytes; longer shard indices go without their checksum, which is slow in Python
_SLACK = 1 << 20


class ZarrTensor(Tensor):
    """One array of a store.

    Args:
        name: the tensor's name.
        array: its metadata.
        store: where its chunks lie.
        prefix: the array's own key, without a slash at its end.
        absent_is_fill: chunks that are not stored hold the fill value, rather than being lost.
        pool: decoded chunks.

    Raises:
        TruncatedError: a chunk is absent or ends early.
        LayoutError: the stored bytes cannot be this much data.
    """

    def __init__(
        self,
        name: str,
        array: ZarrArray,
        store: Store,
        prefix: str,
        *,
        absent_is_fill: bool,
        pool: ChunkPool,
    ) -> None:
        super().__init__(name, array.dtype, array.shape, store.where, array.stored)
        self.array = array
        self.store = store
        self.prefix = prefix
        self.absent_is_fill = absent_is_fill and array.fill is not None
        self.pool = pool
        self.absent: frozenset[str] = frozenset()
        self._indices: dict[str, np.ndarray[Any, Any]] = {}
        self._lock = threading.Lock()
        self._foreign: Any = None
        self._fill: Array | None = None
        if array.keyed:
            self._check_chunks()

    def _check_chunks(self) -> None:
        keys = {f"{self.prefix}/{key}" for key in self.array.value_keys()}
        self.absent = frozenset(keys - self.store.keys.keys())
        if self.absent and not self.absent_is_fill:
            raise self._fail(
                TruncatedError,
                f"{len(self.absent)} of {len(keys)} chunks are missing: "
                f"{listing(sorted(self.absent))}; they would read as zeros",
            )
        raw = self.array.codec == "raw" and not self.array.shards and not self.array.foreign
        size = self.array.chunk_bytes if raw else None
        present = sorted(keys - self.absent)
        self.store.check_ends(dict.fromkeys(present, size), self.name)
        self._check_plausible(present)

    def _check_plausible(self, present: list[str]) -> None:
        """No decompressor makes this much out of so few bytes: refuse before anything is allocated."""
        ratio = MAX_RATIO.get(self.array.codec)
        if ratio is None:
            return
        sizes = [self.store.keys[key] for key in present]
        stored = self.store.total if None in sizes else sum(n for n in sizes if n is not None)
        needed = len(present) * math.prod(self.array.value_shape) * self.dtype.itemsize
        if not self.absent_is_fill and needed > stored * ratio + _SLACK:
            raise self._fail(
                LayoutError,
                f"{needed} bytes cannot come out of {stored} bytes of {self.array.codec} data",
            )

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`. Memory is the result's and what the pool keeps."""
        box, shape = normalise(index, self.shape)
        if self.array.foreign:
            return self._read_foreign(box).reshape(shape)
        out = empty([b - a for a, b in box], self.dtype)
        if out.size:
            for place in itertools.product(*self._touched(box)):
                self._read_chunk(place, box, out)
        return out.reshape(shape)

    def _touched(self, box: list[tuple[int, int]]) -> list[range]:
        """Chunk numbers per axis."""
        chunk = self.array.chunk
        return [range(a // c, -(-b // c)) for (a, b), c in zip(box, chunk, strict=True)]

    def _read_chunk(self, place: tuple[int, ...], box: list[tuple[int, int]], out: Array) -> None:
        chunk = self.array.chunk
        first = [i * c for i, c in zip(place, chunk, strict=True)]
        lo = [max(a, f) for (a, _), f in zip(box, first, strict=True)]
        hi = [min(b, f + c) for (_, b), f, c in zip(box, first, chunk, strict=True)]
        here: tuple[Any, ...] = tuple(
            slice(a - start, b - start) for a, b, (start, _) in zip(lo, hi, box, strict=True)
        )
        where = self._locate(place)
        target = out[(*here, ...)]  # the dots keep a view of a 0-d array
        if where is None:
            target[...] = self._fill_value()
            return
        # a box that is strided in the result is decoded beside it
        whole = target if target.flags.c_contiguous else np.empty(target.shape, target.dtype)
        inside = [(a - f, b - f) for a, b, f in zip(lo, hi, first, strict=True)]
        key = (self.prefix, place)
        flat = whole.reshape(-1).view(np.uint8)
        self.pool.read(key, where, chunk, self.dtype.itemsize, inside, flat)
        if whole is not target:
            target[...] = whole

    def _locate(self, place: tuple[int, ...]) -> Place | None:
        """Where a chunk's bytes lie, or None when it is not stored."""
        shards = self.array.shards
        if shards is None:
            key = f"{self.prefix}/{self.array.value_key(place)}"
            return None if key in self.absent else self._place(key, 0, None)
        outer = [i // n for i, n in zip(place, shards.per_shard, strict=True)]
        inner = tuple(i % n for i, n in zip(place, shards.per_shard, strict=True))
        key = f"{self.prefix}/{self.array.value_key(outer)}"
        if key in self.absent:
            return None
        offset, size = (int(n) for n in self._shard_index(key)[inner])
        if offset == ABSENT and size == ABSENT:
            if self.absent_is_fill:
                return None
            raise self._fail(
                TruncatedError,
                f"{printable(key)} does not hold chunk {inner}; it would read as zeros",
            )
        self._check_inner(key, offset, size)
        return self._place(key, offset, offset + size)

    def _check_inner(self, key: str, offset: int, size: int) -> None:
        raw = self.array.codec == "raw" and size != self.array.chunk_bytes
        if raw or offset + size >= 2**62 or size == 0:
            raise self._fail(
                FormatError,
                f"{printable(key)}: the shard's index places a chunk of {size} bytes at {offset}",
            )

    def _place(self, key: str, start: int, stop: int | None) -> Place:
        def fail(kind: type[G2Error], what: str) -> G2Error:
            return self._fail(kind, f"{printable(key)}: {what}")

        nbytes = self.array.chunk_bytes
        return Place(
            self.array.codec, lambda: self.store.open(key, self.name), start, stop, nbytes, fail
        )

    def _shard_index(self, key: str) -> np.ndarray[Any, Any]:
        """Offset and length of every chunk in a shard; shape ``(*per_shard, 2)``."""
        with self._lock:
            if key not in self._indices:
                self._indices[key] = self._read_index(key)
            return self._indices[key]

    def _read_index(self, key: str) -> np.ndarray[Any, Any]:
        shards = self.array.shards
        assert shards is not None
        value = self.store.open(key, self.name)
        try:
            if shards.at_end:
                raw = value.tail(shards.index_bytes)
            else:
                head = np.empty(shards.index_bytes, np.uint8)
                value.read_into(0, head)
                raw = head.tobytes()
        finally:
            value.close()
        body = raw[: 16 * math.prod(shards.per_shard)]
        if shards.checksummed and len(body) <= _CHECKED_INDEX:
            stored, computed = int.from_bytes(raw[-4:], "little"), crc32c(body)
            if stored != computed:
                raise self._fail(
                    ChecksumError,
                    f"{printable(key)}: the shard's index has CRC-32C {computed:08x}, "
                    f"{stored:08x} is stored",
                )
        return np.frombuffer(body, "<u8").reshape(*shards.per_shard, 2)

    def _fill_value(self) -> Array:
        """What absent chunks hold; tensorstore interprets the metadata's notation."""
        with self._lock:
            if self._fill is None:
                store = self._tensorstore()
                fill = store.fill_value
                if (
                    fill is None
                ):  # pragma: no cover - tensorstore knows it whenever the metadata does
                    raise self._fail(FormatError, "chunks are absent and the fill value is unknown")
                self._fill = np.asarray(fill).astype(self.dtype)
        return self._fill

    def _read_foreign(self, box: list[tuple[int, int]]) -> Array:
        with self._lock:
            store = self._tensorstore()
        part = store[tuple(slice(a, b) for a, b in box)] if box else store
        try:
            return np.ascontiguousarray(part.read().result()).astype(self.dtype, copy=False)
        except Exception as e:  # tensorstore's errors have no common base
            raise self._fail(FormatError, f"tensorstore cannot read it: {e}") from e

    def _tensorstore(self) -> Any:
        import tensorstore as ts

        if self._foreign is None:
            spec = {
                "driver": {2: "zarr", 3: "zarr3"}[self.array.version],
                "kvstore": self.store.kvstore(f"{self.prefix}/"),
            }
            context = ts.Context({"cache_pool": {"total_bytes_limit": _FOREIGN_CACHE}})
            try:
                self._foreign = ts.open(spec, open=True, read=True, context=context).result()
            except Exception as e:
                raise self._fail(FormatError, f"tensorstore cannot open it: {e}") from e
        return self._foreign

    def _fail(self, kind: type[G2Error], what: str) -> G2Error:
        damaged = issubclass(kind, (TruncatedError, ChecksumError))
        fix = "download or copy the checkpoint again." if damaged else None
        return kind(f"{what}.", where=self.where, tensor=self.name, fix=fix)


def normalise(
    index: Index, shape: tuple[int, ...]
) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """``(start, stop)`` per axis of an index, and the shape of the result.

    Raises:
        IndexError: out of range, or more indices than axes.
        ValueError: a step other than 1.
    """
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} indices for {len(shape)} axes")
    box, result = [(0, n) for n in shape], list(shape)
    dropped = []
    for axis, part in enumerate(index):
        n = shape[axis]
        if isinstance(part, slice):
            start, stop, step = part.indices(n)
            if step != 1:
                raise ValueError(f"step must be 1, got {part}")
            box[axis] = (start, max(start, stop))
            result[axis] = max(start, stop) - start
        elif 0 <= part < n:
            box[axis] = (part, part + 1)
            dropped.append(axis)
        else:
            raise IndexError(f"index {part} out of range for axis {axis} of size {n}")
    return box, tuple(n for axis, n in enumerate(result) if axis not in dropped)
