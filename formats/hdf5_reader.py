"""HDF5 files as lazy tensors, with the C library kept in a child process (:mod:`.hdf5_process`).

Plain contiguous datasets, which is what Keras writes, are read by ``pread``: the library is asked once where they lie.
Packed ones (chunked, compressed, compact) are read through the child in blocks of rows; it decodes every chunk a
block touches and keeps none. Format: HDF5 File Format Specification 3.0, sections III and IV.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import dtypes
from .base import Array, Index, RowTensor, Tensor, iter_row_blocks, leading_rows
from .errors import (
    DtypeError,
    FormatError,
    LayoutError,
    LimitError,
    TruncatedError,
    UnsafePathError,
    printable,
)
from .files import InputFile
from .hdf5_process import DAMAGED, Hdf5Process
from .names import check_tensor_name, listing

SIGNATURE = b"\x89HDF\r\n\x1a\n"
LFS = b"version https://git-lfs"
BLOCK_BYTES = 32 << 20
MAX_RANK = 32  # the HDF5 library's own
MAX_CHUNK = 2 << 30  # decoded as a whole, in the child
MAX_RATIO = 1100  # deflate reaches 1032; nothing else packs weights better
_RESAVE = "save it again with Keras's save_weights."


class PackedTensor(Tensor):
    """A chunked, compressed or compact dataset; rows are decoded by the child process."""

    def __init__(
        self,
        name: str,
        dtype: np.dtype,
        shape: tuple[int, ...],
        where: Path,
        stored: str,
        process: Hdf5Process,
    ) -> None:
        super().__init__(name, dtype, shape, where, stored)
        self._inside = name  # the name in the file, whatever the tensor is called
        self._process = process

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`; memory is that of the rows the index touches."""
        start, stop, rest = leading_rows(self.shape, index)
        out = np.empty((stop - start, *self.shape[1:]) if self.shape else (), self.dtype)
        if out.nbytes:
            flat = memoryview(out.reshape(-1).view(np.uint8).data)
            row = math.prod(self.shape[1:]) * self.dtype.itemsize
            for a, b in iter_row_blocks(out.shape, self.dtype.itemsize, BLOCK_BYTES):
                part = flat[a * row : b * row]
                self._process.read(self.where, self._inside, start + a, start + b, part)
        return np.ascontiguousarray(out[rest]) if rest else out


@dataclass(frozen=True)
class Hdf5File:
    """One opened file.

    Attributes:
        tensors: by path inside the file, in the file's order.
        skipped: datasets no dtype of ours fits: path -> what they are.
        file: the bytes.
    """

    tensors: dict[str, Tensor]
    skipped: dict[str, str]
    file: InputFile


def open_file(path: Path, process: Hdf5Process) -> Hdf5File:
    """Every dataset of an HDF5 file as a lazy tensor; see :func:`.keras_h5.open_source` for the errors."""
    file = InputFile(path)
    try:
        _check_signature(file)
        found = process.list(path)
        _check_links(found, path)
        tensors: dict[str, Tensor] = {}
        skipped: dict[str, str] = {}
        for facts in found["datasets"]:
            name = check_tensor_name(facts["name"], path)
            dtype = _dtype(facts)
            if dtype is None:
                skipped[name] = f"{facts['type']} {facts['shape']}"
            else:
                tensors[name] = _tensor(name, facts, dtype, file, process)
        _check_overlap(t for t in tensors.values() if isinstance(t, RowTensor))
    except BaseException:
        file.close()
        raise
    return Hdf5File(tensors, skipped, file)


def _check_signature(file: InputFile) -> None:
    head = file.read(0, min(file.size, 64))
    if head.startswith(SIGNATURE):
        return
    if not head:
        raise TruncatedError(
            "the file is empty; likely an interrupted download.", where=file.path, fix=DAMAGED
        )
    if head.startswith(LFS):
        raise FormatError(
            "this is a Git LFS pointer, not the file itself.",
            where=file.path,
            fix="run `git lfs pull`.",
        )
    if head.startswith(b"PK"):
        raise FormatError(
            "this is a zip archive (.keras), not an HDF5 file.",
            where=file.path,
            fix="unpack it and pass the model.weights.h5 inside.",
        )
    raise FormatError(
        f"not an HDF5 file: it begins with {head[:8]!r}, expected {SIGNATURE!r}.",
        where=file.path,
        fix="pass a Keras .weights.h5 file.",
    )


def _check_links(found: dict[str, Any], path: Path) -> None:
    outside = [d["name"] for d in found["datasets"] if d["external"]]
    virtual = [d["name"] for d in found["datasets"] if d["layout"] == "virtual"]
    kinds: dict[str, list[str]] = {"soft": [], "external": []}
    for name, kind in found["links"]:
        kinds[kind].append(name)
    for names, what in (
        (kinds["external"], "links to other files"),
        (kinds["soft"], "symbolic links"),
        (outside, "data kept in other files"),
        (virtual, "virtual datasets"),
    ):
        if names:
            raise UnsafePathError(
                f"the file has {what}, which are not followed: {listing(names)}.",
                where=path,
                fix=_RESAVE,
            )
    if found["twice"]:
        raise LayoutError(
            f"objects are linked more than once: {listing(found['twice'])}.",
            where=path,
            fix=_RESAVE,
        )
    if found["others"]:
        raise FormatError(
            f"neither groups nor datasets: {listing(found['others'])}.", where=path, fix=_RESAVE
        )


def _dtype(facts: dict[str, Any]) -> np.dtype | None:
    """The element type; None for one that no weight has."""
    if facts["shape"] is None:
        return None
    if facts["attribute"] == "bfloat16" and facts["itemsize"] == 2:
        return dtypes.BF16 if facts["type"] in ("opaque of 2 bytes", "bf16") else None
    return dtypes.BY_SHORT.get(facts["type"])


def _tensor(
    name: str, facts: dict[str, Any], dtype: np.dtype, file: InputFile, process: Hdf5Process
) -> Tensor:
    shape = tuple(facts["shape"])
    nbytes = math.prod(shape) * dtype.itemsize
    stored = dtypes.short(dtype)
    if len(shape) > MAX_RANK:
        raise LimitError(f"it has {len(shape)} axes.", where=file.path, tensor=name, fix=DAMAGED)
    if facts["layout"] == "contiguous":
        _check_contiguous(name, facts, nbytes, file)
        return RowTensor(name, dtype, shape, file, facts["offset"] or 0, stored)
    _check_packed(name, facts, nbytes, file)
    return PackedTensor(name, dtype, shape, file.path, f"{stored} {facts['layout']}", process)


def _check_contiguous(name: str, facts: dict[str, Any], nbytes: int, file: InputFile) -> None:
    if nbytes == 0:
        return
    if facts["offset"] is None or facts["stored"] == 0:
        raise TruncatedError(
            f"the dataset has no data, expected {nbytes} bytes: it was never written.",
            where=file.path,
            tensor=name,
            fix=_RESAVE,
        )
    if facts["stored"] != nbytes:
        raise LayoutError(
            f"shape {facts['shape']} of {facts['itemsize']} bytes each takes {nbytes} bytes, "
            f"the file keeps {facts['stored']}.",
            where=file.path,
            tensor=name,
            fix=DAMAGED,
        )
    if facts["offset"] + nbytes > file.size:
        raise TruncatedError(
            f"{facts['offset'] + nbytes - file.size} bytes are missing: the data end at byte "
            f"{facts['offset'] + nbytes}, the file has {file.size}.",
            where=file.path,
            tensor=name,
            fix=DAMAGED,
        )


def _check_packed(name: str, facts: dict[str, Any], nbytes: int, file: InputFile) -> None:
    """A packed dataset must hold all its chunks, and not more than its bytes could unpack to."""
    place: dict[str, Any] = {"where": file.path, "tensor": name, "fix": _RESAVE}
    if facts["stored"] > file.size:
        raise TruncatedError(
            f"its chunks take {facts['stored']} bytes, the file has {file.size}.", **place
        )
    if nbytes > max(facts["stored"] * MAX_RATIO, 1 << 16):
        raise LimitError(
            f"{nbytes} bytes are said to be packed into {facts['stored']}, more than "
            f"{MAX_RATIO} to 1.",
            **place,
        )
    if facts["layout"] != "chunked":
        return
    chunk = facts["chunk"]
    if math.prod(chunk) * facts["itemsize"] > MAX_CHUNK:
        raise LimitError(f"chunks of {chunk} are larger than {MAX_CHUNK} bytes.", **place)
    expected = math.prod(-(-n // max(c, 1)) for n, c in zip(facts["shape"], chunk, strict=True))
    if facts["chunks"] != expected:
        raise TruncatedError(  # HDF5 itself would give zeros for them
            f"{facts['chunks']} of {expected} chunks are in the file.", **place
        )


def _check_overlap(tensors: Iterable[RowTensor]) -> None:
    end, before = 0, None
    for t in sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset):
        if before is not None and t.offset < end:
            raise LayoutError(
                f"its bytes {t.offset} to {t.offset + t.nbytes} overlap those of "
                f"{printable(before.name)}, which end at {end}.",
                where=t.where,
                tensor=t.name,
                fix=DAMAGED,
            )
        end, before = t.offset + t.nbytes, t


def unsupported(name: str, what: str, path: Path) -> DtypeError:
    """The complaint about a weight of a type no container of ours holds."""
    known = ", ".join(sorted(dtypes.BY_SHORT))
    return DtypeError(
        f"stored as {printable(what, 80)}; supported are {known} (bf16 as 2-byte opaque with the "
        'attribute dtype = "bfloat16").',
        where=path,
        tensor=name,
        fix=_RESAVE,
    )
