"""What ``.zarray`` (zarr 2) and ``zarr.json`` (zarr 3) say about one array, checked and bounded.

Only the subset that tensorstore's ``zarr`` and ``zarr3`` drivers write for Orbax is decoded by g2kit itself, because
decoding zstd as a stream is twice as fast and needs no memory for whole chunks. Everything else those
drivers can read (other compressors, Fortran order, transposed or checksummed chunks) is marked :attr:`ZarrArray.foreign`
and left to tensorstore.
Sources: zarr v2 and v3 specifications, tensorstore's driver documentation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .dtypes import BF16, TABLE
from .errors import DtypeError, FormatError, LimitError, printable

MAX_RANK = 32
MAX_ARRAY_BYTES = 1 << 40
MAX_CHUNKS = 1 << 20
ABSENT = 2**64 - 1  # offset and length of an inner chunk that a shard does not hold

_NUMPY_3 = {
    "bool": "?",
    **{f"int{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"uint{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
    **{f"float{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    "complex64": "<c8",
}
_EXTENDED = {
    "bfloat16": BF16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
DTYPES_3: dict[str, np.dtype] = {k: np.dtype(v) for k, v in _NUMPY_3.items()} | _EXTENDED
DTYPES_2: dict[str, np.dtype] = {d.str: d for d in map(np.dtype, _NUMPY_3.values())} | _EXTENDED
STORABLE_2: dict[np.dtype, str] = {
    row.dtype: name for row in TABLE for name, dtype in DTYPES_2.items() if dtype == row.dtype
}
_COMPRESSORS_2 = {None: "raw", "zstd": "zstd", "gzip": "gzip", "zlib": "zlib"}
_COMPRESSORS_3 = {(): "raw", ("zstd",): "zstd", ("gzip",): "gzip"}


@dataclass(frozen=True)
class Shards:
    """zarr 3 ``sharding_indexed``: several chunks in one stored value, found through an index.

    Attributes:
        shape: elements of one shard on every axis.
        checksummed: the index ends with its own CRC-32C.
        at_end: the index is the value's tail, else its head.
        per_shard: chunks of a shard on every axis.
    """

    shape: tuple[int, ...]
    checksummed: bool
    at_end: bool
    per_shard: tuple[int, ...]

    @property
    def index_bytes(self) -> int:
        """Size of the index: offset and length per chunk, and the checksum."""
        return 16 * math.prod(self.per_shard) + 4 * self.checksummed


@dataclass(frozen=True)
class ZarrArray:
    """One array's metadata.

    Attributes:
        version: 2 or 3.
        dtype: element type, native byte order.
        shape: the array's.
        chunk: elements of one separately compressed box on every axis.
        codec: ``raw``, ``zstd``, ``gzip`` or ``zlib``.
        shards: zarr 3 shards around the chunks, or None.
        fill: the value absent chunks read as, or None when the metadata names none.
        prefix: first part of a stored value's key.
        separator: what joins the chunk's indices in a key.
        foreign: why g2kit cannot decode the chunks itself, or None.
        keyed: whether the keys of stored values are known (not for unusual chunk grids).
        stored: dtype and compressor, for tables.
    """

    version: int
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    codec: str
    shards: Shards | None
    fill: Any
    prefix: str
    separator: str
    foreign: str | None
    keyed: bool
    stored: str

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decoded chunk; chunks at the edge are stored whole."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Elements on every axis of what one key holds: a shard or a chunk."""
        return self.shards.shape if self.shards else self.chunk

    def value_grid(self) -> tuple[int, ...]:
        """Stored values (keys) on every axis."""
        return grid(self.shape, self.value_shape)

    def value_key(self, index: Sequence[int]) -> str:
        """Key, relative to the array's own, of the stored value at a place of :meth:`value_grid`."""
        parts = [*([self.prefix] if self.prefix else []), *(str(i) for i in index)]
        return self.separator.join(parts) if parts else "0"

    def value_keys(self) -> Iterator[str]:
        """Every key a complete array has."""
        for index in itertools.product(*map(range, self.value_grid())):
            yield self.value_key(index)


def grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    """Boxes of ``chunk`` needed to cover ``shape``, per axis."""
    return tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))


def parse(meta: Any, *, where: Path, tensor: str, version: int) -> ZarrArray:
    """Check one array's JSON.

    Args:
        meta: the parsed ``.zarray`` or ``zarr.json``.
        where: the checkpoint, for messages.
        tensor: the array's name, for messages.
        version: 2 for ``.zarray``, 3 for ``zarr.json``.

    Raises:
        FormatError: a field is missing or malformed.
        DtypeError: the element type is none that g2kit moves.
        LimitError: larger than any real array.
    """
    reader = _Fields(meta, where, tensor)
    array = (_parse2 if version == 2 else _parse3)(reader)
    if array.nbytes > MAX_ARRAY_BYTES or array.chunk_bytes > MAX_ARRAY_BYTES:
        raise LimitError(
            f"shape {array.shape} in chunks of {array.chunk} is {array.nbytes} bytes, at most "
            f"{MAX_ARRAY_BYTES} are read.",
            where=where,
            tensor=tensor,
        )
    values = math.prod(array.value_grid())
    inside = math.prod(array.shards.per_shard) if array.shards else 1
    if values > MAX_CHUNKS or inside > MAX_CHUNKS:
        raise LimitError(
            f"shape {array.shape} in {max(values, inside)} chunks, at most {MAX_CHUNKS} are read.",
            where=where,
            tensor=tensor,
        )
    return array


class _Fields:
    """Typed access to a JSON object; every complaint names the array."""

    def __init__(self, value: Any, where: Path, tensor: str) -> None:
        self.where, self.tensor = where, tensor
        if not isinstance(value, dict):
            raise self.bad(f"the array's metadata must be a JSON object, found {_show(value)}")
        self.value: dict[str, Any] = value

    def bad(self, what: str) -> FormatError:
        return FormatError(f"{what}.", where=self.where, tensor=self.tensor)

    def sub(self, value: Any) -> _Fields:
        return _Fields(value, self.where, self.tensor)

    def dims(self, name: str, least: int) -> tuple[int, ...]:
        value = self.value.get(name)
        if not isinstance(value, list) or len(value) > MAX_RANK:
            raise self.bad(
                f"{name} must be a list of at most {MAX_RANK} sizes, found {_show(value)}"
            )
        for n in value:
            if type(n) is not int or not least <= n < 2**62:
                raise self.bad(f"{name} holds {_show(n)}, which is no size")
        return tuple(value)

    def dtype(self, name: str, table: Mapping[str, np.dtype]) -> np.dtype:
        value = self.value.get(name)
        if not isinstance(value, str) or value not in table:
            raise DtypeError(
                f"element type {_show(value)} is not supported; supported are {', '.join(table)}.",
                where=self.where,
                tensor=self.tensor,
            )
        return table[value]

    def named(self, value: Any) -> tuple[str, _Fields]:
        """A zarr 3 extension: ``{"name": …, "configuration": {…}}`` or just its name."""
        if isinstance(value, str):
            return value, self.sub({})
        inner = self.sub(value)
        name = inner.value.get("name")
        if not isinstance(name, str):
            raise self.bad(f"an extension has no name: {_show(value)}")
        return name, self.sub(inner.value.get("configuration", {}))

    def codecs(self, name: str) -> list[tuple[str, _Fields]]:
        value = self.value.get(name)
        if not isinstance(value, list) or not value or len(value) > MAX_RANK:
            raise self.bad(f"{name} must be a short list, found {_show(value)}")
        return [self.named(codec) for codec in value]


def _show(value: Any) -> str:
    return printable(repr(value), 80)


def _same_rank(fields: _Fields, shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    if len(shape) != len(chunk):
        raise fields.bad(f"shape {shape} and chunks {chunk} differ in the number of axes")


def _parse2(f: _Fields) -> ZarrArray:
    shape, chunk = f.dims("shape", 0), f.dims("chunks", 1)
    _same_rank(f, shape, chunk)
    name = f.value.get("dtype")
    swapped = isinstance(name, str) and name.startswith(">") and "<" + name[1:] in DTYPES_2
    dtype = DTYPES_2["<" + str(name)[1:]] if swapped else f.dtype("dtype", DTYPES_2)
    compressor = f.value.get("compressor")
    kind = None if compressor is None else f.sub(compressor).value.get("id")
    if not (kind is None or isinstance(kind, str)):
        raise f.bad(f"the compressor has no id: {_show(compressor)}")
    separator = f.value.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise f.bad(f'dimension_separator must be "." or "/", found {_show(separator)}')
    reasons = (
        (kind not in _COMPRESSORS_2, f"compressor {_show(kind)}"),
        (swapped, "big-endian elements"),
        (f.value.get("order", "C") != "C", f"element order {_show(f.value.get('order'))}"),
        (bool(f.value.get("filters")), "filters"),
    )
    return ZarrArray(
        version=2,
        dtype=dtype,
        shape=shape,
        chunk=chunk,
        codec=_COMPRESSORS_2.get(kind, "foreign"),
        shards=None,
        fill=f.value.get("fill_value"),
        prefix="",
        separator=separator,
        foreign=next((why for broken, why in reasons if broken), None),
        keyed=True,
        stored=f"{name}, {kind or 'raw'}",
    )


def _parse3(f: _Fields) -> ZarrArray:
    if f.value.get("node_type", "array") != "array":
        raise f.bad(f"node_type must be array, found {_show(f.value.get('node_type'))}")
    shape, dtype = f.dims("shape", 0), f.dtype("data_type", DTYPES_3)
    grid_name, grid_conf = f.named(f.value.get("chunk_grid"))
    regular = grid_name == "regular"
    value = grid_conf.dims("chunk_shape", 1) if regular else tuple(max(n, 1) for n in shape)
    _same_rank(f, shape, value)
    keys, key_conf = f.named(f.value.get("chunk_key_encoding"))
    separator = key_conf.value.get("separator", {"default": "/", "v2": "."}.get(keys))
    known_keys = keys in ("default", "v2") and separator in (".", "/")
    codecs = f.codecs("codecs")
    shards, inner = None, value
    if codecs[0][0] == "sharding_indexed" and len(codecs) == 1 and regular:
        shards, inner, codecs = _shards(codecs[0][1], value)
    codec, chain = _codec_chain(codecs)
    reasons = (
        (not regular, f"chunk grid {_show(grid_name)}"),
        (not known_keys, f"chunk keys {_show(keys)}"),
        (codec is None, f"codecs {_show(chain)}"),
        (bool(f.value.get("storage_transformers")), "storage transformers"),
    )
    foreign = next((why for broken, why in reasons if broken), None)
    return ZarrArray(
        version=3,
        dtype=dtype,
        shape=shape,
        chunk=inner,
        codec=codec or "foreign",
        shards=shards,
        fill=f.value.get("fill_value"),
        prefix="c" if keys == "default" else "",
        separator=str(separator) if known_keys else "/",
        foreign=foreign,
        keyed=regular and known_keys and not f.value.get("storage_transformers"),
        stored=f"{f.value['data_type']}, {codec or 'zarr3'}{', sharded' if shards else ''}",
    )


def _codec_chain(codecs: list[tuple[str, _Fields]]) -> tuple[str | None, list[str]]:
    """``bytes`` (little-endian) and at most one compressor, else None; and the chain's names."""
    names = [name for name, _ in codecs]
    little = names[0] == "bytes" and codecs[0][1].value.get("endian", "little") == "little"
    return (_COMPRESSORS_3.get(tuple(names[1:])) if little else None), names


def _shards(
    f: _Fields, shape: tuple[int, ...]
) -> tuple[Shards | None, tuple[int, ...], list[tuple[str, _Fields]]]:
    inner = f.dims("chunk_shape", 1)
    _same_rank(f, shape, inner)
    if any(n % c for n, c in zip(shape, inner, strict=True)):
        raise f.bad(f"chunks {inner} do not divide their shard {shape}")
    index = [name for name, _ in f.codecs("index_codecs")]
    place = f.value.get("index_location", "end")
    if index not in (["bytes"], ["bytes", "crc32c"]) or place not in ("start", "end"):
        return None, shape, [("sharding_indexed", f)]
    per_shard = tuple(n // c for n, c in zip(shape, inner, strict=True))
    shards = Shards(shape, index[-1] == "crc32c", place == "end", per_shard)
    return shards, inner, f.codecs("codecs")
