"""Keras 3 weights (``*.weights.h5``), alone or in a KerasHub preset directory, one file or sharded.

A tensor's name is its path in the file (``layers/gemma_decoder_block_1/attention/query_dense/vars/0``); Keras numbers
a layer's variables under ``vars``. bfloat16 is stored as two-byte opaque data with the attribute
``dtype = "bfloat16"``. Sources: keras/src/saving/saving_lib.py (H5IOStore, ShardedH5IOStore) of Keras 3.15 and
keras_hub/src/utils/preset_utils.py of KerasHub 0.32.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Chunk, ContainerPlan, FilePlan, RowTensor, Slot, Source, Tensor
from .dtypes import BF16, F16, F32, F64, short
from .errors import (
    DtypeError,
    ExtraTensorError,
    FileIOError,
    FormatError,
    LayoutError,
    MissingTensorError,
    printable,
)
from .hdf5_process import Hdf5Process
from .hdf5_reader import Hdf5File, open_file, unsupported
from .hdf5_skeleton import file_plan
from .names import check_tensor_name, chosen, inside, listing
from .sharded import assign_shards
from .strict_json import load_object, type_name

WEIGHTS = "model.weights.h5"
INDEX = "model.weights.json"
# metadata key -> file of a preset directory
PRESET_JSON = {"config": "config.json", "metadata": "metadata.json"}
_SUFFIX, _INDEX_SUFFIX = ".weights.h5", ".weights.json"
# groups that hold a model's layers; the second in files of Keras 2.13
_LAYERS = ("layers", "_layer_checkpoint_dependencies")
# groups that hold training state, wherever they are
_STATE = frozenset({"optimizer", "seed_generator", "metrics"})
# one of these is in every JSON file of a preset
_KERAS_KEYS = frozenset({"registered_name", "class_name", "num_layers", "keras_version"})
_JSON_LIMIT = 16 << 20
_REVISIONS = (
    "the index and the files are of different revisions; download or save all of them again."
)

# ---------------------------------------------------------------- reading


def open_source(path: Path, *, process: Hdf5Process | None = None) -> Source:
    """Open Keras weights; only headers are read.

    Args:
        path: a preset directory, a ``.weights.h5`` file, or the ``.weights.json`` index of sharded weights.
        process: what holds the HDF5 library; None starts one and ends it with the source.

    Returns:
        Tensors by their path below the model, in the file's order. ``metadata``: ``config`` and the other keys of
        :data:`PRESET_JSON` that the directory has, ``prefix`` (path of the model in the file: ``""`` for a backbone,
        ``backbone/`` or ``layers/gemma_backbone/`` inside a task), ``extra`` (what is no weight of the model, such as
        optimizer state: path -> type and shape).

    Raises:
        FormatError: not HDF5, damaged, or several checkpoints in the directory.
        TruncatedError: the file, a dataset or a chunk is not all there.
        LimitError: more objects, deeper groups, larger chunks or denser packing than any checkpoint has.
        LayoutError: datasets overlap, are linked twice, or do not fit their shape.
        DtypeError: a weight of a type g2kit does not move.
        MissingTensorError: no tensors; or files or tensors that an index names are absent.
        ExtraTensorError: shards hold tensors that the index does not name.
        UnsafePathError: links, external or virtual data; or an index that names a file elsewhere.
        FileIOError: not a readable regular file.
        DependencyError: h5py is not installed.
    """
    path = Path(path)
    main = _choose(path) if path.is_dir() else path
    own = Hdf5Process() if process is None else process
    files: dict[str, Hdf5File] = {}

    def close() -> None:
        for f in files.values():
            f.file.close()
        if process is None:
            own.close()

    try:
        notes = (_open_shards if main.name.endswith(".json") else _open_one)(main, files, own)
        source = _source(path, files, notes)
        if path.is_dir() or main.name in (WEIGHTS, INDEX):
            source.metadata |= _preset_json(main.parent)
    except BaseException:
        close()
        raise
    if process is None and all(isinstance(t, RowTensor) for t in source.tensors.values()):
        own.close()  # nothing more to ask it
    source.check_unchanged = lambda: _each(f.file.check_unchanged for f in files.values())
    source.close = close
    return source


def _each(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _choose(directory: Path) -> Path:
    """The weights file or index of a preset directory."""
    try:
        names = sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))
    except OSError as e:
        raise FileIOError(f"cannot list: {e.strerror}.", where=directory) from e
    usual = [n for n in (WEIGHTS, INDEX) if n in names]
    found = usual or [n for n in names if n.endswith((_SUFFIX, _INDEX_SUFFIX))]
    if len(found) != 1:
        raise FormatError(
            f"ambiguous: several checkpoints are here: {listing(found)}."
            if found
            else f"neither {WEIGHTS} nor {INDEX} is here.",
            where=directory,
            fix="pass the file you mean instead of the directory.",
        )
    return chosen(directory, found[0])


def _open_one(path: Path, files: dict[str, Hdf5File], process: Hdf5Process) -> list[str]:
    files[path.name] = open_file(path, process)
    return []


def _open_shards(path: Path, files: dict[str, Hdf5File], process: Hdf5Process) -> list[str]:
    """Open every file of an index and compare what it says with what they hold."""
    index = load_object(path, limit=_JSON_LIMIT)
    where = _weight_map(index, path)
    names = sorted({f for held in where.values() for f in held})
    found = {name: inside(path.parent, name) for name in names}
    if absent := [name for name, file in found.items() if file is None]:
        raise MissingTensorError(
            f"{len(absent)} of {len(names)} files are missing: {listing(absent)}.",
            where=path,
            fix="download or copy them into the index's directory.",
        )
    for name, file in found.items():
        assert file is not None
        files[name] = open_file(file, process)
    held = {(_group(t), name) for name, f in files.items() for t in (*f.tensors, *f.skipped)}
    named = {(group.strip("/"), name) for group, names in where.items() for name in names}
    if lost := sorted(named - held):
        raise MissingTensorError(
            f"{len(lost)} groups are not where the index says: {_pairs(lost)}.",
            where=path,
            fix=_REVISIONS,
        )
    if extra := sorted(held - named):
        raise ExtraTensorError(
            f"{len(extra)} groups are not in the index: {_pairs(extra)}.",
            where=path,
            fix=_REVISIONS,
        )
    total = sum(t.nbytes for f in files.values() for t in f.tensors.values())
    said = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    if isinstance(said, (int, float)) and said != total:
        return [f"the index's total_size is {said:.0f}, the files hold {total} bytes."]
    return []


def _group(name: str) -> str:
    return name.rpartition("/")[0]


def _pairs(found: Iterable[tuple[str, str]]) -> str:
    return listing([f"{group} ({file})" for group, file in found])


def _weight_map(index: Mapping[str, Any], path: Path) -> dict[str, list[str]]:
    """Group -> the files its variables are in."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            f"weight_map must name the file of every group, found {type_name(weight_map)}.",
            where=path,
            fix="pass the index that Keras's save_weights wrote.",
        )
    found = {}
    for group, files in weight_map.items():
        held = files if isinstance(files, list) else [files]
        if not held or not all(isinstance(f, str) for f in held):
            raise FormatError(
                "a group's entry in weight_map must be a file name or a list of them.",
                where=path,
                tensor=group,
            )
        found[group] = held
    return found


@dataclass(frozen=True)
class _Home:
    """Where in a file the model is: ``prefix`` and the group below it that holds the layers."""

    prefix: str
    layers: str


def _home(names: Iterable[str]) -> _Home | None:
    """The place with the most variables; None when nothing is under a group of layers."""
    count = Counter(home for name in names if (home := _home_of(name)) is not None)
    if not count:
        return None
    return max(count, key=lambda h: (count[h], -_LAYERS.index(h.layers), -len(h.prefix), h.prefix))


def _home_of(name: str) -> _Home | None:
    parts = name.split("/")
    at = max((i for i, p in enumerate(parts) if p in _LAYERS), default=-1)
    if at < 0 or not _STATE.isdisjoint(parts):
        return None
    return _Home("".join(p + "/" for p in parts[:at]), parts[at])


def _source(path: Path, files: Mapping[str, Hdf5File], notes: list[str]) -> Source:
    """The files' datasets as one model."""
    every = [n for f in files.values() for n in (*f.tensors, *f.skipped)]
    home = _home(every)
    tensors: dict[str, Tensor] = {}
    extra: dict[str, str] = {}
    for f in files.values():
        for inside_name, what in f.skipped.items():
            if home is None or _home_of(inside_name) == home:
                raise unsupported(inside_name, what, f.file.path)
            extra[inside_name] = what
        for inside_name, tensor in f.tensors.items():
            if home is not None and _home_of(inside_name) != home:
                extra[inside_name] = f"{tensor.stored} {list(tensor.shape)}"
                continue
            name = inside_name if home is None else _normal(inside_name, home)
            if name in tensors:
                raise FormatError(
                    f"two files hold it: {printable(tensors[name].where.name)} and "
                    f"{printable(tensor.where.name)}.",
                    where=path,
                    tensor=name,
                    fix=_REVISIONS,
                )
            tensor.name = name
            tensors[name] = tensor
    if not tensors:
        raise MissingTensorError(
            "the file holds no weights.", where=path, fix="save the model once it is built."
        )
    if extra:
        notes = [*notes, f"no weights of the model, left out: {listing(extra, 4)}."]
    prefix = home.prefix if home else ""
    return Source(
        format="keras_h5",
        path=path,
        tensors=tensors,
        metadata={"prefix": prefix, "extra": extra},
        files=tuple(f.file.path for f in files.values()),
        notes=notes,
    )


def _normal(name: str, home: _Home) -> str:
    return _LAYERS[0] + name[len(home.prefix) + len(home.layers) :]


def _preset_json(directory: Path) -> dict[str, Any]:
    """The preset's JSON files; a config.json of another kind (Hugging Face's) is not the preset's."""
    found = {}
    for key, name in PRESET_JSON.items():
        path = inside(directory, name)
        if path is None:
            continue
        value = load_object(path, limit=_JSON_LIMIT)
        if not _KERAS_KEYS.isdisjoint(value):
            found[key] = value
    return found


# ---------------------------------------------------------------- writing


def plan(
    slots: Sequence[Slot],
    *,
    file_name: str = WEIGHTS,
    groups: Mapping[str, Mapping[str, str]] | None = None,
    max_shard_size: int | None = None,
) -> ContainerPlan:
    """Lay out one ``.weights.h5`` file, or shards with their index, as Keras's ``load_weights`` reads them.

    Args:
        slots: names are paths in the file; payloads are laid out in this order.
        file_name: ends in ``.weights.h5``; shards and index are named after it, as Keras does.
        groups: path -> text attributes, of groups that Keras writes besides the slots' own: a layer's name, layers
            without variables. Keras reads files without them too.
        max_shard_size: most payload bytes per file; None means one file.

    Raises:
        MissingTensorError: no slots.
        FormatError: two slots have one name, a name that :func:`open_source` would refuse, or a file name that Keras would.
        LayoutError: a name is a dataset and a group at once.
        DtypeError: a slot's type is not one that Keras saves weights in.
        UsageError: the shard size is less than one byte.
    """
    groups = groups or {}
    _check(slots, groups, file_name)
    if max_shard_size is None:
        file, chunks = file_plan(file_name, slots, groups)
        return ContainerPlan((file,), chunks)
    stem = file_name.removesuffix(_SUFFIX)
    shards = {
        f"{stem}_{n:05d}{_SUFFIX}": held
        for n, held in enumerate(assign_shards(slots, max_shard_size))
    }
    return _plan_shards(shards, groups, stem + _INDEX_SUFFIX)


def _plan_shards(
    shards: Mapping[str, Sequence[Slot]], groups: Mapping[str, Mapping[str, str]], index: str
) -> ContainerPlan:
    files: list[FilePlan] = []
    chunks: dict[str, tuple[Chunk, ...]] = {}
    weight_map: dict[str, Any] = {}
    left = dict(groups)
    for name, held in shards.items():
        own = dict.fromkeys(_group(s.name) for s in held)
        for group in own:
            # one name where Keras writes one name, a list where a layer is spread over files
            before = weight_map.get("/" + group)
            weight_map["/" + group] = name if before is None else [*_as_list(before), name]
        # groups without variables go where Keras looks for them: into the first file
        here = {g: left.pop(g) for g in list(left) if g in own or (not files and _empty(g, shards))}
        file, placed = file_plan(name, held, here)
        files.append(file)
        chunks |= placed
    total = sum(s.nbytes for held in shards.values() for s in held)
    content = {"metadata": {"total_size": float(total)}, "weight_map": weight_map}
    text = json.dumps(content, indent=4).encode()
    return ContainerPlan((*files, FilePlan(index, len(text), ((0, text),))), chunks)


def _as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


def _empty(group: str, shards: Mapping[str, Sequence[Slot]]) -> bool:
    return all(_group(s.name) != group for held in shards.values() for s in held)


def _check(slots: Sequence[Slot], groups: Mapping[str, Mapping[str, str]], file_name: str) -> None:
    if not slots:
        raise MissingTensorError("there are no tensors to write.", where=file_name)
    if not file_name.endswith(_SUFFIX) or file_name == _SUFFIX:
        raise FormatError(
            f'the file name "{printable(file_name, 80)}" must end in {_SUFFIX}; Keras reads no other.',
            fix=f"name it {WEIGHTS}.",
        )
    twice = [n for n, count in Counter(s.name for s in slots).items() if count > 1]
    if twice:
        raise FormatError(f"two tensors have one name: {listing(twice)}.", where=file_name)
    held = {p: None for g in groups for p in _paths(g)}
    for slot in slots:
        check_tensor_name(slot.name, file_name)
        parts = slot.name.split("/")
        if "" in parts or "." in parts:
            raise FormatError("a part of its path is empty.", where=file_name, tensor=slot.name)
        held |= dict.fromkeys(_paths(_group(slot.name)))
        if slot.dtype not in (BF16, F16, F32, F64):
            raise DtypeError(
                f"Keras weights are bf16, f16, f32 or f64, found {short(slot.dtype)}.",
                where=file_name,
                tensor=slot.name,
            )
    both = [s.name for s in slots if s.name in held]
    if both:
        raise LayoutError(f"tensors and groups at once: {listing(both)}.", where=file_name)


def _paths(group: str) -> list[str]:
    """A group's path and those of the groups it is in."""
    parts = group.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
