"""The ledger of weights: a row per tensor, and what only all rows together say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..formats.fingerprint import fingerprint

EQUAL, WIDENED, NARROWED, STEP, QUANTIZED = "equal", "widened", "narrowed", "step", "quantized"
LOSSLESS = (EQUAL, WIDENED)
NO_LEAF = "zero padding"  # rows past the vocabulary that carry nothing


@dataclass(frozen=True)
class Row:
    """One tensor of the ledger.

    Attributes:
        name: canonical name.
        shape: canonical shape.
        reference_dtype, candidate_dtype: g2kit's short names, or the packed type's; None where the side lacks it.
        rule: ``equal``, ``widened``, ``narrowed``, ``step`` or ``quantized``.
        verdict: ``PASS`` or ``FAIL``.
        equal, different: elements with the same, another value.
        hash, reference_hash: sha256 of the canonical bytes of the candidate, the reference.
        leaf, reference_leaf: what the fingerprints are made of.
        sqnr_db: signal to error, None where nothing differs.
        relative_error: RMS error over RMS of the reference, None where nothing differs.
        max_steps: largest error in units of ``bound``'s step.
        bound: the rule in words.
        note: what else is to be said.
        nonfinite: NaN and infinite elements of the candidate.
        reference_nonfinite: those of the reference.
        zero_rows: rows of a matrix that are all zero in the candidate.
        promised: of a packed tensor, whether its hash is the one in the candidate's manifest; None without a manifest.
    """

    name: str
    shape: tuple[int, ...]
    reference_dtype: str | None
    candidate_dtype: str | None
    rule: str
    verdict: str
    equal: int
    different: int
    hash: str | None = None
    reference_hash: str | None = None
    leaf: str | None = None
    reference_leaf: str | None = None
    sqnr_db: float | None = None
    relative_error: float | None = None
    max_steps: float | None = None
    bound: str = "equal bits"
    note: str = ""
    nonfinite: int = 0
    reference_nonfinite: int = 0
    zero_rows: int = 0
    promised: bool | None = None

    @property
    def lossy(self) -> bool:
        """Whether the mapping changed values as it was meant to, so that W2 and not W1 judges it."""
        return self.rule not in LOSSLESS and (self.different > 0 or self.verdict != "PASS")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Row:
        """Inverse of :meth:`to_json`."""
        return Row(**{**data, "shape": tuple(data["shape"])})


def fingerprints(rows: list[Row]) -> tuple[str | None, str | None]:
    """Fingerprints of reference and candidate; None where a tensor could not be hashed."""
    sides: list[str | None] = []
    for side in ("reference_leaf", "leaf"):
        dtype = "reference_dtype" if side == "reference_leaf" else "candidate_dtype"
        there = [r for r in rows if getattr(r, dtype) is not None]
        found = {r.name: getattr(r, side) for r in there if getattr(r, side) != NO_LEAF}
        sides.append(None if None in found.values() else fingerprint(found))
    return sides[0], sides[1]


def findings(rows: list[Row]) -> list[Row]:
    """The rows with notes that need all of them: tensors that hold another one's content, copies, zero rows."""
    theirs, ours = (
        _names_by([(r.reference_hash, r) for r in rows]),
        _names_by([(r.hash, r) for r in rows]),
    )
    out = []
    for r in rows:
        notes = [r.note] if r.note else []
        elsewhere = [n for n in theirs.get(r.hash or "", []) if n != r.name]
        if r.verdict == "FAIL" and elsewhere:
            notes.append(f"holds what the reference has as {elsewhere[0]}")
        twins = [n for n in ours.get(r.hash or "", []) if n != r.name]
        if twins and not set(twins) <= set(theirs.get(r.reference_hash or "", [])):
            notes.append(f"the same bits as {twins[0]}")
        if r.zero_rows:
            notes.append(f"{r.zero_rows} rows are all zero")
        out.append(replace(r, note="; ".join(notes)))
    return out


def _names_by(pairs: list[tuple[str | None, Row]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for digest, row in pairs:
        if digest is not None:
            found.setdefault(digest, []).append(row.name)
    return found
