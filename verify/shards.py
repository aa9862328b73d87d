"""Parts of one comparison as files, and putting them together; the numbers are the same for any number of parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..formats import strict_json
from ..formats.errors import ChecksumError, FormatError, UsageError
from ..formats.named_files import require_there
from ..formats.names import listing
from .divergence import Inside
from .evidence import Findings, documents_of, near_tie
from .floor import Floor
from .lockstep import LockstepResult, merge_results
from .measure import SCHEMA, Part, key_of
from .part_frame import COMMON
from .weights import Row, findings

MAX_BYTES = 1 << 31
SEAL = "self_sha256"


def dumps_part(part: Mapping[str, Any]) -> str:
    """A part as JSON text, with its own hash; the same measurements give the same bytes."""
    return _text({**part, SEAL: _seal(part)}) + "\n"


def _text(part: Mapping[str, Any]) -> str:
    return json.dumps(part, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _seal(part: Mapping[str, Any]) -> str:
    body = {k: v for k, v in part.items() if k != SEAL}
    return f"sha256:{hashlib.sha256(_text(body).encode()).hexdigest()}"


def read_part(path: Path) -> Part:
    """Read a part.

    Raises:
        FormatError: not a part, or of another version.
        ChecksumError: it was changed after it was written.
        NotFoundError, FileIOError: it cannot be read.
    """
    require_there(path, fix="name the parts the shards wrote.")
    part = strict_json.load_object(path, limit=MAX_BYTES)
    if part.get("schema") != SCHEMA:
        raise FormatError(
            f"this is no part of a comparison: schema {part.get('schema')!r}, expected {SCHEMA!r}.",
            where=path,
            fix="give the files that `g2verify compare … --shard i/N --report PART` wrote.",
        )
    if part.get(SEAL) != _seal(part):
        raise ChecksumError(
            "this part was changed after it was written.", where=path, fix="run that shard again."
        )
    return part


def check_parts(parts: Sequence[Part]) -> list[Part]:
    """The parts in order, if they are all of one comparison and none is missing.

    Raises:
        UsageError: they are not; says which.
        FormatError: a part is damaged.
    """
    if not parts:
        raise UsageError("there are no parts to merge.", fix="name the files the shards wrote.")
    try:
        shards = [tuple(p["shard"] or (0, 1)) for p in parts]
        keys = [key_of(p) for p in parts]
    except (KeyError, TypeError):
        raise FormatError(
            "a part of a comparison lacks fields.", fix="run that shard again."
        ) from None
    if len(set(keys)) > 1:
        odd = [n for n in COMMON if any(p[n] != parts[0][n] for p in parts)]
        raise UsageError(
            f"the parts are of different comparisons: they have not the same {', '.join(odd)}.",
            fix="run all shards with the same options and versions.",
        )
    count = shards[0][1]
    counts = sorted({n for _, n in shards})
    if counts != [count]:
        raise UsageError(
            f"the parts are shards of different numbers: of {listing([str(n) for n in counts])}.",
            fix="merge the shards of one run.",
        )
    have = [i for i, _ in shards]
    missing = sorted(set(range(count)) - set(have))
    if missing or len(have) != count:
        twice = sorted({i for i in have if have.count(i) > 1})
        said = [f"{_named(missing, f' of {count}')} missing"] if missing else []
        said += [f"{_named(twice)} there twice"] if twice else []
        raise UsageError(f"{' and '.join(said)}.", fix="merge every shard exactly once.")
    return [p for _, p in sorted(zip(have, parts, strict=True), key=lambda x: x[0])]


def _named(shards: Sequence[int], of: str = "") -> str:
    """``shard 2 of 3 is``, ``shards 1, 2 of 3 are``: counted from 0 here, from 1 for people."""
    one = len(shards) == 1
    found = listing([str(i + 1) for i in shards])
    return f"shard{'' if one else 's'} {found}{of} {'is' if one else 'are'}"


def join(parts: Sequence[Part]) -> Findings:
    """Measurements of all parts together.

    Raises:
        UsageError: parts are missing or of different comparisons.
        FormatError: a part is damaged.
    """
    ordered = check_parts(parts)
    merged: dict[str, Any] = {**ordered[0], "shard": None}
    for name in ("contexts", "pieces"):
        merged[name] = {k: v for p in ordered for k, v in p[name].items()}
    try:
        return _join(ordered, merged)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise FormatError(
            f"a part of a comparison is malformed ({e}).", fix="run it again."
        ) from None


def _join(parts: Sequence[Part], merged: dict[str, Any]) -> Findings:
    from ..model.logits_summary import summarise

    rows = None
    if merged["ledger"] is not None:
        rows = findings(_interleaved([[Row.from_json(r) for r in p["ledger"]] for p in parts]))
    result, kernel = (_merged(p[name] for p in parts) for name in ("lockstep", "kernel"))
    edges = [merged["window"]] if merged["window"] else []
    summary = documents = None
    if result is not None:
        tie = near_tie(_floor(merged["floor"]))
        summary = summarise(result.records, edges=edges, tolerance=tie)
        chosen = documents_of(result.records, merged)
        whole = len(chosen) == len(result.records)
        documents = summary if whole else summarise(chosen, tolerance=tie)
    inside = merged["inside"]
    return Findings(
        merged, rows, result, kernel, _floor(merged["floor"]), _floor(merged["kernel_floor"]),
        summary, documents, None if inside is None else Inside(**inside),
    )  # fmt: skip


def _interleaved(shares: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows in the order they were dealt out."""
    return [r for turn in zip_longest(*shares) for r in turn if r is not None]


def _merged(results: Iterable[Mapping[str, Any] | None]) -> LockstepResult | None:
    found = [LockstepResult.from_json(r) for r in results if r is not None]
    return merge_results(found) if found else None


def _floor(data: Mapping[str, Any] | None) -> Floor | None:
    return None if data is None else Floor.from_json(data)
