"""Planning Orbax checkpoints as plain zarr 2: one uncompressed file per chunk, below a directory per array.

Not OCDBT: its data files have random names, so the same weights would never give the same files twice. Orbax finds out by
itself that there is no OCDBT database. ``value_type`` is ``np.ndarray``, because arrays marked ``jax.Array`` can only be
restored by ``PyTreeCheckpointer`` when a ``_sharding`` file names this machine's devices.
Source: orbax ``_src/metadata/tree.py`` and ``type_handlers.py``; zarr 2 specification.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .base import Chunk, ContainerPlan, FilePlan, Slot
from .dtypes import short
from .errors import DtypeError, LayoutError
from .names import listing
from .orbax_locate import CHECKPOINT_METADATA, COMMIT, METADATA
from .zarr_meta import STORABLE_2, grid

CHUNK_BYTES = 256 << 20  # larger arrays are split along axis 0
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_EMPTY_TYPES: dict[type, str] = {dict: "Dict", list: "List", tuple: "Tuple", type(None): "None"}
_MAX_PART = 255  # bytes of one name in a path

Keys = tuple[str, ...]


def plan(
    slots: Sequence[Slot],
    *,
    keys: Mapping[str, Keys],
    chunk_shapes: Mapping[str, tuple[int, ...]] | None = None,
    item: str | None = None,
    constants: Mapping[Keys, Any] | None = None,
) -> ContainerPlan:
    """Lay out every file of a checkpoint that Orbax restores.

    Args:
        slots: the arrays, in the order of the tree.
        keys: slot name -> its keys in the tree; Google's flat keys contain ``/``, which nests directories.
        chunk_shapes: slot name -> chunk, for arrays that are written slice by slice. Without one an array is
            one chunk, or row blocks of at most 256 MiB (one row at least).
        item: sub-directory for the tree, as multi-item checkpoints have it: ``default`` or ``0/items``.
            ``_CHECKPOINT_METADATA`` then lies one level above the item.
        constants: leaves of the tree that are no slots: numbers and NumPy scalars, or ``{}`` and None for empty nodes.

    Returns:
        The plan; equal arguments give equal bytes.

    Raises:
        LayoutError: keys are missing, clash, or cannot be directory names; a chunk shape does not suit its array.
        DtypeError: zarr has no name for a slot's element type.
    """
    leaves = _leaves(slots, keys, constants or {})
    base = f"{item}/" if item else ""
    files: list[FilePlan] = []
    chunks: dict[str, tuple[Chunk, ...]] = {}
    for slot in slots:
        shape = (chunk_shapes or {}).get(slot.name) or default_chunk(slot)
        param = base + ".".join(keys[slot.name])
        array, boxes = _array_files(slot, shape, param)
        files += array
        chunks[slot.name] = boxes
    for path, value in (constants or {}).items():
        if not _is_empty(value):
            files += _constant_files(base + ".".join(path), value)
    files.append(_text(base + METADATA, _tree_metadata(leaves)))
    files += _checkpoint_files(item)
    _check_paths([f.name for f in files])
    return ContainerPlan(tuple(files), chunks)


def default_chunk(slot: Slot) -> tuple[int, ...]:
    """The whole array, or rows so that a chunk has at most 256 MiB; equal chunks where a near count divides."""
    if slot.nbytes <= CHUNK_BYTES or not slot.shape:
        return tuple(max(n, 1) for n in slot.shape)
    rows = slot.shape[0]
    least = min(rows, -(-slot.nbytes // CHUNK_BYTES))
    # padding rows of a last, shorter chunk are stored: avoid them
    count = next((n for n in range(least, min(rows, 2 * least) + 1) if rows % n == 0), least)
    return (-(-rows // count), *slot.shape[1:])


def _leaves(
    slots: Sequence[Slot], keys: Mapping[str, Keys], constants: Mapping[Keys, Any]
) -> dict[Keys, str]:
    """Keys -> Orbax value type of every leaf, in tree order."""
    missing = [s.name for s in slots if not keys.get(s.name)]
    if missing:
        raise LayoutError(f"no Orbax keys for {listing(missing)}.")
    leaves: dict[Keys, str] = {}
    for path, value in constants.items():
        leaves[path] = _EMPTY_TYPES[type(value)] if _is_empty(value) else "np.ndarray"
    for slot in slots:
        if keys[slot.name] in leaves:
            raise LayoutError(f"keys {keys[slot.name]} are given twice.", tensor=slot.name)
        leaves[keys[slot.name]] = "np.ndarray"
    inner = {path[:n] for path in leaves for n in range(1, len(path))}
    clash = [".".join(path) for path in leaves if path in inner]
    if clash:
        raise LayoutError(f"both a leaf and a subtree: {listing(clash)}.")
    return leaves


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (dict, list, tuple)) and not value)


def _array_files(
    slot: Slot, chunk: tuple[int, ...], param: str
) -> tuple[list[FilePlan], tuple[Chunk, ...]]:
    """``.zarray`` and a file per chunk, and where the slot's boxes go."""
    if len(chunk) != len(slot.shape) or any(c < 1 for c in chunk):
        raise LayoutError(f"chunk {chunk} does not suit shape {slot.shape}.", tensor=slot.name)
    files = [_text(f"{param}/.zarray", _zarray(slot.dtype, slot.shape, chunk, slot.name))]
    size = math.prod(chunk) * np.dtype(slot.dtype).itemsize
    boxes = []
    for index in itertools.product(*map(range, grid(slot.shape, chunk))):
        name = f"{param}/{'.'.join(map(str, index)) or '0'}"
        files.append(FilePlan(name, size))
        start = tuple(i * c for i, c in zip(index, chunk, strict=True))
        boxes.append(Chunk(start, chunk, name, 0))
    return files, tuple(boxes)


def _constant_files(param: str, value: Any) -> list[FilePlan]:
    array = np.asarray(value)
    if array.dtype.kind not in "biufc" and array.dtype not in STORABLE_2:
        raise DtypeError(f"a constant of type {type(value).__name__} is no number.", tensor=param)
    if array.shape:
        raise LayoutError(f"a constant has shape {array.shape}, only scalars fit.", tensor=param)
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return [
        _text(f"{param}/.zarray", _zarray(array.dtype, (), (), param)),
        FilePlan(f"{param}/0", len(data), ((0, data),)),
    ]


def _zarray(
    dtype: np.dtype, shape: tuple[int, ...], chunk: tuple[int, ...], tensor: str
) -> dict[str, Any]:
    if dtype not in STORABLE_2:
        raise DtypeError(f"zarr 2 has no name for {short(dtype)}.", tensor=tensor)
    return {
        "chunks": list(chunk),
        "compressor": None,
        "dimension_separator": ".",
        "dtype": STORABLE_2[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }


def _tree_metadata(leaves: Mapping[Keys, str]) -> dict[str, Any]:
    return {
        "tree_metadata": {
            str(path): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path],
                "value_metadata": {
                    "value_type": kind,
                    "skip_deserialize": kind in _EMPTY_TYPES.values(),
                },
            }
            for path, kind in leaves.items()
        },
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _checkpoint_files(item: str | None) -> list[FilePlan]:
    """What Orbax writes last: the kind of items, and the marker that readers on object stores look for."""
    parent, _, name = (item or "").rpartition("/")
    root = f"{parent}/" if parent else ""
    meta = {
        "item_handlers": {name: _HANDLER} if name else _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    marker = "Checkpoint commit was successful."
    places = [root, f"{item}/"] if item else [root]
    return [
        _text(root + CHECKPOINT_METADATA, meta),
        *(FilePlan(place + COMMIT, len(marker), ((0, marker.encode()),)) for place in places),
    ]


def _text(name: str, value: Any) -> FilePlan:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8")
    return FilePlan(name, len(data), ((0, data),))


def _check_paths(names: Iterable[str]) -> None:
    """Every file can exist beside the others, inside the output directory."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        for part in parts:
            length = len(part.encode("utf-8", "replace"))
            if (
                part in ("", ".", "..")
                or length > _MAX_PART
                or not part.isprintable()
                or "\\" in part
            ):
                raise LayoutError(f'"{part}" in {listing([name])} cannot be a file name.')
        if name in seen:
            raise LayoutError(f"two files would be {listing([name])}.")
        seen.add(name)
    directories = {name[:at] for name in seen for at, c in enumerate(name) if c == "/"}
    both = sorted(directories & seen)
    if both:
        raise LayoutError(f"both a file and a directory: {listing(both)}.")
