"""What is known of every position of a document: plain data that shards write and a merge reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from ..formats.errors import FormatError, UsageError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Array = np.ndarray[Any, np.dtype[Any]]

VERSION = 1


@dataclass(frozen=True, eq=False)
class Stats:
    """Every position of a document, ``[positions]`` each; p is the reference's distribution, q the candidate's.

    Where a logit of either is not finite, floats are NaN and ids -1. Nats.

    Attributes:
        kl, reverse_kl: KL(p||q), KL(q||p).
        tv: total variation, the share of sampled tokens that must differ.
        max_diff: largest absolute difference of the logits.
        mean_diff: mean over the vocabulary of candidate minus reference.
        rms_diff: RMS over the vocabulary of the difference, its mean removed (a constant shift changes nothing).
        top1_ref, top1_cand: id of the largest logit; the smallest among equal ones.
        margin: the reference's largest logit minus its second.
        overlap5, overlap10: share of the reference's top k (at most the vocabulary) that are in the candidate's.
        lse_ref, lse_cand: log-sum-exp of the logits.
        target: the next token's id, -1 for none.
        logp_ref, logp_cand: log-probability of the target, NaN without one.
        finite_ref, finite_cand: all logits of that stream are finite.
    """

    kl: Floats
    reverse_kl: Floats
    tv: Floats
    max_diff: Floats
    mean_diff: Floats
    rms_diff: Floats
    top1_ref: Array
    top1_cand: Array
    margin: Floats
    overlap5: Floats
    overlap10: Floats
    lse_ref: Floats
    lse_cand: Floats
    target: Array
    logp_ref: Floats
    logp_cand: Floats
    finite_ref: Array
    finite_cand: Array

    def __len__(self) -> int:
        return len(self.kl)

    @property
    def finite(self) -> Array:
        """Positions that count."""
        return np.asarray(self.finite_ref & self.finite_cand)

    @property
    def agree(self) -> Array:
        """Top-1 ids are the same."""
        return np.asarray(self.finite & (self.top1_ref == self.top1_cand))

    @property
    def scored(self) -> Array:
        """Finite positions with a target."""
        return np.asarray(self.finite & (self.target >= 0))

    def flips(self, tolerance: float | None = None) -> tuple[Array, Array]:
        """Top-1 changes: those to be expected, and the real ones.

        Args:
            tolerance: logit error below which the reference's margin is a coin toss (a noise floor's); default the
                position's own largest difference.
        """
        flip = self.finite & (self.top1_ref != self.top1_cand)
        limit = self.max_diff if tolerance is None else tolerance
        with np.errstate(invalid="ignore"):
            close = self.margin <= limit
        return np.asarray(flip & close), np.asarray(flip & ~close)

    def first_non_finite(self) -> int | None:
        """First position with a NaN or infinite logit in either stream."""
        found = np.flatnonzero(~self.finite)
        return int(found[0]) if len(found) else None

    @staticmethod
    def empty() -> Stats:
        """No positions."""
        return Stats(**{n: np.empty(0, kind) for n, kind in _KINDS.items()})

    @staticmethod
    def join(parts: Sequence[Stats]) -> Stats:
        """Positions of several documents, one after the other."""
        parts = [Stats.empty(), *parts]
        return Stats(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in _KINDS})

    def select(self, mask: Array | slice) -> Stats:
        """The positions of a mask or slice."""
        return Stats(**{n: getattr(self, n)[mask] for n in _KINDS})

    def to_json(self) -> dict[str, list[Any]]:
        """Column name -> values; NaN becomes null."""
        return {n: [null(v) for v in getattr(self, n).tolist()] for n in _KINDS}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Stats:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: columns are missing, unknown, of different lengths or not numbers.
        """
        if not isinstance(data, Mapping) or set(data) != set(_KINDS):
            found = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise FormatError(f"statistics have columns {found}, expected {sorted(_KINDS)}.")
        columns = {n: _column(n, data[n], kind) for n, kind in _KINDS.items()}
        if len({len(c) for c in columns.values()}) > 1:
            raise FormatError("the columns of statistics have different lengths.")
        return Stats(**columns)


INTEGERS = ("top1_ref", "top1_cand", "target")
_KINDS: dict[str, str] = {
    f.name: "int64" if f.name in INTEGERS else "bool" if "finite" in f.name else "float64"
    for f in fields(Stats)
}


def null(x: Any) -> Any:
    """None for what JSON has no number for."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _column(name: str, values: Any, kind: str) -> Array:
    wanted: Any = {"int64": int, "bool": bool, "float64": (int, float, type(None))}[kind]
    if not isinstance(values, list) or not all(
        isinstance(v, wanted) and (kind == "bool" or not isinstance(v, bool)) for v in values
    ):
        raise FormatError(f"column {name} of statistics is not a list of {kind}.")
    try:
        return np.array([math.nan if v is None else v for v in values], dtype=kind)
    except OverflowError:
        raise FormatError(f"column {name} of statistics has a number out of range.") from None


@dataclass(frozen=True, eq=False)
class Record:
    """One document's statistics.

    Attributes:
        document: unique name.
        category: what kind of text it is.
        stats: its positions.
        offset: position of the first within its sequence (0 unless the beginning was not evaluated).
    """

    document: str
    category: str
    stats: Stats
    offset: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "document": self.document,
            "category": self.category,
            "offset": self.offset,
            "stats": self.stats.to_json(),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Record:
        """Inverse of :meth:`to_json`.

        Raises:
            FormatError: not what :meth:`to_json` writes.
        """
        kinds = {"document": str, "category": str, "offset": int, "stats": dict}
        if not isinstance(data, Mapping) or set(data) != set(kinds):
            raise FormatError(f"a record of statistics does not have the fields {sorted(kinds)}.")
        for name, kind in kinds.items():
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise FormatError(f"field {name} of a record of statistics is no {kind.__name__}.")
        stats = Stats.from_json(data["stats"])
        return Record(data["document"], data["category"], stats, data["offset"])


def merge(shards: Iterable[Iterable[Record]]) -> list[Record]:
    """Records of all shards in the order of their names.

    Raises:
        UsageError: a document is in two shards.
    """
    records = sorted((r for shard in shards for r in shard), key=lambda r: r.document)
    for one, two in pairwise(records):
        if one.document == two.document:
            raise UsageError(
                f"document {one.document!r} is in the statistics twice.",
                fix="merge every shard once and give documents different names.",
            )
    return records


def dumps(records: Iterable[Record]) -> str:
    """Records as JSON text, the same for the same numbers."""
    body = {"version": VERSION, "records": [r.to_json() for r in merge([records])]}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def loads(text: str) -> list[Record]:
    """Inverse of :func:`dumps`.

    Raises:
        FormatError: not such a text, or of another version.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError("the statistics are not JSON.") from None
    if not isinstance(body, dict) or not isinstance(body.get("records"), list):
        raise FormatError("the JSON holds no statistics: no list of records.")
    if body.get("version") != VERSION:
        raise FormatError(
            f"the statistics have version {body.get('version')!r}, expected {VERSION}.",
            fix="compute them again with this version.",
        )
    return merge([[Record.from_json(r) for r in body["records"]]])
