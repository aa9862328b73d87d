"""The reports' JSON Schemas, and a check against them that needs no further package.

The files are draft 2020-12 and the published form; :func:`validate` understands the keywords they use and refuses to
run on others, so neither can drift from the other.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from ..formats.errors import FormatError, printable

Schema = dict[str, Any]
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda x: isinstance(x, dict),
    "array": lambda x: isinstance(x, list),
    "string": lambda x: isinstance(x, str),
    "boolean": lambda x: isinstance(x, bool),
    "null": lambda x: x is None,
    "number": lambda x: _finite(x),
    "integer": lambda x: _finite(x) and x == x // 1,
}
PARITY, QUANT = "g2kit.report/1", "g2kit.quant-report/1"
_FILES = {PARITY: "schema.json", QUANT: "quantized/schema.json"}
_ASIDE = frozenset({"$schema", "$id", "$defs", "title", "description"})
_SHOWN = 5


@cache
def schema(name: str = PARITY) -> Schema:
    """The schema of that name as data; do not change it."""
    text = files(__package__).joinpath(*_FILES[name].split("/")).read_text(encoding="utf-8")
    loaded: Schema = json.loads(text)
    return loaded


@cache
def _whole(name: str) -> Schema:
    """The schema with every reference replaced by what it refers to."""
    parts = schema(name)["$defs"]

    def grown(s: Any) -> Any:
        if isinstance(s, list):
            return [grown(x) for x in s]
        if not isinstance(s, dict):
            return s
        out = {k: grown(v) for k, v in s.items() if k not in ("$ref", "$defs")}
        return out | grown(parts[s["$ref"].removeprefix("#/$defs/")]) if "$ref" in s else out

    found: Schema = grown(schema(name))
    return found


def validate(document: Any, name: str = PARITY) -> None:
    """Check a report.

    Args:
        document: parsed JSON.
        name: of the schema: :data:`PARITY` or :data:`QUANT`.

    Raises:
        FormatError: it is no such document; the message has the first places and what was expected.
    """
    found = document.get("schema") if isinstance(document, dict) else None
    if found != name:
        raise FormatError(
            f"this is no report of a kind this version knows: schema {_brief(found)}, expected “{name}”.",
            fix="give the file written with --report, or use the g2kit version that wrote it.",
        )
    wrong = list(_errors(document, _whole(name), "report"))
    if wrong:
        rest = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise FormatError(
            f"the report is malformed: {'; '.join(wrong[:_SHOWN])}{rest}.", fix="write it again."
        )


def mistakes(value: Any, part: Schema, where: str) -> list[str]:
    """What is wrong with a value by a schema without references; ``where`` is what to call it."""
    return list(_errors(value, part, where))


def _errors(x: Any, s: Schema, where: str) -> Iterator[str]:
    for word, argument in s.items():
        if word not in _ASIDE:
            yield from _WORDS[word](x, argument, s, where)


def _type(x: Any, names: str | list[str], s: Schema, where: str) -> Iterator[str]:
    wanted = [names] if isinstance(names, str) else names
    if not any(_TYPES[name](x) for name in wanted):
        yield f"{where} is {_brief(x)}, expected {' or '.join(wanted)}"


def _required(x: Any, names: list[str], s: Schema, where: str) -> Iterator[str]:
    missing = [n for n in names if n not in x] if isinstance(x, dict) else []
    if missing:
        yield f"{where} lacks {', '.join(missing)}"


def _properties(x: Any, parts: dict[str, Schema], s: Schema, where: str) -> Iterator[str]:
    for name, part in parts.items() if isinstance(x, dict) else ():
        if name in x:
            yield from _errors(x[name], part, f"{where}.{name}")


def _additional(x: Any, part: Schema, s: Schema, where: str) -> Iterator[str]:
    known = s.get("properties", {})
    for name, value in x.items() if isinstance(x, dict) else ():
        if name not in known:
            yield from _errors(value, part, f"{where}.{printable(name, 60)}")


def _items(x: Any, part: Schema, s: Schema, where: str) -> Iterator[str]:
    for i, value in enumerate(x) if isinstance(x, list) else ():
        yield from _errors(value, part, f"{where}[{i}]")


def _any_of(x: Any, choices: list[Schema], s: Schema, where: str) -> Iterator[str]:
    """Says what is wrong with the first choice: the others are null."""
    found = [list(_errors(x, choice, where)) for choice in choices]
    if all(found):
        yield from found[0]


def _enum(x: Any, values: list[Any], s: Schema, where: str) -> Iterator[str]:
    if x not in values:
        yield f"{where} is {_brief(x)}, expected one of {', '.join(map(str, values))}"


def _const(x: Any, value: Any, s: Schema, where: str) -> Iterator[str]:
    if x != value:
        yield f"{where} is {_brief(x)}, expected {value}"


def _pattern(x: Any, pattern: str, s: Schema, where: str) -> Iterator[str]:
    if isinstance(x, str) and not re.search(pattern, x):
        yield f"{where} is {_brief(x)}, expected the form {pattern}"


def _bound(says: str, holds: Callable[[Any, Any], bool]) -> Callable[..., Iterator[str]]:
    def check(x: Any, limit: float, s: Schema, where: str) -> Iterator[str]:
        if _TYPES["number"](x) and not holds(x, limit):
            yield f"{where} is {_brief(x)}, expected {says} {limit}"

    return check


def _length(says: str, holds: Callable[[Any, Any], bool]) -> Callable[..., Iterator[str]]:
    def check(x: Any, limit: int, s: Schema, where: str) -> Iterator[str]:
        if isinstance(x, list) and not holds(len(x), limit):
            yield f"{where} has {len(x)} items, expected {says} {limit}"

    return check


_WORDS: dict[str, Callable[..., Iterator[str]]] = {
    "type": _type,
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
    "enum": _enum,
    "const": _const,
    "pattern": _pattern,
    "minimum": _bound("at least", lambda x, limit: x >= limit),
    "maximum": _bound("at most", lambda x, limit: x <= limit),
    "minItems": _length("at least", lambda x, limit: x >= limit),
    "maxItems": _length("at most", lambda x, limit: x <= limit),
}


def _finite(x: Any) -> bool:
    """A number that a float can hold; JSON's own may have any number of digits."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return False
    return -(2**63) <= x < 2**64 if isinstance(x, int) else math.isfinite(x)


def _brief(x: Any) -> str:
    if isinstance(x, dict | list):
        return "an object" if isinstance(x, dict) else "a list"
    return printable(json.dumps(x, ensure_ascii=False, default=repr), 60)
