"""Importance matrices, llama.cpp's files of mean squared inputs: the old ``.dat`` form and the GGUF form.

Both hold, per GGUF tensor name, the sum of squared inputs of every column and how much was summed. Source: save_imatrix,
save_imatrix_legacy and load_imatrix in llama.cpp's tools/imatrix/imatrix.cpp. Names are foreign (``blk.0.attn_q.weight``)
in files; :func:`to_canonical` and :func:`to_foreign` translate.
"""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...convert.layouts.gguf import rules
from ...formats import output_fs as ofs
from ...formats.base import ContainerPlan, Slot
from ...formats.dtypes import F32
from ...formats.errors import (
    FormatError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedError,
)
from ...formats.files import InputFile
from ...formats.gguf import open_source, plan
from ...formats.names import listing
from ...model import canonical
from ...model.config import GemmaConfig

Floats = npt.NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES, _MAX_NAME = 1 << 16, 1 << 12


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """Mean squared inputs.

    Attributes:
        means: name -> float32 ``[in_features]``.
        counts: name -> tokens (GGUF form) or chunks (old form) that were summed.
        chunk_size: tokens per chunk, 0 where the file does not say.
        datasets: what it was made from, as the file says.
    """

    means: Mapping[str, Floats]
    counts: Mapping[str, int]
    chunk_size: int = 0
    datasets: tuple[str, ...] = ()


def foreign_names(config: GemmaConfig) -> dict[str, str]:
    """Canonical name -> GGUF name of every linear weight."""
    out = {}
    for rule in rules(config.family):
        for layer in range(config.num_hidden_layers):
            for name in rule.canonical:
                if "{i}" in name:
                    out[name.format(i=layer)] = rule.foreign.format(i=layer)
    return {n: out[n] for n in canonical.linears(out)}


def to_canonical(found: ImportanceMatrix, config: GemmaConfig) -> ImportanceMatrix:
    """The same under canonical names, checked against the model.

    Raises:
        MissingTensorError: linear weights without an entry.
        ShapeError: an entry of another width.
    """
    names, shapes = (
        foreign_names(config),
        {n: t.shape for n, t in canonical.tensors(config).items()},
    )
    if absent := [n for n in names.values() if n not in found.means]:
        raise MissingTensorError(
            f"the importance matrix has no entry for {len(absent)} of {len(names)} linear weights: {listing(absent, 3)}.",
            fix="make it again from this model.",
        )
    for name, foreign in names.items():
        if found.means[foreign].shape != (shapes[name][1],):
            raise ShapeError(
                f"the importance matrix has {found.means[foreign].size} columns, the weight {shapes[name][1]}.",
                tensor=name,
                fix="it is another model's; make it again from this model.",
            )
    return ImportanceMatrix(
        {n: found.means[f] for n, f in names.items()}, {n: found.counts[f] for n, f in names.items()},
        found.chunk_size, found.datasets,
    )  # fmt: skip


def to_foreign(found: ImportanceMatrix, config: GemmaConfig) -> ImportanceMatrix:
    """The same under GGUF names; only linear weights."""
    names = {c: f for c, f in foreign_names(config).items() if c in found.means}
    return ImportanceMatrix(
        {f: found.means[c] for c, f in names.items()}, {f: found.counts[c] for c, f in names.items()},
        found.chunk_size, found.datasets,
    )  # fmt: skip


def read(path: str | Path) -> ImportanceMatrix:
    """An importance matrix of either form, under the file's names.

    Raises:
        FormatError: neither form, or an entry makes no sense.
        TruncatedError: it ends early.
        LimitError: a count or length no real file has.
        NonFiniteError: an entry is NaN, infinite or negative.
    """
    path = Path(path)
    with InputFile(path) as file:
        old = file.size < 4 or file.read(0, 4) != b"GGUF"
        found = _read_dat(file) if old else None
    return _checked(found or _read_gguf(path), path)


def _checked(found: ImportanceMatrix, path: Path) -> ImportanceMatrix:
    if not found.means:
        raise FormatError(
            "no entries.", where=path, fix="pass a file that llama-imatrix or g2quant wrote."
        )
    for name, x in found.means.items():
        if not np.isfinite(x).all() or (x < 0).any():
            raise NonFiniteError("an entry is NaN, infinite or negative.", where=path, tensor=name)
    return found


def _read_gguf(path: Path) -> ImportanceMatrix:
    source = open_source(path)
    try:
        kv = source.metadata["kv"]
        if kv.get("general.type") != "imatrix":
            raise FormatError(
                f"a GGUF file of type {kv.get('general.type')!r}, expected 'imatrix'.", where=path,
                fix="pass a file that llama-imatrix or g2quant wrote.",
            )  # fmt: skip
        means, counts = {}, {}
        for full in source.tensors:
            if not full.endswith(_SUMS):
                continue
            name = full.removesuffix(_SUMS)
            if name + _COUNTS not in source.tensors:
                raise MissingTensorError("its count is missing.", where=path, tensor=full)
            sums, count = (source.tensors[name + s].read() for s in (_SUMS, _COUNTS))
            if count.size != 1 or sums.size != sums.shape[-1]:
                raise FormatError(
                    "entries of several experts; Gemma has none.", where=path, tensor=full
                )
            n = float(count.reshape(-1)[0])
            if not 0 <= n < 2**53:
                raise FormatError(f"its count is {n:g}.", where=path, tensor=full)
            flat = sums.reshape(-1).astype(np.float32)
            means[name] = _mean(flat, n)
            counts[name] = round(n)
        size = kv.get("imatrix.chunk_size", 0)
        return ImportanceMatrix(
            means,
            counts,
            size if isinstance(size, int) else 0,
            tuple(map(str, kv.get("imatrix.datasets", ()))),
        )
    finally:
        source.close()


def _mean(sums: Floats, count: float) -> Floats:
    """Sums over their count; never used columns weigh all alike, as llama-quantize takes them."""
    with np.errstate(all="ignore"):  # what is not finite is refused by name later
        return sums / np.float32(count) if count else np.ones_like(sums)


class _Cursor:
    """Fields of the old form, one after another, never past the end."""

    def __init__(self, file: InputFile) -> None:
        self.file, self.at = file, 0

    def take(self, n: int, what: str) -> bytes:
        if n > self.file.size - self.at:
            raise TruncatedError(
                f"it ends in {what}: {n} bytes at {self.at}, the file has {self.file.size}.", where=self.file.path,
                fix="copy the file again, or make it again.",
            )  # fmt: skip
        self.at += n
        return self.file.read(self.at - n, n)

    def count(self, what: str, low: int, high: int) -> int:
        n: int = struct.unpack("<i", self.take(4, what))[0]
        if not low <= n <= high:
            raise LimitError(
                f"{what} is {n}, expected {low} to {high}; this is no importance matrix.",
                where=self.file.path,
            )
        return n


def _read_dat(file: InputFile) -> ImportanceMatrix:
    at = _Cursor(file)
    means, counts = {}, {}
    for _ in range(at.count("the number of entries", 1, _MAX_ENTRIES)):
        raw = at.take(at.count("the length of a name", 1, _MAX_NAME), "a name")
        try:
            name = raw.decode()
        except UnicodeDecodeError as e:
            raise FormatError(
                "a name is not UTF-8; this is no importance matrix.", where=file.path
            ) from e
        if name in means:
            raise FormatError("the entry is there twice.", where=file.path, tensor=name)
        calls = at.count("the number of chunks", 0, 2**31 - 1)
        size = at.count("the number of values", 1, file.size // 4)
        values = np.frombuffer(at.take(4 * size, "values"), "<f4").astype(np.float32)
        means[name] = _mean(values, calls)
        counts[name] = calls
    datasets: tuple[str, ...] = ()
    if file.size - at.at >= 8:
        at.count("the number of chunks", -(2**31), 2**31 - 1)
        told = at.take(
            at.count("the length of the data set's name", 0, file.size - at.at), "its name"
        )
        datasets = (told.decode(errors="replace"),) if told else ()
    return ImportanceMatrix(means, counts, 0, datasets)


def write_dat(found: ImportanceMatrix) -> bytes:
    """The old form: per entry means times chunks. Names in order, as llama-imatrix writes them."""
    out = bytearray(struct.pack("<i", len(found.means)))
    calls = {n: max(1, math.ceil(c / (found.chunk_size or 1))) for n, c in found.counts.items()}
    for name in sorted(found.means, key=str.encode):
        raw = name.encode()
        values = np.asarray(found.means[name], np.float32) * np.float32(calls[name])
        out += struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls[name], values.size)
        out += values.astype("<f4").tobytes()
    told = "".join(found.datasets[-1:]).encode()
    return bytes(out + struct.pack("<ii", max(calls.values(), default=0), len(told)) + told)


def plan_gguf(
    found: ImportanceMatrix, file_name: str
) -> tuple[ContainerPlan, list[Slot], dict[str, Floats]]:
    """The GGUF form: its plan, slots and their arrays, for :class:`g2kit.formats.output.Output`."""
    arrays: dict[str, Floats] = {}
    for name in sorted(found.means, key=str.encode):
        count = np.float32(found.counts[name])
        arrays[name + _SUMS] = (np.asarray(found.means[name], np.float32) * count)[None]
        arrays[name + _COUNTS] = np.full((1, 1), count, np.float32)
    slots = [Slot(n, F32, a.shape) for n, a in arrays.items()]
    size = found.chunk_size or 1
    kv = [
        ("general.type", "str", "imatrix"),
        ("imatrix.datasets", "[str]", list(found.datasets)),
        ("imatrix.chunk_count", "u32", max(found.counts.values(), default=0) // size),
        ("imatrix.chunk_size", "u32", size),
    ]
    return plan(slots, kv, file_name=file_name), slots, arrays


def write(found: ImportanceMatrix, path: str | Path) -> None:
    """Write a file: the old form where the name ends in ``.dat``, else GGUF. The file appears whole or not at all."""
    path = Path(path)
    content = write_dat(found) if path.suffix == ".dat" else _gguf_bytes(found, path.name)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    try:
        with ofs.calls("write", path):
            with partial.open("xb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _gguf_bytes(found: ImportanceMatrix, name: str) -> bytes:
    files, _, arrays = plan_gguf(found, name)
    out = bytearray(files.files[0].size)
    for offset, raw in files.files[0].fixed:
        out[offset : offset + len(raw)] = raw
    for slot, chunks in files.chunks.items():
        raw = arrays[slot].astype("<f4").tobytes()
        out[chunks[0].offset : chunks[0].offset + len(raw)] = raw
    return bytes(out)
