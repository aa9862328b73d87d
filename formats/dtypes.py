"""The tensor element types g2kit moves, under the names each container gives them.

All types are little-endian NumPy dtypes (bfloat16 and float8 from ml_dtypes). One table; containers look names up.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .errors import DtypeError

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
I8 = np.dtype(np.int8)


@dataclass(frozen=True)
class DtypeNames:
    """One element type under its names: g2kit/CLI (``short``), NumPy, safetensors, torch storage class."""

    dtype: np.dtype
    short: str
    safetensors: str
    torch_storage: str | None


TABLE: tuple[DtypeNames, ...] = (
    DtypeNames(BF16, "bf16", "BF16", "BFloat16Storage"),
    DtypeNames(F16, "f16", "F16", "HalfStorage"),
    DtypeNames(F32, "f32", "F32", "FloatStorage"),
    DtypeNames(F64, "f64", "F64", "DoubleStorage"),
    DtypeNames(I8, "i8", "I8", "CharStorage"),
    DtypeNames(np.dtype(np.uint8), "u8", "U8", "ByteStorage"),
    DtypeNames(np.dtype(np.int16), "i16", "I16", "ShortStorage"),
    DtypeNames(np.dtype(np.uint16), "u16", "U16", None),
    DtypeNames(np.dtype(np.int32), "i32", "I32", "IntStorage"),
    DtypeNames(np.dtype(np.uint32), "u32", "U32", None),
    DtypeNames(np.dtype(np.int64), "i64", "I64", "LongStorage"),
    DtypeNames(np.dtype(np.uint64), "u64", "U64", None),
    DtypeNames(np.dtype(np.bool_), "bool", "BOOL", "BoolStorage"),
    DtypeNames(np.dtype(np.complex64), "c64", "C64", "ComplexFloatStorage"),
    DtypeNames(np.dtype(ml_dtypes.float8_e4m3fn), "f8_e4m3", "F8_E4M3", None),
    DtypeNames(np.dtype(ml_dtypes.float8_e5m2), "f8_e5m2", "F8_E5M2", None),
)
FLOATS = (BF16, F16, F32, F64)
_BY_DTYPE = {row.dtype: row for row in TABLE}
BY_SHORT = {row.short: row.dtype for row in TABLE}
BY_SAFETENSORS = {row.safetensors: row.dtype for row in TABLE}
BY_TORCH_STORAGE = {row.torch_storage: row.dtype for row in TABLE if row.torch_storage}


def names(dtype: np.dtype) -> DtypeNames:
    """Every name of a dtype.

    Raises:
        DtypeError: the dtype is not one g2kit moves.
    """
    try:
        return _BY_DTYPE[np.dtype(dtype)]
    except KeyError:
        known = ", ".join(row.short for row in TABLE)
        raise DtypeError(f"dtype {dtype} is not supported; supported are {known}.") from None


def short(dtype: np.dtype) -> str:
    """The dtype's g2kit name, such as ``bf16``."""
    return names(dtype).short
