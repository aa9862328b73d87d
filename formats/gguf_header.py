"""GGUF's header: key-values and tensor table, every length bounded before anything is allocated for it.

Source: ggml's docs/gguf.md, versions 2 and 3, little-endian. Stricter than the reference readers where they let
ambiguous files through: no nested arrays, no doubled keys or names, booleans are 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import BF16, F16, F32, F64, I8
from .errors import FormatError, LimitError, TruncatedError
from .files import InputFile
from .names import MAX_TENSOR_NAME, check_tensor_name

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # when general.alignment is absent
ALIGNMENT_KEY = "general.alignment"
ALIGNMENT_MAX = 1 << 20
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

# type code -> (g2kit's name, little-endian NumPy dtype); "[name]" is an array of it
SCALARS: dict[int, tuple[str, np.dtype]] = {
    0: ("u8", np.dtype("u1")),
    1: ("i8", np.dtype("i1")),
    2: ("u16", np.dtype("<u2")),
    3: ("i16", np.dtype("<i2")),
    4: ("u32", np.dtype("<u4")),
    5: ("i32", np.dtype("<i4")),
    6: ("f32", np.dtype("<f4")),
    7: ("bool", np.dtype("u1")),
    10: ("u64", np.dtype("<u8")),
    11: ("i64", np.dtype("<i8")),
    12: ("f64", np.dtype("<f8")),
}
BOOL, STRING, ARRAY = 7, 8, 9

# ggml type code -> (name, dtype) of the types that are plain arrays; all others are blocks
PLAIN: dict[int, tuple[str, np.dtype]] = {
    0: ("F32", F32),
    1: ("F16", F16),
    24: ("I8", I8),
    25: ("I16", np.dtype("<i2")),
    26: ("I32", np.dtype("<i4")),
    27: ("I64", np.dtype("<i8")),
    28: ("F64", F64),
    30: ("BF16", BF16),
}

# Larger than any real file's by far, and small enough to refuse quickly.
MAX_HEADER = 64 << 20
MAX_KV = 1 << 16
MAX_TENSORS = 50_000
MAX_KEY = (1 << 16) - 1
MAX_NAME = 4 * MAX_TENSOR_NAME  # bytes
MAX_STRING = 16 << 20
MAX_ARRAY = 1 << 24
MAX_DIMS = 4
MAX_WEIGHTS = 1 << 48
_WINDOW = 1 << 20

_OTHER_FORMATS = (
    (b"version https://git-lfs", "this is a Git LFS pointer, not the file", "run `git lfs pull`."),
    (b"PK\x03\x04", "this is a zip archive, perhaps a torch checkpoint", "rename it to .bin or .ckpt."),
    (b"lmgg", "this is a GGML file from before GGUF", "convert the original weights again."),
    (b"tjgg", "this is a GGJT file from before GGUF", "convert the original weights again."),
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        name: as stored.
        shape: row-major, slowest axis first (the file stores the fastest first).
        type_code: ggml type.
        offset: of the payload, relative to :attr:`Header.data_offset`.
    """

    name: str
    shape: tuple[int, ...]
    type_code: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Everything before the payload.

    Attributes:
        version: 2 or 3.
        kv: key -> value; numeric arrays as read-only NumPy arrays, string arrays as lists.
        kv_types: key -> type, such as ``u32`` or ``[str]``.
        tensors: the tensor table in file order.
        alignment: of every payload.
        data_offset: where payloads begin.
    """

    version: int
    kv: dict[str, Any]
    kv_types: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int


def align(n: int, alignment: int) -> int:
    """The smallest multiple of ``alignment`` not below ``n``."""
    return -(-n // alignment) * alignment


class _Cursor:
    """Reads a header forward through a window, so that small fields cost no system call each."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self._window = b""
        self._base = 0  # file offset of the window
        self._pos = 0  # next byte, within the window

    @property
    def offset(self) -> int:
        """File offset of the next byte."""
        return self._base + self._pos

    def take(self, size: int, what: str) -> bytes:
        """The next ``size`` bytes."""
        if self._pos + size > len(self._window):
            self._refill(size, what)
        self._pos += size
        return self._window[self._pos - size : self._pos]

    def _refill(self, size: int, what: str) -> None:
        at, left = self.offset, self.file.size - self.offset
        if size > left:
            raise TruncatedError(
                f"the file ends within its header: {what} at byte {at} needs {size} bytes, {left} are left.",
                where=self.file.path,
                fix="download or copy the file again.",
            )
        if at + size > MAX_HEADER:
            raise LimitError(
                f"the header is longer than {MAX_HEADER} bytes (at {what}).", where=self.file.path
            )
        self._window = self.file.read(at, min(left, max(size, _WINDOW)))
        self._base, self._pos = at, 0

    def uint(self, size: int, what: str) -> int:
        """An unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def count(self, size: int, limit: int, what: str) -> int:
        """An unsigned integer that must not exceed ``limit``."""
        n = self.uint(size, what)
        if n > limit:
            raise LimitError(
                f"{what} is {n}; more than {limit} is not plausible.",
                where=self.file.path,
                fix="the file is damaged or hostile; download it again.",
            )
        return n

    def string(self, limit: int, what: str) -> str:
        """A length-prefixed UTF-8 string of at most ``limit`` bytes."""
        at = self.offset
        raw = self.take(self.count(8, limit, f"length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            raise FormatError(
                f"{what} at byte {at} is not UTF-8 ({e.reason} at byte {e.start} of it).",
                where=self.file.path,
            ) from e

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings. The loop is the hot path of a large vocabulary."""
        out: list[str] = []
        while len(out) < count:
            out += self._strings_in_window(count - len(out))
            if len(out) < count:  # the next one crosses the window's edge, or is bad
                out.append(self.string(MAX_STRING, f"{what}[{len(out)}]"))
        return out

    def _strings_in_window(self, count: int) -> Iterator[str]:
        window, pos, end = self._window, self._pos, len(self._window)
        for _ in range(count):
            begin = pos + 8
            stop = begin + int.from_bytes(window[pos:begin], "little")
            if begin > end or stop > end or stop - begin > MAX_STRING:
                break
            try:
                text = window[begin:stop].decode()
            except UnicodeDecodeError:
                break
            pos = self._pos = stop
            yield text


def read_header(file: InputFile) -> Header:
    """Parse and check the header.

    Raises:
        FormatError: no GGUF, another version or byte order, doubled or unreadable entries.
        LimitError: a count or length no real file has.
        TruncatedError: the file ends within the header.
    """
    cursor = _Cursor(file)
    version = _version(cursor)
    n_tensors = cursor.count(8, MAX_TENSORS, "the number of tensors")
    n_kv = cursor.count(8, MAX_KV, "the number of key-values")
    kv: dict[str, Any] = {}
    kv_types: dict[str, str] = {}
    for i in range(n_kv):
        key = cursor.string(MAX_KEY, f"key {i}")
        if not key or key in kv:
            raise FormatError(
                f"key {key!r} occurs twice." if key else f"key {i} is empty.", where=file.path
            )
        kv_types[key], kv[key] = _value(cursor, cursor.uint(4, f"type of {key!r}"), key)
    tensors = tuple(_tensor(cursor, i) for i in range(n_tensors))
    seen: set[str] = set()
    for t in tensors:
        if t.name in seen:
            raise FormatError("the name occurs twice.", where=file.path, tensor=t.name)
        seen.add(t.name)
    alignment = checked_alignment(
        kv.get(ALIGNMENT_KEY, ALIGNMENT), kv_types.get(ALIGNMENT_KEY, "u32"), str(file.path)
    )
    return Header(version, kv, kv_types, tensors, alignment, align(cursor.offset, alignment))


def _version(cursor: _Cursor) -> int:
    where = cursor.file.path
    if cursor.file.size == 0:
        raise FormatError("the file is empty.", where=where, fix="download it again.")
    start = cursor.file.read(0, min(32, cursor.file.size))
    for prefix, what, fix in _OTHER_FORMATS:
        if start.startswith(prefix):
            raise FormatError(f"{what}.", where=where, fix=fix)
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise FormatError(f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}.", where=where)
    version = cursor.uint(4, "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            raise FormatError(
                "the file is big-endian; only little-endian GGUF is read.",
                where=where,
                fix="convert it with gguf-py's gguf_convert_endian.py.",
            )
        raise FormatError(
            f"GGUF version {version} is not supported; supported are 2 and 3.",
            where=where,
            fix="convert the original weights again with a current converter.",
        )
    return version


def _value(cursor: _Cursor, code: int, key: str) -> tuple[str, Any]:
    if code == STRING:
        return "str", cursor.string(MAX_STRING, f"value of {key!r}")
    if code in SCALARS:
        name, values = _scalars(cursor, code, 1, key)
        return name, values[0].item()
    if code != ARRAY:
        raise FormatError(
            f"key {key!r} has type {code}; GGUF defines 0 to 12.", where=cursor.file.path
        )
    item = cursor.uint(4, f"item type of {key!r}")
    count = cursor.count(8, MAX_ARRAY, f"length of array {key!r}")
    if item == STRING:
        # a string is 8 bytes at least: the file's size bounds the list before it grows
        _require_left(cursor, 8 * count, f"array {key!r}")
        return "[str]", cursor.strings(count, repr(key))
    if item in SCALARS:
        name, values = _scalars(cursor, item, count, key)
        return f"[{name}]", values
    what = "an array of arrays" if item == ARRAY else f"an array of type {item}"
    raise FormatError(
        f"key {key!r} is {what}; arrays of scalars and strings are supported.",
        where=cursor.file.path,
    )


def _require_left(cursor: _Cursor, size: int, what: str) -> None:
    left = cursor.file.size - cursor.offset
    if size > left:
        raise TruncatedError(
            f"the file ends within its header: {what} needs {size} bytes or more, {left} are left.",
            where=cursor.file.path,
            fix="download or copy the file again.",
        )


def _scalars(cursor: _Cursor, code: int, count: int, key: str) -> tuple[str, Any]:
    name, dtype = SCALARS[code]
    values = np.frombuffer(cursor.take(count * dtype.itemsize, f"value of {key!r}"), dtype)
    if code == BOOL:
        if values.size and values.max() > 1:
            raise FormatError(
                f"key {key!r} is a boolean with value {values.max()}; 0 and 1 are allowed.",
                where=cursor.file.path,
            )
        values = values.view(np.bool_)
    return name, values


def _tensor(cursor: _Cursor, i: int) -> TensorInfo:
    where = cursor.file.path
    name = check_tensor_name(cursor.string(MAX_NAME, f"name of tensor {i}"), where)
    n_dims = cursor.count(4, MAX_DIMS, f"the number of dimensions of {name!r}")
    ne = [cursor.uint(8, f"dimensions of {name!r}") for _ in range(n_dims)]
    # zeros must not hide a huge axis: NumPy multiplies the others
    if math.prod(max(n, 1) for n in ne) > MAX_WEIGHTS:
        raise LimitError(
            f"dimensions {ne} make more than 2**48 weights.",
            where=where,
            tensor=name,
            fix="the file is damaged or hostile; download it again.",
        )
    code = cursor.uint(4, f"type of {name!r}")
    return TensorInfo(name, tuple(reversed(ne)), code, cursor.uint(8, f"offset of {name!r}"))


def checked_alignment(value: Any, type_name: str, where: str) -> int:
    """``general.alignment`` if it is a u32 power of two of at most :data:`ALIGNMENT_MAX`.

    Raises:
        FormatError: it is not.
    """
    if type_name != "u32" or not 1 <= value <= ALIGNMENT_MAX or value & (value - 1):
        raise FormatError(
            f"{ALIGNMENT_KEY} is {value} ({type_name}); it must be a u32 power of two "
            f"of at most {ALIGNMENT_MAX}.",
            where=where,
        )
    return int(value)
