"""Orbax checkpoints: every variant on disk, read lazily without jax or orbax, and written as plain zarr.

Reading takes the tree from :mod:`.orbax_metadata`, finds each leaf's chunks in the OCDBT database or in directories
(:mod:`.zarr_store`), and gives out :class:`.zarr_chunks.ZarrTensor`. Sources: Orbax's checkpoint format
guide, tensorstore's ``ocdbt``, ``zarr`` and ``zarr3`` drivers; writing: see :mod:`.orbax_plan`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import strict_json, zarr_meta
from .base import Array, Index, Source, Tensor
from .chunk_pool import ChunkPool, PoolLimits
from .errors import FileIOError, FormatError, InputError, TruncatedError, printable
from .names import chosen, listing
from .orbax_locate import (
    CHECKPOINT_METADATA,
    COMMIT,
    MANIFEST,
    MSGPACK,
    PROCESS,
    Item,
    check_committed,
    find_item,
)
from .orbax_metadata import Leaf, Tree, read_tree
from .orbax_plan import plan
from .zarr_chunks import ZarrTensor, normalise
from .zarr_store import FileStore, OcdbtStore, Store, arrays_in, walk

__all__ = ["find_item", "open_source", "plan"]

_STRINGS = "_strings.json"
NO_CHECKSUM = "Orbax stores no checksums of weights: a flipped bit cannot be noticed here."


class InlineTensor(Tensor):
    """An array that the msgpack file holds itself."""

    def __init__(self, name: str, value: Array, where: Path) -> None:
        super().__init__(name, value.dtype, value.shape, where, f"{value.dtype.name}, inline")
        self.value = value

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`."""
        normalise(index, self.shape)  # the same refusals as everywhere
        return np.array(self.value[index], order="C")


def open_source(path: Path, *, limits: PoolLimits | None = None) -> Source:
    """Open an Orbax checkpoint.

    Args:
        path: the item's directory (``_METADATA``, ``manifest.ocdbt``), or a directory above exactly one: a step, a
            multi-item checkpoint, or the directory of a release.
        limits: memory and open decoders to stay within.

    Returns:
        Tensors under their keys joined with ``/``, in the checkpoint's order. ``metadata`` holds ``keys``: name -> key
        tuple of every leaf; ``scalars``: values of leaves without axes (``step``) and of strings; ``empty``: names of
        empty nodes; ``storage``, ``zarr``, ``structure``, ``item`` and ``custom``: where all this was found.

    Raises:
        FormatError: no checkpoint, several, an uncommitted one, or damaged metadata.
        TruncatedError: arrays, chunks or data files are missing or short.
        InputError: other damage; see the classes in :mod:`.errors`.
        FileIOError: the operating system refuses a read.
    """
    item = find_item(Path(path))
    files = {n: st for n, st in walk(item.path).items() if not n.startswith("array_metadatas/")}
    names = {name.partition("/")[0] for name in files}
    check_committed(item, names)
    stores = _stores(item, files, names)
    arrays = _arrays(stores)
    tree = read_tree(item.path, names, arrays)
    source = Source(
        "orbax",
        Path(path),
        {},
        files=tuple(item.path / name for name in files if _holds_arrays(name, arrays)),
        notes=[*item.notes, *tree.notes, *_checkpoint_notes(item), NO_CHECKSUM],
        metadata={
            "keys": {leaf.name: leaf.keys for leaf in tree.leaves},
            "scalars": {},
            "empty": [leaf.name for leaf in tree.leaves if leaf.kind == "empty"],
            "storage": " and ".join(store.kind for store in stores),
            "structure": tree.origin,
            "item": str(item.path),
            "custom": tree.custom,
        },
    )
    pool = ChunkPool(limits or PoolLimits(), lambda: source.scratch)
    _Opener(source, item, tree, arrays, pool).run()
    source.check_unchanged = lambda: _check_unchanged(item.path, files)
    source.close = pool.close
    return source


def _holds_arrays(name: str, arrays: Mapping[str, Found]) -> bool:
    """Whether a file below the item is a part of its arrays, rather than one that lies beside them."""
    if name in (MANIFEST, MSGPACK) or name.startswith((PROCESS, "d/")):
        return True
    folders = name.split("/")[:-1]
    return any("/".join(folders[:n]) in arrays for n in range(1, len(folders) + 1))


Found = tuple[Store, int]  # where an array is, and its zarr version


def _stores(item: Item, files: Mapping[str, os.stat_result], names: set[str]) -> list[Store]:
    plain = {n: st for n, st in files.items() if not n.startswith((PROCESS, "d/"))}
    stores: list[Store] = []
    if MANIFEST in names:
        stores.append(OcdbtStore(item.path, sum(st.st_size for st in files.values())))
    elif "d" in names or any(n.startswith(PROCESS) for n in names):
        raise TruncatedError(
            f"{MANIFEST} is missing, so no array can be found in the data files that are there.",
            where=item.path,
            fix="copy the checkpoint again, with all its files.",
        )
    if not stores or any(n.endswith(("/.zarray", "/zarr.json")) for n in plain):
        stores.append(FileStore(item.path, plain))
    return stores


def _arrays(stores: list[Store]) -> dict[str, Found]:
    """Parameter name -> where it is; the OCDBT database goes first, as in Orbax."""
    found: dict[str, Found] = {}
    for store in stores:
        for name, version in arrays_in(store).items():
            found.setdefault(name, (store, version))
    return found


def _checkpoint_notes(item: Item) -> list[str]:
    """What ``_CHECKPOINT_METADATA`` has to say, which is little: it is optional and nothing here depends on it."""
    if item.root is None:
        return [f"{CHECKPOINT_METADATA} is missing, which is harmless."]
    path = chosen(item.root, CHECKPOINT_METADATA)
    try:
        meta = strict_json.load_object(path, limit=16 << 20)
    except InputError as e:
        return [f"{CHECKPOINT_METADATA} cannot be read and was ignored: {e.what}"]
    places = (item.path, item.root)
    unmarked = not any((place / COMMIT).is_file() for place in places)
    if "commit_timestamp_nsecs" in meta and meta["commit_timestamp_nsecs"] is None and unmarked:
        return [f"nothing says that the save was committed ({COMMIT}, commit timestamp)."]
    return []


def _check_unchanged(directory: Path, files: Mapping[str, os.stat_result]) -> None:
    for name, before in files.items():
        try:
            now = (directory / name).stat()
        except OSError as e:
            raise FileIOError(
                f"the file went away while it was read: {e.strerror}.", where=directory / name
            ) from e
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise FileIOError(
                "the file changed while it was read.",
                where=directory / name,
                fix="wait until nothing writes to it, then run again.",
            )


class _Opener:
    """Fills a Source's tensors and scalars from the tree's leaves."""

    def __init__(
        self, source: Source, item: Item, tree: Tree, arrays: dict[str, Found], pool: ChunkPool
    ) -> None:
        self.source = source
        self.item = item
        self.tree = tree
        self.arrays = arrays
        self.pool = pool
        self.strings: Any = None

    def run(self) -> None:
        stored = [leaf for leaf in self.tree.leaves if leaf.kind == "array"]
        lost = [leaf.name for leaf in stored if leaf.param not in self.arrays]
        if lost:
            raise TruncatedError(
                f"{len(lost)} of {len(stored)} arrays of {self.tree.origin} are not stored: "
                f"{listing(lost)}.",
                where=self.item.path,
                tensor=lost[0] if len(lost) == 1 else None,
                fix="download or copy the checkpoint again, with all its files.",
            )
        if not stored and not any(leaf.kind == "inline" for leaf in self.tree.leaves):
            raise FormatError("the checkpoint holds no arrays.", where=self.item.path)
        unlisted = sorted(set(self.arrays) - {leaf.param for leaf in stored})
        if unlisted:
            self.source.notes.append(
                f"arrays that {self.tree.origin} does not list were ignored: {listing(unlisted)}."
            )
        metadata = self._array_metadata(stored)
        self.source.metadata["zarr"] = sorted({a.version for a in metadata.values()})
        for leaf in self.tree.leaves:
            self._open(leaf, metadata)
        self._note_foreign()

    def _array_metadata(self, leaves: list[Leaf]) -> dict[str, zarr_meta.ZarrArray]:
        """Leaf name -> what its JSON says; read in one batch per store."""
        found: dict[str, zarr_meta.ZarrArray] = {}
        for store in {id(s): s for s, _ in self.arrays.values()}.values():
            here = [leaf for leaf in leaves if self.arrays[leaf.param][0] is store]
            versions = [self.arrays[leaf.param][1] for leaf in here]
            file = {2: ".zarray", 3: "zarr.json"}
            keys = [f"{leaf.param}/{file[v]}" for leaf, v in zip(here, versions, strict=True)]
            for leaf, version, key, data in zip(
                here, versions, keys, store.small(keys), strict=True
            ):
                meta = strict_json.loads(data, where=self.item.path / key)
                found[leaf.name] = zarr_meta.parse(
                    meta, where=self.item.path, tensor=leaf.name, version=version
                )
        return found

    def _open(self, leaf: Leaf, metadata: Mapping[str, zarr_meta.ZarrArray]) -> None:
        scalars = self.source.metadata["scalars"]
        if leaf.kind == "string":
            scalars[leaf.name] = self._string(leaf)
        elif leaf.kind == "inline":
            self._open_inline(leaf)
        elif leaf.kind == "array":
            tensor = ZarrTensor(
                leaf.name,
                metadata[leaf.name],
                self.arrays[leaf.param][0],
                leaf.param,
                absent_is_fill=self.tree.fill_omitted,
                pool=self.pool,
            )
            if tensor.shape:
                self.source.tensors[leaf.name] = tensor
            else:
                scalars[leaf.name] = tensor.read().item()
            self._note_absent(tensor)

    def _open_inline(self, leaf: Leaf) -> None:
        if isinstance(leaf.value, np.ndarray) and leaf.value.shape:
            tensor = InlineTensor(leaf.name, leaf.value, self.item.path / MSGPACK)
            self.source.tensors[leaf.name] = tensor
        else:
            plain = isinstance(leaf.value, (np.ndarray, np.generic))
            self.source.metadata["scalars"][leaf.name] = leaf.value.item() if plain else leaf.value

    def _string(self, leaf: Leaf) -> str | None:
        """A string lies in one JSON file, below its parameter name read as a JSON pointer."""
        path = self.item.path / _STRINGS
        if self.strings is None:
            self.strings = strict_json.load_object(path) if path.is_file() else {}
        value: Any = self.strings
        for part in leaf.param.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str):
            self.source.notes.append(f"the string {printable(leaf.name)} is not in {_STRINGS}.")
            return None
        return value

    def _note_absent(self, tensor: ZarrTensor) -> None:
        if tensor.absent:
            self.source.notes.append(
                f"{printable(tensor.name)}: {len(tensor.absent)} chunks were left out by the writer "
                "and hold the fill value."
            )

    def _note_foreign(self) -> None:
        foreign = {
            name: t.array.foreign
            for name, t in self.source.tensors.items()
            if isinstance(t, ZarrTensor) and t.array.foreign
        }
        if foreign:
            self.source.notes.append(
                f"read through tensorstore, a whole chunk at a time: {listing(foreign)} "
                f"({', '.join(sorted(set(foreign.values())))})."
            )
