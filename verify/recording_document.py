"""``recording.json``: every field checked, every complaint an error that names the place. Reads no arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..formats import dtypes
from ..formats.errors import ChecksumError, FormatError, printable
from ..formats.fingerprint import PREFIX as FINGERPRINT
from ..formats.names import listing
from ..model.config import GemmaConfig
from . import recording_schema as schema
from .floor import Floor

DAMAGED = "copy or record it again."
_HEX = frozenset("0123456789abcdef")
_KEYS = (
    "schema", "id", "kind", "model", "runner", "settings", "environment", "floor", "probes",
    "files", "run", "self_sha256",
)  # fmt: skip
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("probes", "profile", str), ("probes", "seed", int), ("probes", "skipped", list),
    ("probes", "sha256", str), ("runner", "name", str), ("runner", "dtype", str), ("runner", "device", str),
    ("runner", "version", str | None), ("model", "parameters", int),
    ("model", "format", str), ("model", "layout", str), ("model", "dtypes", dict),
    ("model", "quantized", int), ("settings", "embedding", bool),
)  # fmt: skip


def parse(document: Mapping[str, Any], where: Path) -> tuple[schema.Sizes, GemmaConfig]:
    """Check a document.

    Returns:
        What its arrays must be, and the model's config.

    Raises:
        FormatError: not a recording's, of a newer version, or a field is not what it must be.
        ChecksumError: it was changed after it was written.
        ConfigError: the model's configuration contradicts itself.
    """
    check = _Checker(where)
    _check_schema(document.get("schema"), where)
    if odd := sorted(set(_KEYS) ^ document.keys()):
        raise FormatError(f"missing or unknown keys: {listing(odd)}.", where=where)
    for key, computed in (
        ("self_sha256", schema.self_sha256(document)),
        ("id", schema.content_id(document)),
    ):
        if document[key] != computed:
            raise ChecksumError(
                f"{key} is {printable(str(document[key]), 100)}, its content gives {computed}.",
                where=where,
                fix=f"the recording was changed or damaged; {DAMAGED}",
            )
    config = _config(check, document["model"])
    rows = check.get(document["probes"], "list", "probes", list)
    for row in rows:
        _check_row(check, row)
    for section, key, kind in _FIELDS:
        check.get(document[section], key, section, kind)
    check.count(document["model"], "quantized", "model")
    for name in document["model"]["dtypes"]:
        check.count(document["model"]["dtypes"], name, "model.dtypes")
    skipped = document["probes"]["skipped"]
    check.require(all(isinstance(x, dict) for x in skipped), "probes.skipped", "objects")
    for entry in skipped:
        for key in ("group", "why"):
            check.get(entry, key, "probes.skipped[]", str)
    _check_files(check, document)
    for key in ("environment", "run", "runner"):
        check.require(isinstance(document[key], dict), key, "an object")
    if document["floor"] is not None:
        floor, ran = Floor.from_json(document["floor"]), document["runner"]["dtype"]
        check.require(
            floor.dtype == ran, "floor.dtype", f"the run's compute type, {printable(ran)}"
        )
    return _sizes(check, document, config, sum(row["length"] for row in rows)), config


def _check_schema(found: Any, where: Path) -> None:
    if found in schema.READABLE:
        return
    if not isinstance(found, str) or not found.startswith(schema.FAMILY):
        raise FormatError(
            f"this is not a g2kit recording (schema {schema.SCHEMA}).",
            where=where,
            fix="make one with `g2verify record MODEL OUT`.",
        )
    raise FormatError(
        f"the recording has schema {printable(found, 60)}; this g2kit reads "
        f"{' and '.join(schema.READABLE)}.",
        where=where,
        fix="install a newer g2kit, or record again with this one.",
    )


class _Checker:
    """Types of the document's values; every complaint is a FormatError that names the place."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def require(self, good: bool, place: str, wanted: str) -> None:
        if not good:
            raise FormatError(f"{printable(place, 100)} must be {wanted}.", where=self.where)

    def get(self, holder: Any, key: str, place: str, kind: Any) -> Any:
        """``holder[key]``, of that type."""
        self.require(isinstance(holder, dict), place, "an object")
        self.require(key in holder, f"{place}.{key}", "there")
        value = holder[key]
        good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        self.require(good, f"{place}.{key}", f"of type {getattr(kind, '__name__', kind)}")
        return value

    def count(self, holder: Any, key: str, place: str) -> int:
        value = self.get(holder, key, place, int)
        self.require(0 <= value < 1 << 40, f"{place}.{key}", "a whole number, not negative")
        return int(value)

    def digest(self, holder: Any, key: str, place: str, prefix: str = "") -> str:
        value = self.get(holder, key, place, str)
        text = value.removeprefix(prefix)
        good = value.startswith(prefix) and len(text) == 64 and _HEX.issuperset(text)
        self.require(good, f"{place}.{key}", f"{prefix}… with 64 lower-case hex digits")
        return str(value)


def _config(check: _Checker, model: Any) -> GemmaConfig:
    found = check.get(model, "config", "model", dict)
    own = {f.name: f.type for f in fields(GemmaConfig)}
    check.require(found.keys() == own.keys(), "model.config", f"an object with {', '.join(own)}")
    for name, kind in own.items():
        value = found[name]
        if kind == "int" or (kind == "int | None" and value is not None):
            check.count(found, name, "model.config")
        elif kind == "float" or (kind == "float | None" and value is not None):
            good = isinstance(value, int | float) and not isinstance(value, bool)
            check.require(good, f"model.config.{name}", "a number")
    ends = check.get(found, "eos_token_id", "model.config", list)
    check.require(all(type(n) is int for n in ends), "model.config.eos_token_id", "whole numbers")
    check.digest(model, "fingerprint", "model", FINGERPRINT)
    check.digest(model, "embedding_sha256", "model")
    return GemmaConfig(**{**found, "eos_token_id": tuple(ends)})


def _check_row(check: _Checker, row: Any) -> None:
    for key in ("id", "group", "category", "document"):
        check.get(row, key, "probes.list[]", str)
    check.get(row, "scored", "probes.list[]", bool)
    check.digest(row, "tokens_sha256", "probes.list[]")
    length = check.count(row, "length", "probes.list[]")
    check.require(length > 0, "probes.list[].length", "at least 1")


def _check_files(check: _Checker, document: Mapping[str, Any]) -> None:
    files, names = document["files"], {schema.ARRAYS}
    if document["schema"] != schema.FIRST:
        tokenizer = check.get(document["model"], "tokenizer", "model", dict | None)
        if tokenizer is not None:
            names.add(schema.TOKENIZER)
            check.count(tokenizer, "pieces", "model.tokenizer")
            check.get(tokenizer, "rebuilt", "model.tokenizer", bool)
    for name in sorted(names):
        entry = check.get(files, name, "files", dict)
        check.count(entry, "size", "files")
        check.digest(entry, "sha256", "files")
    check.require(files.keys() == names, "files", f"an object with {listing(sorted(names))}")


def _sizes(
    check: _Checker, document: Mapping[str, Any], config: GemmaConfig, positions: int
) -> schema.Sizes:
    kind = document["kind"]
    check.require(kind in schema.KINDS, "kind", f"one of {', '.join(schema.KINDS)}")
    dtype = document["runner"]["dtype"]
    check.require(dtype in schema.WIDE, "runner.dtype", f"one of {', '.join(schema.WIDE)}")
    check.require(positions > 0, "probes.list", "not empty")
    stored = check.get(document["model"], "embedding_dtype", "model", str)
    carried = {d.name: d for d in dtypes.FLOATS}
    check.require(stored in carried, "model.embedding_dtype", f"one of {', '.join(carried)}")
    has_embedding = document["settings"]["embedding"]
    check.require(kind == schema.HIDDEN or not has_embedding, "settings.embedding", "false here")
    return schema.Sizes(
        kind, positions, config.hidden_size, config.num_hidden_layers, config.vocab_size, dtype,
        carried[stored] if has_embedding else None, document["schema"] != schema.FIRST,
    )  # fmt: skip
