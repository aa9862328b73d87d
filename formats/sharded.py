"""Hugging Face's sharded checkpoints: an index that says which file holds which tensor, and the files.

The same for ``model.safetensors.index.json`` and ``pytorch_model.bin.index.json``; containers pass their own way to
open one shard. transformers follows paths out of the directory and fills absent tensors with random numbers; here
the index and the shards must agree exactly. Source: huggingface_hub.split_state_dict_into_shards_factory.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from . import strict_json
from .base import FilePlan, Slot, Source, Tensor, iter_row_blocks
from .errors import (
    ExtraTensorError,
    FormatError,
    MissingTensorError,
    UsageError,
    printable,
)
from .names import check_file_name, check_tensor_name, inside, listing

_COMPARE_BYTES = 8 << 20
_UNITS = {
    "b": 1,
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", 1)},
    **{f"{unit}ib": 1024**power for power, unit in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]{0,3})", re.ASCII)
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.")

# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]
    metadata: Mapping[str, Any]


def load_index(index_path: Path) -> dict[str, str]:
    """The index's map from tensor to the plain name of the file beside it that holds the tensor.

    Args:
        index_path: ``*.index.json``.

    Raises:
        FormatError: not JSON, doubled keys, no ``weight_map``, or a value that is not a string.
        LimitError: too large to be an index.
        MissingTensorError: it names no tensor.
        UnsafePathError: a file name that leaves the directory.
    """
    return _load(index_path).weight_map


def _load(index_path: Path) -> _Index:
    content = strict_json.load_object(index_path)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(
            f"a shard index needs an object under weight_map, found {_kind(content, 'weight_map')}.",
            where=index_path,
            fix="pass the checkpoint's *.index.json, or its directory.",
        )
    for name, file in weight_map.items():
        check_tensor_name(name, index_path)
        if not isinstance(file, str):
            raise FormatError(
                f"weight_map must name a file, found {strict_json.type_name(file)}.",
                where=index_path,
                tensor=name,
            )
    for file in set(weight_map.values()):
        check_file_name(file, index_path)
    if not weight_map:
        raise MissingTensorError("weight_map names no tensor.", where=index_path)
    metadata = content.get("metadata", {})
    return _Index(weight_map, metadata if isinstance(metadata, dict) else {})


def _kind(content: Mapping[str, Any], key: str) -> str:
    return strict_json.type_name(content[key]) if key in content else "nothing"


def join(index_path: Path, open_shard: Callable[[Path], Source], format: str) -> Source:
    """All shards of an index as one source; tensors in the order of files, then of each file.

    Args:
        index_path: ``*.index.json``.
        open_shard: opens one file of this container.
        format: :attr:`.base.Source.format` of the result.

    Returns:
        A source whose ``files`` are the shards; ``notes`` tell of wrong totals, equal doubled tensors and signs that
        the shards are of two revisions.

    Raises:
        MissingTensorError: files or tensors that the index names are absent; all are listed.
        ExtraTensorError: shards hold tensors that the index does not name; all are listed.
        FormatError: two shards hold different tensors under one name.
        UnsafePathError: see :func:`load_index` and :func:`.names.inside`.
    """
    index = _load(index_path)
    paths = _shard_paths(index_path, index.weight_map)
    shards: dict[str, Source] = {}
    try:
        for file, path in paths.items():
            shards[file] = open_shard(path)
        tensors, notes = _merge(index_path, index.weight_map, shards)
    except BaseException:
        _each(s.close for s in shards.values())
        raise
    notes = [n for s in shards.values() for n in s.notes] + notes
    notes += _wrong_totals(index, tensors) + _mixed_revisions(shards)
    return Source(
        format=format,
        path=index_path,
        tensors=tensors,
        metadata={k: v for s in reversed(shards.values()) for k, v in s.metadata.items()},
        files=tuple(paths.values()),
        notes=notes,
        check_unchanged=lambda: _each(s.check_unchanged for s in shards.values()),
        close=lambda: _each(s.close for s in shards.values()),
    )


def _each(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _shard_paths(index_path: Path, weight_map: Mapping[str, str]) -> dict[str, Path]:
    held: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        held[file].append(name)
    found = {file: inside(index_path.parent, file) for file in sorted(held)}
    absent = [file for file, path in found.items() if path is None]
    if absent:
        lost = sum(len(held[f]) for f in absent)
        raise MissingTensorError(
            f"{len(absent)} of {len(found)} shards are missing, with {lost} tensors: "
            + "; ".join(f"{printable(f, 100)} ({listing(held[f], 3)})" for f in absent[:20])
            + (f"; and {len(absent) - 20} more shards." if len(absent) > 20 else "."),
            where=index_path,
            fix="download or copy the missing files into the index's directory.",
        )
    return {file: path for file, path in found.items() if path is not None}


def _merge(
    index_path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Source]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors where the index says they are; notes on harmless copies elsewhere."""
    absent = [f"{n} ({f})" for n, f in weight_map.items() if n not in shards[f].tensors]
    if absent:
        raise MissingTensorError(
            f"{len(absent)} tensors are not in the shards that the index names: {listing(absent)}.",
            where=index_path,
            fix="the index and the shards are of different revisions; download all files again.",
        )
    extra = [f"{n} ({f})" for f, s in shards.items() for n in s.tensors if n not in weight_map]
    if extra:
        raise ExtraTensorError(
            f"{len(extra)} tensors are in the shards but not in the index: {listing(extra)}.",
            where=index_path,
            fix="the index and the shards are of different revisions; download all files again.",
        )
    notes = []
    for file, source in shards.items():
        for name in source.tensors:
            if weight_map[name] != file:
                notes.append(_same_copy(name, shards[weight_map[name]].tensors[name], source))
    tensors = {n: t for f, s in shards.items() for n, t in s.tensors.items() if weight_map[n] == f}
    return tensors, notes


def _same_copy(name: str, kept: Tensor, other: Source) -> str:
    copy = other.tensors[name]
    if not _equal(kept, copy):
        raise FormatError(
            f"two shards hold different values: {printable(kept.where.name)} "
            f"({kept.stored} {list(kept.shape)}) and {printable(copy.where.name)} "
            f"({copy.stored} {list(copy.shape)}).",
            where=copy.where,
            tensor=name,
            fix="the shards are of different revisions; download all files again.",
        )
    return (
        f"{printable(name)} is in {printable(kept.where.name)} and again, equal, "
        f"in {printable(copy.where.name)}."
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.stored) != (b.shape, b.dtype, b.stored):
        return False
    for start, stop in iter_row_blocks(a.shape, a.dtype.itemsize, _COMPARE_BYTES):
        rows = (slice(start, stop),) if a.shape else ()
        x, y = (t.read(rows).reshape(-1).view(np.uint8) for t in (a, b))
        if not np.array_equal(x, y):
            return False
    return True


def _wrong_totals(index: _Index, tensors: Mapping[str, Tensor]) -> list[str]:
    if any(t.quantized for t in tensors.values()):
        return []  # totals are of stored bytes, which Tensor.nbytes is not here
    found = {
        "total_size": sum(t.nbytes for t in tensors.values()),
        "total_parameters": sum(math.prod(t.shape) for t in tensors.values()),
    }
    return [
        f"the index's {key} is {printable(str(index.metadata[key]), 40)}, the shards hold {total}."
        for key, total in found.items()
        if key in index.metadata and index.metadata[key] != total
    ]


def _mixed_revisions(shards: Mapping[str, Source]) -> list[str]:
    """Signs that shards of two revisions were mixed: nothing in the format would tell."""
    items = list(shards.items())
    first, source = items[0]
    dtypes = {t.stored for t in source.tensors.values()}
    notes = []
    for file, other in items[1:]:
        stored = {t.stored for t in other.tensors.values()}
        if other.metadata != source.metadata:
            differ = "metadata"
        elif stored.isdisjoint(dtypes):
            differ = f"dtype ({'/'.join(sorted(dtypes))}, {'/'.join(sorted(stored))})"
        else:
            continue
        notes.append(f"{first} and {file} differ in {differ}; they may be of two revisions.")
    counts = {m[2] for f in shards if (m := _NUMBERED.search(f))}
    if len(counts) > 1:
        notes.append(f"shards number themselves of {' and of '.join(sorted(counts))} files.")
    return notes


# ---------------------------------------------------------------- writing


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (10^9), ``500MiB`` (2^20), ``2.5 GB`` or ``1000000``; any case.

    Raises:
        UsageError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    factor = _UNITS.get(match[2] or "b", 0) if match else 0
    size = int(Decimal(match[1]) * factor) if match else 0
    if size < 1:
        raise UsageError(
            f'"{printable(text, 40)}" is not a size.',
            fix="give bytes or a number with kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 5GB.",
        )
    return size


def size_of(name: str, given: int | str | None) -> int | None:
    """Bytes of the argument ``name``, a number or a text such as ``5GB``; None stays.

    Raises:
        UsageError: not a size, or less than one byte.
    """
    if isinstance(given, str):
        return parse_size(given)
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise UsageError(
            f"{name} must be a whole number of bytes, found {given!r}.",
            fix='pass a number such as 5_000_000_000, or a text such as "5GB".',
        )
    return given


def assign_shards(slots: Sequence[Slot], max_shard_size: int) -> list[list[Slot]]:
    """Split slots, in order, into shards of at most ``max_shard_size`` payload bytes.

    A tensor larger than that gets a shard of its own, before the one being filled. The same split as huggingface_hub's
    for the same order.

    Raises:
        UsageError: the size is less than one byte.
    """
    if max_shard_size < 1:
        raise UsageError(f"the shard size must be at least 1 byte, found {max_shard_size}.")
    full: list[list[Slot]] = []
    filling: list[Slot] = []
    room = max_shard_size
    for slot in slots:
        if slot.nbytes > max_shard_size:
            full.append([slot])
            continue
        if slot.nbytes > room:
            full.append(filling)
            filling, room = [], max_shard_size
        filling.append(slot)
        room -= slot.nbytes
    return [*full, filling] if filling else full


def shard_names(stem: str, count: int, suffix: str) -> list[str]:
    """``model-00001-of-00003.safetensors``, …; just ``model.safetensors`` when there is one.

    Args:
        stem: ``model``, ``pytorch_model``.
        count: files.
        suffix: with its dot, ``.safetensors`` or ``.bin``.
    """
    if count == 1:
        return [stem + suffix]
    return [f"{stem}-{n:05d}-of-{count:05d}{suffix}" for n in range(1, count + 1)]


def index_file(name: str, shards: Mapping[str, Sequence[Slot]]) -> FilePlan:
    """The index of the given shards, byte for byte as transformers 5 writes it.

    Args:
        name: ``model.safetensors.index.json``.
        shards: file name -> the slots in it.
    """
    slots = [s for held in shards.values() for s in held]
    content = {
        "metadata": {
            "total_parameters": sum(math.prod(s.shape) for s in slots),
            "total_size": sum(s.nbytes for s in slots),
        },
        "weight_map": {s.name: file for file, held in shards.items() for s in held},
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return FilePlan(name, len(text), ((0, text.encode("ascii")),))
