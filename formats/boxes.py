"""Boxes of row-major arrays as runs of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
Box = Sequence[tuple[int, int]]
_COPY_BLOCK = 4 << 20
# runs nearer than this are read with what lies between: cheaper than one call per run
_NEAR = 16 << 10


def one_run(shape: Sequence[int], itemsize: int, box: Box) -> tuple[int, int] | None:
    """Byte offset and length of a box inside a row-major array, or None when it is not one run of bytes."""
    start, many = 0, False
    for n, (a, b) in zip(shape, box, strict=True):
        if many and b - a != n:
            return None
        many = many or b - a > 1
        start = start * n + a
    return start * itemsize, math.prod(b - a for a, b in box) * itemsize


def copy_box(
    read: Callable[[int, U8], None],
    shape: Sequence[int],
    itemsize: int,
    box: Box,
    out: U8,
    base: int = 0,
) -> None:
    """Copy a box out of a row-major array that can only be read by byte ranges.

    Args:
        read: ``read(offset, out)`` fills ``out`` from a byte offset.
        shape: the array's.
        itemsize: bytes per element.
        box: ``(start, stop)`` on every axis.
        out: flat bytes of the box in row-major order.
        base: offset of the array's first byte.
    """
    run = one_run(shape, itemsize, box)
    if run is not None:
        read(base + run[0], out)
        return
    (first, last), rest = box[0], box[1:]
    row = math.prod(shape[1:]) * itemsize
    part = len(out) // (last - first)
    if row <= _NEAR:
        step = max(1, _COPY_BLOCK // row)
        inside = (slice(None), *(slice(*ab) for ab in rest))
        for i in range(first, last, step):
            rows = np.empty((min(step, last - i), *shape[1:], itemsize), np.uint8)
            read(base + i * row, rows.reshape(-1))
            chosen = rows[inside].reshape(-1)
            at = (i - first) * part
            out[at : at + len(chosen)] = chosen
        return
    for i in range(first, last):
        at = (i - first) * part
        copy_box(read, shape[1:], itemsize, rest, out[at : at + part], base + i * row)
