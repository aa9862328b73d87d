"""JSON from a checkpoint, where a lenient parser would let two readers see two different files.

Python's ``json`` keeps the last of two equal keys, takes ``NaN``, recurses as deep as the text asks and builds as
many objects as fit its memory. Every JSON file of a checkpoint goes through here instead (RFC 8259, and section 4 of
RFC 7493 on doubled keys).
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError, LimitError, printable
from .files import InputFile

MAX_BYTES = 64 << 20  # the largest real file, Gemma 3's tokenizer.json, has 34 MB
MAX_DEPTH = 64
MAX_VALUES = 8_000_000  # the same file has 2 million
_MAX_DIGITS = 40
_DEPTH_STEP = np.zeros(256, np.int8)
_DEPTH_STEP[list(b"[{")], _DEPTH_STEP[list(b"]}")] = 1, -1
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load(
    path: str | os.PathLike[str],
    *,
    limit: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> Any:
    """The value in a JSON file.

    Args:
        path: a regular file.
        limit: most bytes to read.
        max_depth: see :func:`loads`.
        max_values: see :func:`loads`.

    Raises:
        FileIOError: not there, not readable, or not a regular file.
        LimitError: larger, deeper or more values than allowed; nothing was allocated for it.
        FormatError: not UTF-8, not JSON, or a doubled key.
    """
    path = Path(path)
    with InputFile(path) as file:
        if file.size > limit:
            raise LimitError(
                f"the JSON file has {file.size} bytes, at most {limit} are read.", where=path
            )
        data = file.read(0, file.size)
    return loads(data, where=path, max_depth=max_depth, max_values=max_values)


def loads(
    data: bytes,
    *,
    where: str | os.PathLike[str],
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> Any:
    """The value of a JSON text; as :func:`load`.

    Args:
        data: the text, UTF-8 without byte order mark.
        where: file it comes from, for messages.
        max_depth: objects and arrays nested in each other.
        max_values: commas and opening brackets, those inside strings included (a bound on the values).
    """
    where = Path(where)
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > max_values:
        raise LimitError(
            f"the JSON text has {values} separators, at most {max_values} are read.", where=where
        )
    text = _decode(data, where)
    depth = _depth(data)
    if depth > max_depth:
        raise LimitError(f"the JSON text nests {depth} deep, at most {max_depth}.", where=where)
    value = _parse(text, where)
    if _SURROGATE.search(data):
        _refuse_lone_surrogates(value, where)
    return value


def load_object(
    path: str | os.PathLike[str], *, limit: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """:func:`load` for files whose top level must be an object ``{…}``.

    Raises:
        FormatError: it is something else.
    """
    path = Path(path)
    value = load(path, limit=limit, max_depth=max_depth)
    if not isinstance(value, dict):
        raise FormatError(
            f"the top level must be a JSON object, found {type_name(value)}.", where=path
        )
    return value


def type_name(value: object) -> str:
    """What JSON calls a parsed value's type, for messages."""
    table = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return table.get(type(value), "null" if value is None else "a number")


def _decode(data: bytes, where: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(
            f"not UTF-8: byte 0x{data[e.start]:02x} at byte {e.start} ({e.reason}).", where=where
        ) from None


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings; right for JSON, never too small for anything else."""
    # without escapes, every quote opens or closes a string
    flat = np.frombuffer(data.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    depth = deepest = inside = 0
    for start in range(0, len(flat), 1 << 20):  # blocks: the sums below take 8 bytes per byte
        part = flat[start : start + (1 << 20)]
        quotes = np.cumsum(part == ord('"')) + inside
        walk = np.cumsum(np.where(quotes & 1, 0, _DEPTH_STEP[part]), dtype=np.int64) + depth
        deepest = max(deepest, int(walk.max()))
        depth, inside = int(walk[-1]), int(quotes[-1]) & 1
    return deepest


def _parse(text: str, where: Path) -> Any:
    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            double = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise FormatError(
                f'key "{printable(double)}" appears twice in one object; readers differ in which '
                "value they take.",
                where=where,
                fix="get the file from its source again, or remove one of the two.",
            )
        return found

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise LimitError(
                f"a number has {len(digits)} digits, at most {_MAX_DIGITS} are read.", where=where
            )
        return int(digits)

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise FormatError(f"number {printable(number, 40)} is not finite.", where=where)
        return value

    try:
        return json.loads(
            text,
            object_pairs_hook=no_doubles,
            parse_int=whole,
            parse_float=finite,
            parse_constant=finite,
        )
    except json.JSONDecodeError as e:
        raise FormatError(
            f"not JSON: {e.msg} at line {e.lineno}, column {e.colno}.",
            where=where,
            fix="download or copy the file again.",
        ) from None
    except RecursionError:  # the caller's own stack left less room than max_depth
        raise LimitError("the JSON text nests too deep.", where=where) from None


def _refuse_lone_surrogates(value: Any, where: Path) -> None:
    r"""``"\ud800"`` is half a character: Python reads it, and nothing can write it again."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        raise FormatError(
            f"a string has the escape \\u{ord(e.object[e.start]):04x}, half of a surrogate pair.",
            where=where,
        ) from None
