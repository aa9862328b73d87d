"""The positions where two models differ most, with the text around them and what each would have said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..model.logits_stats import Record
from ..model.logits_summary import WORST
from .probes import Probe, ProbeSet
from .runners import Runner
from .tokenizer import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]
BEFORE, AFTER = 12, 4  # tokens shown around a position
DETAILED, DETAILED_TOKENS = 10, 4096  # positions, and tokens to run again for them
TOP = 10


def worst_places(records: Iterable[Record], count: int = WORST) -> list[tuple[str, int]]:
    """``(document, position)`` of the largest finite KL, in the order of a summary's ``worst``."""
    found = []
    for r in records:
        kl = np.where(r.stats.finite, r.stats.kl, -1.0)
        for i in np.argsort(-kl, kind="stable")[:count]:
            if kl[i] >= 0:
                found.append((-float(kl[i]), r.document, r.offset + int(i)))
    return [(document, position) for _, document, position in sorted(found)[:count]]


def top_ids(records: Sequence[Record]) -> set[int]:
    """Both models' most likely tokens at the worst positions."""
    by_name = {r.document: r for r in records}
    found = set()
    for document, position in worst_places(records):
        r = by_name[document]
        s, i = r.stats, position - r.offset
        found |= {int(s.top1_ref[i]), int(s.top1_cand[i])}
    return found


def key(document: str, position: int) -> str:
    """Name of a place in a part's tables."""
    return f"{document}@{position}"


def contexts(
    records: Sequence[Record], probes: ProbeSet, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    """Text before, at and behind the worst positions; ids in brackets without a tokenizer."""
    tokens = {p.id: p.tokens for p in probes}

    def text(ids: Array) -> list[str]:
        return [f"[{i}]" if tokenizer is None else tokenizer.piece(int(i)) for i in ids]

    found: dict[str, dict[str, Any]] = {}
    for document, at in worst_places(records):
        ids = tokens[document]
        found[key(document, at)] = {
            "before": text(ids[max(0, at - BEFORE) : at]),
            "token": text(ids[at : at + 1])[0],
            "after": text(ids[at + 1 : at + 1 + AFTER]),
        }
    return found


def likely_tokens(
    ref: Runner, cand: Runner, records: Sequence[Record], probes: ProbeSet
) -> dict[str, dict[str, list[list[float]]]]:
    """The most likely next tokens of both at the worst positions, as ``[id, probability]``; one more pass of each.

    Only for as many positions as fit into a small batch: they are an illustration.
    """
    by_id = {p.id: p for p in probes}
    places: list[tuple[Probe, int]] = []
    length = 0
    for document, at in worst_places(records, DETAILED):
        longest = max(length, at + 1)
        if longest * (len(places) + 1) <= DETAILED_TOKENS:
            places.append((by_id[document], at))
            length = longest
    if not places:
        return {}
    sides = {n: _tops(r, places) for n, r in (("reference", ref), ("candidate", cand))}
    return {
        key(p.id, at): {name: tops[i] for name, tops in sides.items()}
        for i, (p, at) in enumerate(places)
    }


def _tops(runner: Runner, places: Sequence[tuple[Probe, int]]) -> list[list[list[float]]]:
    """Of the last token of every sequence; padded in front, so that the embedding is read once for all of them."""
    length = max(at + 1 for _, at in places)
    tokens = np.full((len(places), length), runner.config.filler, np.int64)
    real = np.zeros(tokens.shape, bool)
    for row, mask, (p, at) in zip(tokens, real, places, strict=True):
        row[length - at - 1 :], mask[length - at - 1 :] = p.tokens[: at + 1], True
    runner.start(tokens, real)
    runner.finish()
    last = slice(length - 1, length)
    tiles = [tile[:, 0] for _, _, tile in runner.logit_tiles(positions=last)]
    return [_top(row) for row in np.concatenate(tiles, axis=-1).astype(np.float64)]


def _top(logits: Array) -> list[list[float]]:
    ids = np.argsort(-logits, kind="stable")[:TOP]
    with np.errstate(over="ignore", invalid="ignore"):
        p = np.exp(logits - logits.max())
        p /= p.sum()
    return [[int(i), float(f"{p[i]:.6g}")] for i in ids if np.isfinite(p[i])]
