"""Decoded chunks between reads, in bounded memory and from any thread.

An official release stores a whole tensor as one compressed chunk, which can only be decoded from its start, while readers
want its halves (gate, up), its rows or its layers. So every chunk in use is in one of these states:

- a *cursor*: a decoder that stopped where the last read ended. Reads in order continue it and keep nothing. A read
  that comes a little early (two threads) keeps the skipped part in memory until it is asked for.
  One far part (the last rows, before all others) is decoded to and kept by itself.
- *loaded*, after a read that goes back or needs every n-th run (layers stacked along axis 1): decoded once, into memory if
  small, else into an unlinked temporary file. Memory is bounded for all chunks together: the chunk used
  longest ago moves to a temporary file too.

A chunk whose every byte has been handed out is forgotten.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .boxes import Box, copy_box, one_run
from .errors import ResourceError
from .scratch import Scratch
from .zarr_decode import DECODERS, U8, Decoder, Place

_COPY_BLOCK = 4 << 20
_PEEKS = 2


@dataclass(frozen=True)
class PoolLimits:
    """How much one opened checkpoint may keep.

    Attributes:
        memory: bytes of decoded data in memory, all chunks together.
        chunk: largest chunk that is loaded into memory rather than a temporary file.
        gap: most bytes kept because a later part of a chunk was asked for first.
        cursors: decoders open at once (each about 2 MB).
    """

    memory: int = 256 << 20
    chunk: int = 128 << 20
    gap: int = 64 << 20
    cursors: int = 64


class _Entry:
    """One chunk's state; everything but ``dead`` belongs to the holder of ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.decoder: Decoder | None = None
        self.lost = False  # the cursor was closed to make room
        self.segments: list[_Segment] = []
        self.data: U8 | None = None
        self.spill: Scratch | None = None
        self.peeks = 0
        self.served = 0
        self.held = 0  # bytes reserved in the pool
        self.dead = False

    @property
    def position(self) -> int:
        return self.decoder.position if self.decoder else 0


@dataclass
class _Segment:
    """Decoded bytes that nobody asked for yet, or that are likely to be asked for again."""

    start: int
    data: U8
    left: int  # bytes not asked for yet
    stays: bool = False


class ChunkPool:
    """All chunks in use of one opened checkpoint.

    Args:
        limits: see :class:`PoolLimits`.
        scratch: directory for temporary files, asked for each time; None means the system's.
    """

    def __init__(self, limits: PoolLimits, scratch: Callable[[], Path | None]) -> None:
        self.limits = limits
        self._scratch = scratch
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # used longest ago first
        self._used = 0

    def read(
        self, key: Hashable, place: Place, shape: Sequence[int], itemsize: int, box: Box, out: U8
    ) -> None:
        """Copy a box of one chunk.

        Args:
            key: identifies the chunk.
            place: where it is stored.
            shape: its elements on every axis.
            itemsize: bytes per element.
            box: ``(start, stop)`` on every axis, not empty.
            out: flat bytes of the box in row-major order.
        """
        if place.codec == "raw":
            value = place.open()
            try:
                copy_box(
                    lambda offset, part: value.read_into(place.start + offset, part),
                    shape, itemsize, box, out,
                )  # fmt: skip
            finally:
                value.close()
            return
        entry = self._locked(key)
        try:
            run = one_run(shape, itemsize, box)
            if run is not None:
                self._read_run(entry, place, run[0], out)
            else:
                if entry.data is None and entry.spill is None:
                    self._load(entry, place)
                self._gather(entry, shape, itemsize, box, out)
            entry.served += len(out)
            if entry.served >= place.nbytes:
                self._forget(key, entry)
        except BaseException:
            self._forget(key, entry)
            raise
        finally:
            entry.lock.release()

    def close(self) -> None:
        """Give back memory, temporary files and file descriptors; the pool can be used again."""
        while True:
            with self._lock:
                if not self._entries:
                    return
                key, entry = next(iter(self._entries.items()))
            with entry.lock:
                self._forget(key, entry)

    def _locked(self, key: Hashable) -> _Entry:
        """The chunk's entry, its lock held."""
        while True:
            with self._lock:
                entry = self._entries.setdefault(key, _Entry())
                self._entries.move_to_end(key)
            entry.lock.acquire()
            if not entry.dead:
                return entry
            entry.lock.release()  # forgotten while this thread waited for it

    def _read_run(self, e: _Entry, place: Place, start: int, out: U8) -> None:
        if self._loaded(e, start, out) or self._from_segment(e, start, out):
            return
        if start == 0 and e.decoder is not None:  # from the beginning again
            self._close_cursor(e, lost=False)
        gap = start - e.position
        in_order = gap == 0 and not (e.lost and start)
        early = 0 < gap <= self.limits.gap and not e.lost and self._reserve(e, gap)
        if not (in_order or early):
            if gap > 0 and place.nbytes > self.limits.chunk and e.peeks < _PEEKS:
                self._peek(e, place, start, out)
            else:
                self._load(e, place)
                self._loaded(e, start, out)
            return
        decoder = e.decoder or self._open_cursor(e, place)
        if gap:
            skipped = np.empty(gap, np.uint8)
            segment = _Segment(decoder.position, skipped, gap)
            decoder.read_into(skipped)
            e.segments.append(segment)
        decoder.read_into(out)

    @staticmethod
    def _loaded(e: _Entry, start: int, out: U8) -> bool:
        if e.data is not None:
            out[:] = e.data[start : start + len(out)]
        elif e.spill is not None:
            e.spill.read_into(start, out)
        return e.data is not None or e.spill is not None

    def _from_segment(self, e: _Entry, start: int, out: U8) -> bool:
        for s in e.segments:
            a = start - s.start
            if a >= 0 and a + len(out) <= len(s.data):
                out[:] = s.data[a : a + len(out)]
                s.left -= len(out)
                if s.stays:
                    e.served -= len(out)  # counted when it was decoded
                elif s.left <= 0:
                    e.segments.remove(s)
                    self._release(e, len(s.data))
                return True
        return False

    @staticmethod
    def _gather(e: _Entry, shape: Sequence[int], itemsize: int, box: Box, out: U8) -> None:
        if e.data is not None:
            item = np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")
            part = e.data.view(item).reshape(shape)[tuple(slice(*ab) for ab in box)]
            out.view(item).reshape(part.shape)[...] = part
        else:
            assert e.spill is not None
            copy_box(e.spill.read_into, shape, itemsize, box, out)

    def _load(self, e: _Entry, place: Place) -> None:
        """Decode the whole chunk, into memory if it may stay there, else into a temporary file."""
        self._close_cursor(e, lost=False)
        self._drop_segments(e)
        decoder = DECODERS[place.codec](place)
        try:
            if place.nbytes <= self.limits.chunk and self._reserve(e, place.nbytes):
                data = np.empty(place.nbytes, np.uint8)
                decoder.read_into(data)
                e.data = data
                return
            e.spill = spill = Scratch(self._scratch(), place.nbytes)
            buffer = np.empty(min(_COPY_BLOCK, place.nbytes), np.uint8)
            while decoder.position < place.nbytes:
                offset = decoder.position
                part = buffer[: place.nbytes - offset]
                decoder.read_into(part)
                spill.write(offset, part)
        finally:
            decoder.close()

    def _peek(self, e: _Entry, place: Place, start: int, out: U8) -> None:
        """Decode up to a far part and keep only that: cheaper than a temporary file, if it is not done often."""
        e.peeks += 1
        decoder = DECODERS[place.codec](place)
        buffer = np.empty(min(_COPY_BLOCK, start), np.uint8)
        try:
            while decoder.position < start:
                decoder.read_into(buffer[: start - decoder.position])
            decoder.read_into(out)
        finally:
            decoder.close()
        if len(out) <= _COPY_BLOCK and self._reserve(e, len(out)):
            e.segments.append(_Segment(start, out.copy(), 0, stays=True))

    def _open_cursor(self, e: _Entry, place: Place) -> Decoder:
        self._make_room_for_cursor()
        e.decoder = DECODERS[place.codec](place)
        e.lost = False
        return e.decoder

    def _make_room_for_cursor(self) -> None:
        """Close the cursor used longest ago when too many are open."""
        with self._lock:
            open_ones = [e for e in self._entries.values() if e.decoder is not None]
            if len(open_ones) < self.limits.cursors:
                return
            victim = next((e for e in open_ones if e.lock.acquire(blocking=False)), None)
        if victim is not None:
            self._close_cursor(victim, lost=True)
            victim.lock.release()

    @staticmethod
    def _close_cursor(e: _Entry, lost: bool) -> None:
        if e.decoder is not None:
            e.decoder.close()
            e.decoder = None
            e.lost = lost

    def _drop_segments(self, e: _Entry) -> None:
        self._release(e, sum(len(s.data) for s in e.segments))
        e.segments = []

    def _reserve(self, e: _Entry, nbytes: int) -> bool:
        """Make room in memory; False when others hold it and are busy."""
        if nbytes > self.limits.memory:
            return False
        while True:
            with self._lock:
                if self._used + nbytes <= self.limits.memory:
                    self._used += nbytes
                    e.held += nbytes
                    return True
                victim = next(
                    (
                        v
                        for v in self._entries.values()
                        if v.held and v.lock.acquire(blocking=False)
                    ),
                    None,
                )
            if victim is None:
                return False
            try:
                self._evict(victim)
            finally:
                victim.lock.release()

    def _release(self, e: _Entry, nbytes: int) -> None:
        with self._lock:
            self._used -= nbytes
            e.held -= nbytes

    def _evict(self, v: _Entry) -> None:
        data, v.data = v.data, None
        if data is not None:
            try:
                spill = Scratch(self._scratch(), len(data))
                spill.write(0, data)
                v.spill = spill
            except ResourceError:
                pass  # it is decoded again when it is needed again
        v.segments = []
        self._release(v, v.held)

    def _forget(self, key: Hashable, e: _Entry) -> None:
        self._close_cursor(e, lost=False)
        if e.spill is not None:
            e.spill.close()
        e.data, e.spill, e.segments = None, None, []
        self._release(e, e.held)
        with self._lock:
            e.dead = True
            if self._entries.get(key) is e:
                del self._entries[key]
