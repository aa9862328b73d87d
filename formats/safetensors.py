"""safetensors: one file, several shards with an index, or a directory of either; read and planned.

The format and its checks are in :mod:`.safetensors_header`. Planned files equal the official writer's byte for byte
(``safetensors/src/tensor.rs``, 0.8), so a checkpoint that transformers wrote comes back as the same files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import dtypes, sharded
from .base import Chunk, ContainerPlan, FilePlan, RowTensor, Slot, Source
from .errors import FileIOError, FormatError, MissingTensorError, printable
from .files import InputFile
from .names import check_tensor_name, chosen, listing
from .safetensors_header import METADATA, read_header

_INDEX = ".safetensors.index.json"
_NUMBERED = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
# the official writer's order of payloads: wide types first, which aligns every tensor for its type
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
_RANK = {stored: rank for rank, stored in enumerate(_ORDER)}

# ---------------------------------------------------------------- reading


def open_source(path: Path) -> Source:
    """Open a safetensors checkpoint; only headers are read.

    Args:
        path: a ``.safetensors`` file, an ``.index.json``, or a directory with one of them.

    Returns:
        Tensors in file order; ``metadata`` is the file's ``__metadata__``.

    Raises:
        FormatError: not safetensors, doubled or unusable names, or a directory with more than one checkpoint.
        TruncatedError: the file ends before its header or its data do.
        LimitError: header, tensor count or shape beyond any real checkpoint.
        LayoutError: byte ranges overlap, leave holes or do not fit the shapes.
        DtypeError: an element type g2kit does not move.
        MissingTensorError: no tensors; or see :func:`.sharded.join`.
        ExtraTensorError: see :func:`.sharded.join`.
        UnsafePathError: the index names a file outside its directory, or a link leads there.
        FileIOError: not a readable regular file.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_path(path)
    files = _weights(path)
    source = _open_path(chosen(path, _choose(path, files)))
    unread = [f for f in files if f.endswith(".safetensors") and path / f not in source.files]
    if unread:
        source.notes.append(f"not part of the checkpoint that was opened: {listing(unread)}.")
    source.path = path
    return source


def _open_path(path: Path) -> Source:
    if path.name.endswith(".json"):
        return sharded.join(path, _open_file, "safetensors")
    return _open_file(path)


def _weights(directory: Path) -> list[str]:
    try:
        names = sorted(os.listdir(directory))  # noqa: PTH208 (names, not paths)
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=directory) from e
    visible = [n for n in names if not n.startswith(".")]  # "._x": what macOS leaves beside x
    return [n for n in visible if n.endswith((".safetensors", _INDEX))]


def _choose(directory: Path, files: list[str]) -> str:
    """The one file or index of a directory that is the checkpoint."""
    usual = [f for f in files if f in ("model.safetensors", "model" + _INDEX)]
    indices = [f for f in files if f.endswith(_INDEX)]
    found = usual or indices or files
    if len(found) > 1 and not indices and all(_NUMBERED.search(f) for f in found):
        found = found[:1]
    if len(found) != 1:
        raise FormatError(
            f"ambiguous: several checkpoints are here: {listing(found)}."
            if found
            else "no .safetensors file is here.",
            where=directory,
            fix="pass the file or index you mean instead of the directory.",
        )
    if _NUMBERED.search(found[0]):
        raise FormatError(
            f"{printable(found[0])} is one of several shards and their index is missing.",
            where=directory,
            fix=f"download model{_INDEX} too.",
        )
    return found[0]


def _open_file(path: Path) -> Source:
    file = InputFile(path)
    try:
        header = read_header(file)
    except BaseException:
        file.close()
        raise
    return Source(
        format="safetensors",
        path=path,
        tensors={
            e.name: RowTensor(e.name, e.dtype, e.shape, file, header.size + e.begin, e.stored)
            for e in header.entries
        },
        metadata=dict(header.metadata),
        files=(path,),
        notes=header.notes,
        check_unchanged=file.check_unchanged,
        close=file.close,
    )


# ---------------------------------------------------------------- writing


def plan(
    slots: Sequence[Slot],
    *,
    max_shard_size: int | None = None,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> ContainerPlan:
    """Lay out one file, or shards with their index; byte for byte as the official writers do.

    Args:
        slots: in the order that decides which shard each goes to; inside a file the order is the official one.
        max_shard_size: most payload bytes per file; None means one file.
        stem: ``model`` gives ``model.safetensors``.
        metadata: the files' ``__metadata__``; None means ``{"format": "pt"}``, which old transformers insist on.

    Raises:
        MissingTensorError: no slots.
        FormatError: two slots have one name, or a name that :func:`open_source` would refuse.
        DtypeError: a slot's type has no safetensors name.
        UsageError: the shard size is less than one byte.
    """
    _check_slots(slots, stem)
    metadata = {"format": "pt"} if metadata is None else metadata
    shards = (
        [list(slots)] if max_shard_size is None else sharded.assign_shards(slots, max_shard_size)
    )
    held = dict(
        zip(sharded.shard_names(stem, len(shards), ".safetensors"), shards, strict=True)
    )  # fmt: skip
    files: list[FilePlan] = []
    chunks: dict[str, tuple[Chunk, ...]] = {}
    for name, some in held.items():
        size, header, placed = _lay_out(some, metadata)
        files.append(FilePlan(name, size, ((0, header),)))
        chunks |= {
            s.name: (Chunk((0,) * len(s.shape), s.shape, name, at),) for s, at in placed
        }  # fmt: skip
    if len(files) > 1:
        files.append(sharded.index_file(stem + _INDEX, held))
    return ContainerPlan(tuple(files), {s.name: chunks[s.name] for s in slots})


def _check_slots(slots: Sequence[Slot], stem: str) -> None:
    where = stem + ".safetensors"
    if not slots:
        raise MissingTensorError("there are no tensors to write.", where=where)
    seen: set[str] = set()
    for slot in slots:
        check_tensor_name(slot.name, where)
        if slot.name in seen or slot.name == METADATA:
            why = "is the format's own" if slot.name == METADATA else "is given to two tensors"
            raise FormatError(f'the name "{slot.name}" {why}.', where=where)
        seen.add(slot.name)


def _lay_out(
    slots: Sequence[Slot], metadata: Mapping[str, str]
) -> tuple[int, bytes, list[tuple[Slot, int]]]:
    """File size, the bytes before the payload, and every slot with its offset in the file."""
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    placed, end = [], 0
    for slot in sorted(slots, key=lambda s: (_RANK[dtypes.names(s.dtype).safetensors], s.name)):
        placed.append((slot, end))
        header[slot.name] = {
            "dtype": dtypes.names(slot.dtype).safetensors,
            "shape": list(slot.shape),
            "data_offsets": [end, end := end + slot.nbytes],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    head = len(text).to_bytes(8, "little") + text
    return start + end, head, [(slot, start + at) for slot, at in placed]
