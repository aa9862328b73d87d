"""The tree of an Orbax checkpoint: which leaves it has, under which keys, and which stored array each one is.

Taken from ``_METADATA``; without it from the msgpack ``checkpoint`` file of older versions; without both from the names of
the arrays themselves. A leaf's name here is its keys joined with ``/``, so that Google's two-level tree gives
``transformer/layer_0/attn/q_einsum/w`` and a nested tree ``layer_0/attn/q_einsum/w``. On disk a parameter is its keys
joined with ``.``, which cannot be undone by splitting in general; see :func:`split_param`.
Source: orbax ``_src/metadata/tree.py``, ``value_metadata_entry.py``, ``empty_values.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import orbax_msgpack, strict_json
from .errors import FormatError, LimitError, printable
from .names import check_tensor_name, listing
from .orbax_locate import METADATA, MSGPACK

MAX_LEAVES = 200_000
_MAX_KEYS = 64
_EMPTY_TYPES: dict[str, Any] = {
    "None": None,
    "Dict": {},
    "List": [],
    "Tuple": (),
    "NamedTuple": None,
}
# last keys of the parameters that Gemma trees, MaxText and common optimizers have
LEAF_KEYS = frozenset(
    (
        *("w", "b", "scale", "bias", "kernel", "embedding", "input_embedding", "gating_einsum"),
        *("linear", "a", "lora_a", "lora_b", "value", "count", "step", "rng", "mu", "nu", "x"),
    )
)
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_\-/]+")


@dataclass(frozen=True)
class Leaf:
    """One leaf of the tree.

    Attributes:
        keys: the tree's keys, outermost first; each may itself contain ``/``.
        param: name of its array on disk.
        kind: ``array``, ``string`` (in ``_strings.json``), ``empty`` or ``inline``.
        value: what an empty or inline leaf holds.
    """

    keys: tuple[str, ...]
    param: str
    kind: str
    value: Any = None

    @property
    def name(self) -> str:
        """Keys joined with ``/``."""
        return "/".join(self.keys)


@dataclass
class Tree:
    """All leaves.

    Attributes:
        leaves: in the file's order.
        origin: file the structure comes from, or ``array names``.
        fill_omitted: the writer left out chunks equal to an explicit fill value.
        custom: the user's own metadata.
        notes: odd but harmless findings.
    """

    leaves: list[Leaf]
    origin: str
    fill_omitted: bool = False
    custom: Any = None
    notes: list[str] = field(default_factory=list)


def read_tree(directory: Path, names: set[str], arrays: Iterable[str]) -> Tree:
    """The tree of an item.

    Args:
        directory: the item.
        names: files in it.
        arrays: parameter names that are stored.

    Raises:
        FormatError: a metadata file is damaged, or names are ambiguous.
        LimitError: larger than any real checkpoint's.
    """
    inline = orbax_msgpack.load(directory / MSGPACK) if MSGPACK in names else None
    if METADATA in names:
        tree = _from_metadata(directory / METADATA)
        if inline is not None:
            tree.leaves = _with_inline(tree.leaves, dict(inline), set(arrays))
    elif inline is not None:
        tree = Tree([_msgpack_leaf(keys, value, directory) for keys, value in inline], MSGPACK)
        tree.notes.append(f"{METADATA} is missing; the tree was read from {MSGPACK}.")
    else:
        tree = _from_names(sorted(arrays))
    _check(tree.leaves, directory)
    return tree


def _from_metadata(path: Path) -> Tree:
    meta = strict_json.load_object(path)
    entries = meta.get("tree_metadata")
    if not isinstance(entries, dict):
        raise FormatError(
            f'"tree_metadata" must be an object, found {strict_json.type_name(entries)}.',
            where=path,
        )
    stored = meta.get("store_array_data_equal_to_fill_value", False)
    leaves = [_metadata_leaf(label, entry, path) for label, entry in entries.items()]
    return Tree(
        leaves, METADATA, fill_omitted=stored is not True, custom=meta.get("custom_metadata")
    )


def _metadata_leaf(label: str, entry: Any, path: Path) -> Leaf:
    def bad(what: str) -> FormatError:
        return FormatError(f"{what}.", where=path, tensor=label)

    keys_meta = entry.get("key_metadata") if isinstance(entry, dict) else None
    value = entry.get("value_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys_meta, list) or not 0 < len(keys_meta) <= _MAX_KEYS:
        raise bad(f"key_metadata must be a list of 1 to {_MAX_KEYS} keys")
    keys = []
    for key in keys_meta:
        text = key.get("key") if isinstance(key, dict) else None
        if type(text) is int:  # a list's index
            text = str(text)
        if not isinstance(text, str):
            raise bad(f"a key must be a string, found {printable(repr(key), 80)}")
        keys.append(text)
    kind = value.get("value_type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        raise bad("value_metadata must have a value_type")
    if kind in _EMPTY_TYPES or value.get("skip_deserialize") is True:
        return Leaf(tuple(keys), ".".join(keys), "empty", _EMPTY_TYPES.get(kind))
    return Leaf(tuple(keys), ".".join(keys), "string" if kind == "string" else "array")


def _with_inline(
    leaves: list[Leaf], inline: dict[tuple[str, ...], Any], arrays: set[str]
) -> list[Leaf]:
    """Leaves that have no array take their value from the msgpack file, where it has one."""
    return [
        _msgpack_leaf(leaf.keys, inline[leaf.keys], Path(MSGPACK))
        if leaf.kind == "array" and leaf.param not in arrays and leaf.keys in inline
        else leaf
        for leaf in leaves
    ]


def _msgpack_leaf(keys: tuple[str, ...], value: Any, where: Path) -> Leaf:
    if isinstance(value, orbax_msgpack.Placeholder):
        return Leaf(keys, value.param, "array")
    if value is None or (isinstance(value, dict) and not value):
        return Leaf(keys, ".".join(keys), "empty", value)
    if not isinstance(value, orbax_msgpack.VALUES):
        raise FormatError(
            f"{printable('/'.join(keys))} is a {type(value).__name__}, which no checkpoint holds.",
            where=where,
        )
    return Leaf(keys, ".".join(keys), "inline", value)


def _from_names(arrays: list[str]) -> Tree:
    tree = Tree([Leaf(split_param(a), a, "array") for a in arrays], "array names")
    tree.notes.append(f"{METADATA} is missing; the tree was read from the arrays' names.")
    whole = [leaf.param for leaf in tree.leaves if len(leaf.keys) == 1 and "." in leaf.param]
    if whole:
        tree.notes.append(f"names that no known tree has were not split: {listing(whole, 5)}.")
    return tree


def split_param(param: str) -> tuple[str, ...]:
    """Keys of a parameter name, for checkpoints that store nothing better.

    Keys may contain dots, so a name is split at its dots only when its last part is a key that Gemma trees end in
    (``w``, ``scale``, ``kernel``, …) and every part is made of letters, digits, ``_``, ``-`` and ``/``.
    Otherwise the whole name is one key.
    """
    parts = param.split(".")
    known = parts[-1] in LEAF_KEYS and all(_PLAIN_KEY.fullmatch(p) for p in parts)
    return tuple(parts) if known else (param,)


def _check(leaves: list[Leaf], directory: Path) -> None:
    if len(leaves) > MAX_LEAVES:
        raise LimitError(f"{len(leaves)} leaves, at most {MAX_LEAVES} are read.", where=directory)
    for leaf in leaves:
        check_tensor_name(leaf.name, directory)
    for what, names in (
        ("leaf names", Counter(leaf.name for leaf in leaves)),
        ("array names", Counter(leaf.param for leaf in leaves if leaf.kind == "array")),
    ):
        doubled = [name for name, n in names.items() if n > 1]
        if doubled:
            raise FormatError(
                f"{what} that mean more than one leaf: {listing(doubled)}.", where=directory
            )
