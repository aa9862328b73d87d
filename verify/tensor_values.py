"""Arithmetic on blocks of two tensors: equal bits, units in the last place, steps; and the rule that a pair comes under."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..convert.open import LazyTensor
from ..formats.base import iter_row_blocks
from ..formats.dtypes import short
from .ledger import EQUAL, NARROWED, QUANTIZED, STEP, WIDENED

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK_BYTES = 4 << 20  # of a tensor at a time; where bits differ, a dozen times that in float64
MANTISSA = {"bf16": (7, -126), "f16": (10, -14), "f32": (23, -126), "f64": (52, -1022)}


def stored_as(tensor: LazyTensor) -> str:
    """Type as a ledger's row has it."""
    packed = tensor.source.quantized
    return short(tensor.dtype) if packed is None else str(tensor.source.stored)


def rule_of(ref: LazyTensor, cand: LazyTensor) -> str:
    """How the candidate holds the tensor, seen from the reference."""
    if cand.source.quantized is not None and not _same_packing(ref, cand):
        return QUANTIZED
    if cand.step is not None and (ref.step is None or ref.step != cand.step):
        return STEP
    if ref.dtype == cand.dtype:
        return EQUAL
    exact = _exponents(cand.dtype) >= _exponents(ref.dtype) and _bits(cand.dtype) >= _bits(
        ref.dtype
    )
    return WIDENED if exact else NARROWED


def _same_packing(ref: LazyTensor, cand: LazyTensor) -> bool:
    a, b = ref.source.quantized, cand.source.quantized
    return a is not None and b is not None and a.kind == b.kind


def _bits(dtype: np.dtype[Any]) -> int:
    return MANTISSA[short(dtype)][0]


def _exponents(dtype: np.dtype[Any]) -> int:
    return -MANTISSA[short(dtype)][1]


def quantization_step(tensor: LazyTensor, reference: Array) -> Array:
    """The step a uniform quantizer of as many bits would have, per group of the reference.

    A group's step is ``2 max|w| / (2^bits - 1)`` with the packed type's code bits, for groups as long as the type's
    (a whole row where rows are stored in another order).

    Args:
        tensor: the packed tensor.
        reference: rows ``[rows, in]`` float64 of what was quantized.

    Returns:
        ``[rows, groups, 1]``.
    """
    packed = tensor.source.quantized
    assert packed is not None
    width = reference.shape[-1]
    group = packed.group_size if tensor.streams_rows else width
    if width % group:
        group = width
    levels = 2**packed.code_bits - 1
    groups = np.abs(reference).reshape(-1, width // group, group)
    return np.asarray(2 * groups.max(-1, keepdims=True) / levels)


def row_pairs(ref: LazyTensor, cand: LazyTensor) -> Iterator[tuple[int, Array, Array]]:
    """``(first row, reference's rows, candidate's rows)``; a side that cannot be read by rows is read once."""
    whole = [t.read() if not t.streams_rows else None for t in (ref, cand)]
    itemsize = max(t.source.dtype.itemsize for t in (ref, cand))
    for start, stop in iter_row_blocks(ref.shape, itemsize, BLOCK_BYTES):
        a, b = (
            t.read_rows(start, stop) if w is None else np.ascontiguousarray(w[start:stop])
            for t, w in zip((ref, cand), whole, strict=True)
        )
        yield start, a, b


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_of(x: Array) -> Array:
    """Elements as whole numbers."""
    return x.view(_UNSIGNED[x.dtype.itemsize])


def equal_bits(a: Array, b: Array) -> bool:
    """Of two arrays of one type."""
    return bool(np.array_equal(bits_of(a), bits_of(b)))


def unequal(a: Array, b: Array, same_type: bool, wide_a: Array, wide_b: Array) -> Array:
    """Elements whose bits differ; across types, whose values or signs do."""
    if same_type:
        return np.asarray(bits_of(a) != bits_of(b))
    with np.errstate(invalid="ignore"):
        return np.asarray((wide_a != wide_b) | (np.signbit(wide_a) != np.signbit(wide_b)))


def shift(a: Array, b: Array) -> int:
    """1 or -1 where a matrix holds the reference's rows one further down or up, else 0."""
    if a.ndim < 2 or len(a) < 3 or a.dtype != b.dtype:
        return 0
    if equal_bits(a[:-1], b[1:]):
        return 1
    return -1 if equal_bits(a[1:], b[:-1]) else 0


def square(x: Array) -> float:
    """Sum of squares."""
    return float(np.vdot(x, x)) if x.dtype == np.float64 else square(x.astype(np.float64))


def zero_rows(x: Array) -> int:
    """Rows of a matrix that are all zero."""
    return int(np.count_nonzero(~x.any(axis=1))) if x.ndim > 1 else 0


def ulp(x: Array, dtype: str) -> Array:
    """Unit in the last place of ``x`` in a type, subnormals included."""
    bits, lowest = MANTISSA[dtype]
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.asarray(np.ldexp(1.0, np.maximum(exponent, lowest) - bits))
