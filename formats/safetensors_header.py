"""The header of a safetensors file: bytes to checked entries.

The parser is our own: the official one names neither file nor tensor in its errors, keeps the last of two equal
names, and maps the file into memory, where a truncated file ends the process. Everything it refuses is refused here.
Source: safetensors README ("Format") and ``safetensors/src/tensor.rs``, 0.8.

File: u64 little-endian length of the header; JSON header, padded with spaces to a multiple of 8; payload. Tensor
offsets count from the header's end, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from . import dtypes, strict_json
from .errors import (
    DtypeError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    MissingTensorError,
    TruncatedError,
    printable,
)
from .files import InputFile
from .names import check_tensor_name, listing

MAX_HEADER = 100_000_000  # the official reader's limit
MAX_TENSORS = 50_000  # Gemma 2 27B has 508
_MAX_SEPARATORS = 20 * MAX_TENSORS
_MAX_AXES = 32
METADATA = "__metadata__"
_LFS = b"version https://git-lfs"
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, such as a PyTorch .bin or .ckpt",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "gzip data",
    b"\x80\x02": "a Python pickle",
    b"{": "a JSON text",
    b"<": "an HTML or XML page, such as a failed download",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the header; bytes ``begin:end`` of the payload."""

    name: str
    stored: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        size: bytes before the payload.
        metadata: ``__metadata__``.
        entries: by position; they cover the payload exactly.
        notes: odd but harmless findings.
    """

    size: int
    metadata: Mapping[str, str]
    entries: list[Entry]
    notes: list[str]


def read_header(file: InputFile) -> Header:
    """Read and check everything before the payload.

    Raises:
        FormatError: not safetensors; doubled, missing or unusable keys.
        TruncatedError: the file ends before its header or its data do.
        LimitError: header, tensor count or shape beyond any real checkpoint.
        LayoutError: byte ranges overlap, leave holes or do not fit the shapes.
        DtypeError: an element type g2kit does not move.
        MissingTensorError: no tensors.
    """
    content, size = _parse(file)
    notes: list[str] = []
    metadata = _metadata(content.pop(METADATA, {}), file.path)
    entries = _entries(content, file.path, notes)
    _check_coverage(entries, file.path, file.size - size)
    return Header(size, metadata, entries, notes)


def _parse(file: InputFile) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the payload begins."""
    start = file.read(0, min(file.size, len(_LFS)))
    if start == _LFS:
        raise FormatError(
            "this is a Git LFS pointer, not the weights it stands for.",
            where=file.path,
            fix="run `git lfs pull` in the repository.",
        )
    if file.size < 8:
        raise TruncatedError(
            f"the file has {file.size} B and a header needs 8; likely an interrupted download or "
            "Git LFS pointer.",
            where=file.path,
            fix="download or copy the file again.",
        )
    length = int.from_bytes(start[:8], "little")
    if length > min(MAX_HEADER, file.size - 8):
        raise _bad_length(file, start, length)
    raw = file.read(8, length)
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:  # before parsing, which takes seconds for millions
        raise LimitError(f"{count} tensors, at most {MAX_TENSORS} are read.", where=file.path)
    if not raw.startswith(b"{"):
        raise FormatError(
            f"the header of {length} B must begin with {{, found {raw[:8]!r}.",
            where=file.path,
            fix="download the file again; it is damaged or not safetensors.",
        )
    header = strict_json.loads(
        raw, where=file.path, max_depth=16, max_values=_MAX_SEPARATORS
    )  # fmt: skip
    if len(header) > MAX_TENSORS + 1:
        raise LimitError(f"{len(header)} tensors, at most {MAX_TENSORS} are read.", where=file.path)
    return header, 8 + length


def _bad_length(file: InputFile, start: bytes, length: int) -> G2Error:
    for magic, what in _OTHER_FORMATS.items():
        if start.startswith(magic):
            return FormatError(
                f"this is {what}, not safetensors.", where=file.path, fix="pass the right file."
            )
    if length > MAX_HEADER:
        return LimitError(
            f"the header's length says {length} B, at most {MAX_HEADER} are read.",
            where=file.path,
            fix="download the file again; it is damaged or not safetensors.",
        )
    return TruncatedError(
        f"the header's length says {length} B, the file has {file.size - 8} behind it.",
        where=file.path,
        fix="download or copy the file again.",
    )


def _metadata(found: Any, path: Path) -> Mapping[str, str]:
    if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
        return found
    raise FormatError(
        f"{METADATA} must be an object of strings, found {printable(repr(found), 80)}.", where=path
    )


def _entries(header: Mapping[str, Any], path: Path, notes: list[str]) -> list[Entry]:
    """Checked entries by position."""
    entries, unknown = [], set()
    for name, info in header.items():
        check_tensor_name(name, path)
        entries.append(_entry(name, info, path))
        unknown |= info.keys() - {"dtype", "shape", "data_offsets"}
    if not entries:
        raise MissingTensorError("the file holds no tensors.", where=path)
    if unknown:
        notes.append(f"{printable(path.name)}: unknown header fields: {listing(sorted(unknown))}.")
    return sorted(entries, key=lambda e: (e.begin, e.end))


def _entry(name: str, info: Any, path: Path) -> Entry:
    if not isinstance(info, dict):
        raise FormatError(
            f"the tensor's entry must be an object, found {strict_json.type_name(info)}.",
            where=path,
            tensor=name,
        )
    absent = [k for k in ("dtype", "shape", "data_offsets") if k not in info]
    if absent:
        raise FormatError(f"the tensor's entry lacks {listing(absent)}.", where=path, tensor=name)
    shape = _whole_numbers(info["shape"], "shape", path, name)
    offsets = _whole_numbers(info["data_offsets"], "data_offsets", path, name)
    dtype = _dtype(info["dtype"], path, name)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise LayoutError(
            f"data_offsets must be [begin, end], found {printable(str(offsets), 80)}.",
            where=path,
            tensor=name,
        )
    begin, end = offsets
    count = math.prod(n for n in shape if n)  # a zero must not hide an absurd axis
    if len(shape) > _MAX_AXES or count * dtype.itemsize >= 1 << 63:
        raise LimitError(
            f"shape {printable(str(shape), 80)} is larger than any file.", where=path, tensor=name
        )
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin:
        raise LayoutError(
            f"shape {shape} x {dtype.itemsize} B = {needed} B, but bytes {begin} to {end} are "
            f"{end - begin} B.",
            where=path,
            tensor=name,
        )
    return Entry(name, info["dtype"], dtype, tuple(shape), begin, end)


def _whole_numbers(found: Any, what: str, path: Path, name: str) -> list[int]:
    if isinstance(found, list) and all(type(n) is int and n >= 0 for n in found):
        return found
    raise FormatError(
        f"{what} must be whole numbers from 0, found {printable(json.dumps(found), 80)}.",
        where=path,
        tensor=name,
    )


def _dtype(stored: Any, path: Path, name: str) -> np.dtype:
    if not isinstance(stored, str):
        raise FormatError(
            f"dtype must be a string, found {strict_json.type_name(stored)}.",
            where=path,
            tensor=name,
        )
    if stored not in dtypes.BY_SAFETENSORS:
        raise DtypeError(
            f'dtype "{printable(stored, 40)}" is not supported; supported are '
            f"{', '.join(dtypes.BY_SAFETENSORS)}.",
            where=path,
            tensor=name,
        )
    return dtypes.BY_SAFETENSORS[stored]


def _check_coverage(entries: Sequence[Entry], path: Path, size: int) -> None:
    """Every payload byte belongs to exactly one tensor; ``size`` bytes are there."""
    first, last = entries[0], entries[-1]
    if first.begin:
        raise LayoutError(
            f"the first tensor begins at byte {first.begin} of the data, not at 0.",
            where=path,
            tensor=first.name,
        )
    for a, b in pairwise(entries):
        if a.end != b.begin:
            fault = "overlaps" if b.begin < a.end else "leaves a hole behind"
            raise LayoutError(
                f'{fault} "{printable(a.name)}": it begins at byte {b.begin}, the other ends at '
                f"{a.end}.",
                where=path,
                tensor=b.name,
            )
    if last.end > size:
        raise TruncatedError(
            f"missing {last.end - size} B of {printable(path.name)}: the header describes "
            f"{last.end} B of data, the file has {size}.",
            where=path,
            fix="download or copy the file again.",
        )
    if last.end < size:
        raise LayoutError(
            f"{size - last.end} extra bytes follow the last tensor.",
            where=path,
            fix="download the file again; other data was appended to it.",
        )
