"""Lays out a GGUF version 3 file to the byte, as gguf-py's GGUFWriter would write it.

Quantized tensors are slots of native blocks (:class:`BlockSlot`): the writer gets bytes and never encodes.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Array, Chunk, ContainerPlan, FilePlan, Slot
from .dtypes import names
from .errors import DtypeError, FormatError, ShapeError
from .gguf_header import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    ARRAY,
    MAGIC,
    MAX_DIMS,
    PLAIN,
    SCALARS,
    STRING,
    align,
    checked_alignment,
)

KeyValue = tuple[str, str, Any]
_NAME_MAX = 63  # ggml's GGML_MAX_NAME counts the final NUL
_CODES = {name: code for code, (name, _) in SCALARS.items()} | {"str": STRING}
_U8 = np.dtype(np.uint8)
_TENSOR_CODES = {dtype: code for code, (_, dtype) in PLAIN.items()}


@dataclass(frozen=True)
class BlockSlot(Slot):
    """A quantized tensor: the payload is uint8 ``[rows, row_bytes]``, the file's shape ``[rows, weights]``.

    Attributes:
        code: ggml's number of the block type.
        weights: per block.
        block_bytes: per block.
    """

    code: int = 0
    weights: int = 0
    block_bytes: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in weights.

        Raises:
            ShapeError: rows are not whole blocks of bytes.
        """
        *rows, row_bytes = self.shape or (0,)
        if self.dtype != _U8 or not rows or self.block_bytes < 1 or row_bytes % self.block_bytes:
            raise ShapeError(
                f"a payload of {self.dtype} {list(self.shape)} is not rows of blocks of {self.block_bytes} bytes.",
                tensor=self.name,
            )
        return (*rows, row_bytes // self.block_bytes * self.weights)


def plan(
    slots: Sequence[Slot], kv: Sequence[KeyValue], *, file_name: str = "model.gguf"
) -> ContainerPlan:
    """One GGUF file: header and offsets now, payloads later.

    Args:
        slots: tensors in file order, row-major shapes; float32, float16, bfloat16, float64 or signed integers;
            :class:`BlockSlot` for quantized ones.
        kv: ``(key, type, value)`` in file order; types ``u8`` … ``i64``, ``f32``, ``f64``, ``bool``, ``str``, and in
            brackets (``[str]``) for arrays. ``general.alignment`` sets the alignment; 32 without it.
        file_name: the file's name.

    Raises:
        FormatError: a value does not fit its type, or a key or name is doubled or too long.
        DtypeError: GGUF has no such element type.
        ShapeError: more than four axes, or a payload that is not whole blocks.
    """
    given = {key: (value, type_name) for key, type_name, value in kv}
    alignment = checked_alignment(*given.get(ALIGNMENT_KEY, (ALIGNMENT, "u32")), file_name)
    _check_unique([key for key, _, _ in kv], "key")
    _check_unique([slot.name for slot in slots], "tensor")
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(slots), len(kv)))
    for key, type_name, value in kv:
        header += _string(key, key) + _value(key, type_name, value)
    offset = 0
    offsets: list[int] = []
    for slot in slots:
        header += _tensor_info(slot, offset)
        offsets.append(offset)
        offset = align(offset + slot.nbytes, alignment)
    data = align(len(header), alignment)
    chunks = {
        slot.name: (Chunk((0,) * len(slot.shape), slot.shape, file_name, data + at),)
        for slot, at in zip(slots, offsets, strict=True)
    }
    return ContainerPlan((FilePlan(file_name, data + offset, ((0, bytes(header)),)),), chunks)


def _check_unique(found: list[str], what: str) -> None:
    doubled = (
        {name for name in found if found.count(name) > 1} if len(set(found)) < len(found) else ()
    )
    if doubled:
        raise FormatError(f"GGUF {what} given twice: {', '.join(sorted(doubled))}.")


def _string(text: object, key: str) -> bytes:
    if not isinstance(text, str):
        raise FormatError(f"GGUF key {key!r}: {text!r} is not a string.")
    try:
        raw = text.encode()
    except UnicodeEncodeError as e:
        raise FormatError(
            f"GGUF key {key!r}: the string has a lone surrogate at {e.start}; it has no UTF-8 form."
        ) from e
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, type_name: str, value: Any) -> bytes:
    is_array = type_name.startswith("[") and type_name.endswith("]")
    item = type_name[1:-1] if is_array else type_name
    code = _CODES.get(item)
    if code is None:
        raise FormatError(
            f"GGUF key {key!r}: type {type_name!r} is not one of {', '.join(_CODES)}."
        )
    items = value if is_array else [value]
    payload = (
        b"".join(_string(s, key) for s in items) if code == STRING else _scalars(key, item, items)
    )
    if not is_array:
        return struct.pack("<I", code) + payload
    return struct.pack("<IIQ", ARRAY, code, len(items)) + payload


def _scalars(key: str, item: str, values: Sequence[Any]) -> bytes:
    """Packed little-endian values, every one checked to fit."""
    dtype = SCALARS[_CODES[item]][1]
    try:
        packed = _PACKERS[item[0]](values, dtype)
    except (TypeError, ValueError, OverflowError) as e:
        raise FormatError(f"GGUF key {key!r}: {_printed(values)} does not fit {item}.") from e
    return packed.tobytes()


def _integers(values: Sequence[Any], dtype: np.dtype) -> Array:
    if not isinstance(values, np.ndarray):
        return np.array([operator.index(v) for v in values], dtype)
    bounds = np.iinfo(dtype)
    if values.dtype.kind not in "iu":
        raise TypeError(values.dtype)
    if values.size and not bounds.min <= int(values.min()) <= int(values.max()) <= bounds.max:
        raise OverflowError(dtype)
    return values.astype(dtype)


def _floats(values: Sequence[Any], dtype: np.dtype) -> Array:
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "fiu":
        raise TypeError(given.dtype)
    with np.errstate(over="ignore"):
        packed = given.astype(dtype)
    if ((np.isinf(packed) & np.isfinite(given)) | ((packed == 0) & (given != 0))).any():
        raise OverflowError(dtype)
    return packed


def _bools(values: Sequence[Any], dtype: np.dtype) -> Array:
    given = np.asarray(values)
    if given.size and given.dtype.kind != "b":
        raise TypeError(given.dtype)
    return given.astype(dtype)


_PACKERS = {"u": _integers, "i": _integers, "f": _floats, "b": _bools}  # by the type's first letter


def _printed(values: Sequence[Any]) -> str:
    """A value or the head of a list, for messages."""
    text = repr(values[0]) if len(values) == 1 else repr(list(values[:4]))
    return text[:80]


def _tensor_info(slot: Slot, offset: int) -> bytes:
    shape = slot.stored_shape if isinstance(slot, BlockSlot) else slot.shape
    code = slot.code if isinstance(slot, BlockSlot) else _TENSOR_CODES.get(np.dtype(slot.dtype))
    if code is None:
        known = ", ".join(names(dtype).short for dtype in _TENSOR_CODES)
        raise DtypeError(f"GGUF cannot hold {slot.dtype}; it can hold {known}.", tensor=slot.name)
    if len(shape) > MAX_DIMS:
        raise ShapeError(f"{len(shape)} axes; GGUF has {MAX_DIMS} at most.", tensor=slot.name)
    name = _string(slot.name, slot.name)
    if not 0 < len(name) - 8 <= _NAME_MAX:
        raise FormatError(
            f"the name has {len(name) - 8} bytes; llama.cpp reads 1 to {_NAME_MAX}.",
            tensor=slot.name,
        )
    ne = tuple(reversed(shape))
    return name + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, code, offset)
