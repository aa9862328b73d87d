"""Comparing weights as bits, so that a NaN equals itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x: Array) -> Array:
    """The elements as unsigned integers."""
    return x.view(_UNSIGNED[x.dtype.itemsize])


def unequal(a: Array, b: Array) -> int:
    """How many elements of two arrays of one dtype have neither the same value nor the same bits.

    0 equals -0, and a NaN only a NaN with the same payload.
    """
    return int(np.count_nonzero((a != b) & (bits(a) != bits(b))))


def same_values(a: Array, b: Array) -> bool:
    """Whether all values are equal; a NaN equals any NaN."""
    return bool(np.array_equal(a, b, equal_nan=True))
