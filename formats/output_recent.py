"""Bytes on their way to the disk, kept a moment longer for the one who hashes the file.

A file's hash needs its bytes in order; the writers finish tensors in nearly that order. What was written a moment ago is
hashed from memory, so hashing costs no second reading, whatever the page cache holds.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import OrderedDict
from threading import Lock

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
LIMIT = 160 << 20
_PIECE = 4 << 20
_SMALL = 64 << 10  # below it, reading back costs nothing


class Recent:
    """Copies of the pieces written last, at most ``limit`` bytes. Thread-safe.

    A piece taken belongs to the taker until it is given :meth:`back`.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = Lock()
        self._pieces: OrderedDict[tuple[str, int], Bytes] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._held = 0
        self._free: list[Bytes] = []

    def put(self, name: str, data: memoryview, offset: int) -> None:
        """Keep a copy of what was written to a file."""
        if len(data) < _SMALL:
            return
        flat = np.frombuffer(data, np.uint8)
        for start in range(0, len(flat), _PIECE):
            part = flat[start : start + _PIECE]
            with self._lock:
                self._make_room()
                buffer = self._free.pop() if self._free else None
            if buffer is None:
                buffer = np.empty(_PIECE, np.uint8)
            np.copyto(buffer[: len(part)], part)
            key = (name, offset + start)
            with self._lock:
                self._drop(key)
                self._pieces[key] = buffer[: len(part)]
                insort(self._starts.setdefault(name, []), key[1])
                self._held += _PIECE

    @property
    def full(self) -> bool:
        """Whether the next piece will push out an older one."""
        with self._lock:
            return self._held + _PIECE > self._limit

    def _make_room(self) -> None:
        while self._held + _PIECE > self._limit and self._pieces:
            self._drop(next(iter(self._pieces)))

    def _drop(self, key: tuple[str, int]) -> None:
        if key in self._pieces:
            self._release(self._remove(key))

    def _remove(self, key: tuple[str, int]) -> Bytes:
        starts = self._starts[key[0]]
        del starts[bisect_right(starts, key[1]) - 1]
        if not starts:
            del self._starts[key[0]]
        return self._pieces.pop(key)

    def _release(self, piece: Bytes) -> None:
        self._held -= _PIECE
        whole = piece.base if piece.base is not None else piece
        self._free.append(whole)

    def take(self, name: str, at: int, stop: int) -> tuple[int, Bytes] | None:
        """The piece of a file that begins at or before ``at`` and holds it, if it ends by ``stop``: its start and bytes."""
        with self._lock:
            starts = self._starts.get(name)
            k = bisect_right(starts, at) - 1 if starts else -1
            if not starts or k < 0:
                return None
            start = starts[k]
            size = len(self._pieces[name, start])
            if not at < start + size <= stop:
                return None
            return start, self._remove((name, start))

    def next_start(self, name: str, at: int) -> int | None:
        """Where the next piece behind ``at`` begins."""
        with self._lock:
            starts = self._starts.get(name, [])
            k = bisect_right(starts, at)
            return starts[k] if k < len(starts) else None

    def back(self, piece: Bytes) -> None:
        """Give a taken piece's memory back."""
        with self._lock:
            self._release(piece)

    def close(self) -> None:
        """Let go of the memory."""
        with self._lock:
            self._pieces.clear()
            self._starts.clear()
            self._free.clear()
            self._held = 0
