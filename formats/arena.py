"""Recycled memory for the arrays of one step of streaming work.

Large arrays come fresh from the kernel every time, and finding and clearing their pages costs as much as hashing them. Inside
``recycled()`` this thread's :func:`empty` hands out memory of earlier steps instead; everything it gave is taken back at
the end of the block, so nothing of it may be kept. Outside such a block it is ``numpy.empty``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

_SMALL = 1 << 20
_local = threading.local()


class _Arena:
    """Buffers of one thread; ``used`` of them are given out."""

    def __init__(self) -> None:
        self.buffers: list[npt.NDArray[np.uint8]] = []
        self.used = 0

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        fitting = [k for k in range(self.used, len(self.buffers)) if self.buffers[k].size >= nbytes]
        if fitting:
            k = min(fitting, key=lambda i: self.buffers[i].size)
        else:
            if self.used < len(self.buffers):  # too small: give it back rather than keep both
                self.buffers.pop()
            self.buffers.append(np.empty(nbytes, np.uint8))
            k = len(self.buffers) - 1
        self.buffers[self.used], self.buffers[k] = self.buffers[k], self.buffers[self.used]
        self.used += 1
        return self.buffers[self.used - 1][:nbytes]


class Memory:
    """Memory of its own for a :func:`recycled` block, for steps that overlap within one thread."""

    def __init__(self) -> None:
        self.arena = _Arena()


@contextmanager
def recycled(memory: Memory | None = None) -> Iterator[None]:
    """Let this thread's :func:`empty` reuse memory until the block ends. Blocks may nest.

    Args:
        memory: where from; default this thread's own.
    """
    outer: _Arena | None = getattr(_local, "arena", None)
    arena: _Arena = outer or getattr(_local, "kept", None) or _Arena()
    if memory is None:
        _local.kept = arena
    else:
        arena = memory.arena
    _local.arena = arena
    mark = arena.used
    try:
        yield
    finally:
        arena.used = mark
        _local.arena = outer


def empty(shape: Sequence[int], dtype: Any) -> npt.NDArray[Any]:
    """``numpy.empty``, from recycled memory inside a :func:`recycled` block of this thread."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    arena = getattr(_local, "arena", None)
    if arena is None or nbytes < _SMALL:
        return np.empty(shape, kind)
    taken: npt.NDArray[Any] = arena.take(nbytes).view(kind).reshape(shape)
    return taken
