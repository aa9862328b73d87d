"""Packed weights against the manifest of whoever quantized them: bounds show that a weight is near, a hash that it is the one.

A code that was damaged on a disk or on the way may leave its row within the bounds of its format; nothing in the file itself
tells that from rounding. What g2quant writes carries the hash of every tensor in ``g2kit.manifest.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..formats.manifest import TensorEntry
from .ledger import QUANTIZED, Row

DAMAGED = (
    "not the weight that the manifest beside it names: damaged, or exchanged, after it was written"
)


def as_promised(row: Row, entries: Mapping[str, TensorEntry] | None) -> Row:
    """The row of a packed tensor, failed where its hash is not the manifest's.

    Args:
        row: of any rule; only packed weights with a hash are looked at.
        entries: canonical name -> what the manifest says of the tensor; None where there is no manifest of these files.
    """
    entry = (entries or {}).get(row.name)
    if row.rule != QUANTIZED or row.hash is None or entry is None:
        return row
    same = entry.shape == row.shape and entry.sha256 == row.hash
    if same:
        return replace(row, promised=True)
    note = f"{DAMAGED}; {row.note}" if row.note else DAMAGED
    return replace(row, promised=False, verdict="FAIL", note=note)
