"""The ``checkpoint`` file of Orbax before 0.5: a msgpack tree whose leaves are placeholders or small values.

``PLACEHOLDER://<parameter name>`` stands for an array stored beside it. Everything else is the value itself; arrays are
msgpack extension 1, NumPy scalars 3, complex numbers 2. The file is untrusted: sizes and depth are bounded,
extension data is checked by hand.
Source: flax.serialization; orbax's msgpack_utils and pytree_checkpoint_handler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from .dtypes import TABLE
from .errors import DtypeError, FormatError, LimitError, printable
from .files import InputFile

MAX_BYTES = 64 << 20  # a tree of placeholders has some kilobytes
MAX_DEPTH = 64
MAX_LEAVES = 1_000_000
PLACEHOLDER = "PLACEHOLDER://"
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3
VALUES = (bool, int, float, complex, str, np.ndarray, np.generic)
_DTYPES = {row.dtype.name: row.dtype for row in TABLE}


@dataclass(frozen=True)
class Placeholder:
    """An array stored under a parameter name of its own."""

    param: str


def load(path: Path) -> list[tuple[tuple[str, ...], Any]]:
    """Keys and value of every leaf: a :class:`Placeholder`, a NumPy array or scalar, None, a number, a string or ``{}``.

    Raises:
        FormatError: not such a file.
        LimitError: larger or deeper than any such file.
        DtypeError: an inline array of an unsupported element type.
    """
    with InputFile(path) as file:
        if file.size > MAX_BYTES:
            raise LimitError(
                f"the msgpack file has {file.size} bytes, at most {MAX_BYTES} are read.",
                where=path,
                fix="save the checkpoint again with a current Orbax, which stores arrays apart.",
            )
        data = file.read(0, file.size)
    tree = _unpack(data, path)
    if not isinstance(tree, dict):
        raise FormatError(f"the tree must be a map, found {type(tree).__name__}.", where=path)
    leaves = []
    for leaf in _leaves(tree, (), path):
        leaves.append(leaf)
        if len(leaves) > MAX_LEAVES:
            raise LimitError(f"more than {MAX_LEAVES} leaves.", where=path)
    return leaves


def _unpack(data: bytes, path: Path) -> Any:
    def pairs(items: list[tuple[Any, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items) or not all(isinstance(k, str) for k in found):
            raise FormatError("a map has a key twice, or keys that are no strings.", where=path)
        return found

    def extension(code: int, payload: bytes) -> Any:
        return _extension(code, payload, path)

    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=pairs,
            ext_hook=extension,
        )
    # StackError and FormatError of msgpack are ValueErrors, as is bad UTF-8
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as e:
        why = str(e) or type(e).__name__
        raise FormatError(
            f"not a msgpack tree: {printable(why)}.",
            where=path,
            fix="download or copy the file again.",
        ) from e


def _extension(code: int, payload: bytes, path: Path) -> Any:
    if code not in (_NDARRAY, _COMPLEX, _SCALAR):
        raise FormatError(f"unknown msgpack extension {code}.", where=path)
    # no hook: an extension inside an extension stays data, so nothing recurses
    parts = msgpack.unpackb(payload, raw=True, use_list=False)
    if code == _COMPLEX:
        if not (isinstance(parts, tuple) and len(parts) == 2):
            raise FormatError("a complex number must have two parts.", where=path)
        return complex(*parts)
    if not (isinstance(parts, tuple) and len(parts) == 3 and isinstance(parts[2], bytes)):
        raise FormatError("an inline array must be (shape, dtype, bytes).", where=path)
    array = _array(*parts, path)
    return array if code == _NDARRAY else array[()]


def _array(shape: Any, name: Any, data: bytes, path: Path) -> np.ndarray[Any, Any]:
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    dtype = _DTYPES.get("bfloat16" if text == "V2" else text)
    if dtype is None:
        raise DtypeError(
            f"an inline array has element type {printable(text, 40)}; supported are "
            f"{', '.join(_DTYPES)}.",
            where=path,
        )
    dims = shape if isinstance(shape, tuple) else ()
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in dims):
        raise FormatError(f"an inline array has shape {printable(repr(shape), 80)}.", where=path)
    if len(dims) > 32 or math.prod(dims) * dtype.itemsize != len(data):
        raise FormatError(
            f"an inline array of shape {dims} and type {text} has {len(data)} bytes.", where=path
        )
    return np.frombuffer(data, dtype).reshape(dims)


def _leaves(node: Any, keys: tuple[str, ...], path: Path) -> Iterator[tuple[tuple[str, ...], Any]]:
    if len(keys) > MAX_DEPTH:
        raise LimitError(f"the tree nests more than {MAX_DEPTH} deep.", where=path)
    children = dict(enumerate(node)) if isinstance(node, (list, tuple)) else node
    if isinstance(children, dict) and children:
        for key, child in children.items():
            yield from _leaves(child, (*keys, str(key)), path)
    elif isinstance(node, str) and node.startswith(PLACEHOLDER):
        yield keys, Placeholder(node.removeprefix(PLACEHOLDER))
    elif isinstance(node, (list, tuple)):
        yield keys, {}
    else:
        yield keys, node
