"""``arrays.safetensors``: the file's hash, exactly the arrays of its kind, and numbers that can be what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.base import Array, RowTensor, iter_row_blocks
from ..formats.errors import (
    ChecksumError,
    DtypeError,
    ExtraTensorError,
    FormatError,
    G2Error,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TokenizerError,
    TruncatedError,
)
from ..formats.files import InputFile
from ..formats.manifest import file_digest
from ..formats.names import listing
from ..formats.safetensors_header import read_header
from . import recording_schema as schema
from .recording_document import DAMAGED

_BLOCK = 16 << 20


def open_arrays(
    file: InputFile, entry: Mapping[str, Any], sizes: schema.Sizes
) -> dict[str, RowTensor]:
    """Check the file and everything in it; reads it twice, a block at a time.

    Args:
        file: the opened file, which stays the caller's to close.
        entry: its size and sha256 as the document has them.
        sizes: what must be in it.

    Raises:
        G2Error: see :func:`.recording_read.open_recording`.
    """
    check_file(file, entry)
    tensors = _tensors(file, sizes)
    _check_numbers(tensors, sizes, file.path)
    return tensors


def check_file(file: InputFile, entry: Mapping[str, Any]) -> None:
    """Raise unless a file has the size and sha256 that the document gives."""
    if file.size != entry["size"]:
        kind: type[G2Error] = TruncatedError if file.size < entry["size"] else ChecksumError
        raise kind(
            f"the file has {file.size} bytes, the recording says {entry['size']}.",
            where=file.path,
            fix=DAMAGED,
        )
    found = file_digest(file)
    if found != entry["sha256"]:
        raise ChecksumError(
            f"the file's sha256 is {found}, the recording says {entry['sha256']}.",
            where=file.path,
            fix=f"the recording was changed or damaged; {DAMAGED}",
        )


def _tensors(file: InputFile, sizes: schema.Sizes) -> dict[str, RowTensor]:
    """Exactly the arrays of these sizes. The file's hash is right, so a difference means a foreign writer."""
    header = read_header(file)
    found = {e.name: e for e in header.entries}
    wanted = {s.name: s for s in schema.slots(sizes)}
    if missing := sorted(wanted.keys() - found.keys()):
        raise MissingTensorError(
            f"arrays are missing: {listing(missing)}.", where=file.path, fix=DAMAGED
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise ExtraTensorError(
            f"a recording of kind {sizes.kind} has no such arrays: {listing(extra)}.",
            where=file.path,
            fix=DAMAGED,
        )
    tensors = {}
    for name, slot in wanted.items():
        e = found[name]
        if e.dtype != slot.dtype:
            raise DtypeError(
                f"the array holds {e.dtype}, expected {slot.dtype}.", where=file.path, tensor=name
            )
        if e.shape != slot.shape:
            raise ShapeError(
                f"the array's shape is {e.shape}, expected {slot.shape}.",
                where=file.path,
                tensor=name,
            )
        tensors[name] = RowTensor(name, e.dtype, e.shape, file, header.size + e.begin, e.stored)
    return tensors


def _check_numbers(tensors: Mapping[str, RowTensor], sizes: schema.Sizes, where: Path) -> None:
    for name, tensor in tensors.items():
        rule = _RULES.get(name)
        for start, stop in iter_row_blocks(tensor.shape, tensor.dtype.itemsize, _BLOCK):
            rows = tensor.read((slice(start, stop),))
            if tensor.dtype.kind not in "iu":  # bfloat16's kind is V
                _require_finite(rows, start, name, where)
            if rule is not None and not rule(rows, sizes):
                kind, what = _COMPLAINTS[name]
                raise kind(
                    f"in rows {start} to {stop}: {what}.", where=where, tensor=name, fix=DAMAGED
                )
    _check_largest(tensors, where)


def _require_finite(rows: Array, start: int, name: str, where: Path) -> None:
    bad = np.argwhere(~np.isfinite(rows.astype(np.float32, copy=False)))
    if len(bad):
        raise NonFiniteError(
            f"row {start + int(bad[0][0])} has a NaN or infinity.",
            where=where,
            tensor=name,
            fix=DAMAGED,
        )


def _ids_valid(rows: Array, sizes: schema.Sizes) -> bool:
    return bool(((rows >= 0) & (rows < sizes.vocab)).all())


def _ids_distinct(rows: Array, sizes: schema.Sizes) -> bool:
    return _ids_valid(rows, sizes) and bool((np.diff(np.sort(rows, axis=1), axis=1) > 0).all())


_RULES: dict[str, Callable[[Array, schema.Sizes], bool]] = {
    "tokens": _ids_valid,
    "topk_id": _ids_distinct,
    "topk_logit": lambda rows, _: bool((np.diff(rows, axis=1) <= 0).all()),
    "norm": lambda rows, _: bool((rows >= 0).all()),
    "sample_at": lambda rows, s: bool(
        (rows >= 0).all() and (rows < s.positions).all() and (np.diff(rows) > 0).all()
    ),
}
_COMPLAINTS: dict[str, tuple[type[G2Error], str]] = {
    "tokens": (TokenizerError, "a token is outside the vocabulary"),
    "topk_id": (FormatError, "a token is outside the vocabulary or named twice"),
    "topk_logit": (FormatError, "the largest logits are not in descending order"),
    "norm": (FormatError, "a norm is negative"),
    "sample_at": (FormatError, "sampled positions are not ascending positions of the recording"),
}


def _check_largest(tensors: Mapping[str, RowTensor], where: Path) -> None:
    """The largest logits are part of the sum whose logarithm is recorded."""
    lse, top = tensors["lse"], tensors["topk_logit"]
    for start, stop in iter_row_blocks(top.shape, top.dtype.itemsize, _BLOCK):
        part = (slice(start, stop),)
        logits = top.read(part).astype(np.float64)
        first = logits[:, :1]
        share = first[:, 0] + np.log(np.exp(logits - first).sum(1))
        bad = np.flatnonzero(share > lse.read(part) + 1e-5 * (1 + np.abs(share)))
        if len(bad):
            raise FormatError(
                f"row {start + int(bad[0])}: the log-sum-exp is less than its largest logits give.",
                where=where,
                tensor="lse",
                fix=DAMAGED,
            )
