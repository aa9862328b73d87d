"""CRC-32 of a run of bytes whose pieces are read or written in any order, by any thread.

zlib computes one piece at 4 GB/s without holding the interpreter; joining two pieces is a multiplication in
GF(2)[x] modulo the CRC's polynomial (zlib's crc32_combine, which Python does not expose). So a checksum costs no
second pass over the data and no order.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from functools import lru_cache
from threading import Lock

_POLYNOMIAL = 0xEDB88320  # reflected: bit 31 is x^0
_ONE = 1 << 31


def combine(first: int, second: int, length: int) -> int:
    """CRC-32 of two runs of bytes one after the other.

    Args:
        first: CRC-32 of the run in front.
        second: CRC-32 of the run behind it.
        length: bytes of the run behind.
    """
    return _multiply(_shift(length), first) ^ second


def _multiply(a: int, b: int) -> int:
    """``a * b`` modulo the polynomial."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=1024)
def _shift(length: int) -> int:
    """``x^(8 * length)`` modulo the polynomial, by repeated squaring."""
    result, square = _ONE, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result


class PiecewiseCrc32:
    """Collects the CRC-32 of ``size`` bytes from pieces. Thread-safe.

    Args:
        size: bytes of the whole run.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = Lock()
        self._pieces: list[tuple[int, int, int]] = []  # (start, stop, crc), apart and in order

    def update(self, start: int, data: bytes | memoryview) -> None:
        """Take the bytes at ``start``; ignored when some of them were taken before."""
        self.add(start, start + len(data), zlib.crc32(data))

    def add(self, start: int, stop: int, crc: int) -> None:
        """Take a piece whose CRC-32 is known; ignored when it overlaps one taken before."""
        if start == stop:
            return
        with self._lock:
            pieces = self._pieces
            i = bisect_left(pieces, (start,))
            if (i and pieces[i - 1][1] > start) or (i < len(pieces) and pieces[i][0] < stop):
                return
            if i < len(pieces) and pieces[i][0] == stop:
                _, end, behind = pieces.pop(i)
                stop, crc = end, combine(crc, behind, end - stop)
            if i and pieces[i - 1][1] == start:
                i -= 1
                begin, _, front = pieces.pop(i)
                start, crc = begin, combine(front, crc, stop - start)
            pieces.insert(i, (start, stop, crc))

    def gaps(self) -> list[tuple[int, int]]:
        """The runs ``(start, stop)`` that no piece has covered yet."""
        with self._lock:
            edges = [0, *(edge for piece in self._pieces for edge in piece[:2]), self.size]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    @property
    def value(self) -> int | None:
        """CRC-32 of the whole run, or None while there are gaps."""
        if self.gaps():
            return None
        return self._pieces[0][2] if self._pieces else 0
