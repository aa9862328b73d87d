"""The report document, ``g2kit.report/1``: everything that was found, as plain data that renderers and CI read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..formats.errors import LAST_RESORT, G2Error
from ..model.logits_stats import Record, Stats
from ..model.logits_summary import Worst
from ..sealed import sealed
from .claims import ERROR, EXITS, FAIL, INCONCLUSIVE, PASS, Claim, Proof, judge, overall
from .evidence import Findings, evidence, finite, not_verified, phrase
from .floor import Floor
from .hypotheses import hypotheses
from .identity import SIZE
from .weights import NARROWED, QUANTIZED, STEP, Row
from .worst import key

Array = np.ndarray[Any, np.dtype[Any]]
SCHEMA = "g2kit.report/1"
BINS = 256  # of the curve over positions
MARGINS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DP_PERCENTILES = (0.0, 0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
_BOUNDS = {NARROWED: 0.5, STEP: 0.5, QUANTIZED: 1.0}
_EMPTY: dict[str, Any] = {
    "schema": SCHEMA, "kind": "compare", "content_id": "", "verdict": ERROR, "exit_code": 3, "summary": "",
    "claims": [], "not_verified": [], "identity": {"reference": None, "candidate": None},
    "differences": [], "settings": {}, "coverage": None, "metrics": None, "series": None, "blocks": None,
    "agreement": None, "worst": None, "ledger": None, "floor": None, "self_test": None,
    "environment": {}, "run": None,
}  # fmt: skip


def build(f: Findings) -> dict[str, Any]:
    """The document of a comparison."""
    part = f.part
    if f.identity.of(SIZE):
        return _different_models(f)
    found = evidence(f)
    claims = judge(found)
    verdict = overall(claims)
    document = {
        **_EMPTY,
        "kind": part["kind"],
        "verdict": verdict,
        "exit_code": EXITS[verdict],
        "summary": summary(verdict, claims),
        "claims": [c.to_json() for c in claims],
        "not_verified": not_verified(f),
        "identity": _identity(f),
        "differences": part["identity"]["differences"],
        "settings": _settings(f, found.budget if any(c.id == "Q1" for c in claims) else None),
        "ledger": None if f.rows is None else [_ledger_row(r) for r in f.rows],
        "environment": part["environment"],
    }
    if f.result is not None and f.summary is not None:
        document |= {
            "coverage": _coverage(part["coverage"]),
            "metrics": f.summary.to_json(),
            "series": _series(f),
            "blocks": _blocks(f),
            "agreement": _agreement(f.result.records),
            "worst": _worst(f),
            "floor": _floor(f),
        }
    return sealed(document)


def error_document(e: G2Error, kind: str = "compare", **fields: Any) -> dict[str, Any]:
    """The document of a comparison that could not be made."""
    error = e.as_dict() | {"fix": e.fix or LAST_RESORT.get(e.code)}
    return sealed({**_EMPTY, "kind": kind, "exit_code": e.exit_code, "summary": str(e), **fields,
                   "error": error})  # fmt: skip


def self_test_report(
    found: Mapping[str, Any],
    side: Mapping[str, Any],
    floor: Floor,
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The document of a self-test.

    Args:
        found: of :func:`.self_test.self_test`.
        side: the model's SIDE object.
        floor: thresholds are its multiples.
        settings: of the run.
        environment: of the machine.
    """
    rows = found["mutants"]
    unseen = [m["id"] for m in rows if not m["caught_by"]]
    misplaced = [m["id"] for m in rows if m["caught_by"] and not m["right_place"]]
    text = f"{found['caught']} of {found['of']} known mistakes were noticed"
    text += f", not {', '.join(unseen)}" if unseen else ""
    if misplaced:
        text += f"; found in another place than they were made: {', '.join(misplaced)}"
    elif not unseen:
        text += ", each where it was made"
    proof = Proof(
        "mistakes noticed", found["caught"], None, found["of"], "mistakes", "all", "higher"
    )
    verdict = FAIL if unseen or misplaced else PASS if rows else INCONCLUSIVE
    claim = Claim(
        "S1", "The verifier notices known mistakes in this model", verdict, f"{text}.", (proof,)
    )
    return sealed({
        **_EMPTY, "kind": "self-test", "verdict": verdict, "exit_code": EXITS[verdict],
        "summary": claim.sentence, "claims": [claim.to_json()],
        "identity": {"reference": dict(side), "candidate": None}, "settings": dict(settings),
        "floor": floor.to_json(), "self_test": dict(found), "environment": dict(environment),
    })  # fmt: skip


def summary(verdict: str, claims: Sequence[Claim]) -> str:
    """One sentence: the first claim that decided, or what was shown."""
    deciding = [c for c in claims if c.verdict == verdict]
    if verdict == PASS:
        return " ".join(c.sentence for c in deciding if c.id not in ("C0",))
    word = {FAIL: "failed", INCONCLUSIVE: "is open", ERROR: "could not be judged"}[verdict]
    text = (
        f"{deciding[0].id} {word}: {deciding[0].sentence}" if deciding else "Nothing was claimed."
    )
    missing = f" Missing: {deciding[0].missing[0]}." if deciding and deciding[0].missing else ""
    more = f" ({', '.join(c.id for c in deciding[1:])} too)" if len(deciding) > 1 else ""
    return f"{text}{missing}{more}"


def _different_models(f: Findings) -> dict[str, Any]:
    claims = [c for c in judge(evidence(f)) if c.id == "C0"]
    return sealed({
        **_EMPTY, "kind": f.part["kind"], "summary": claims[0].sentence, "claims": [c.to_json() for c in claims],
        "not_verified": ["Nothing else was looked at."], "identity": _identity(f),
        "differences": f.part["identity"]["differences"], "settings": _settings(f, None),
        "environment": f.part["environment"],
    })  # fmt: skip


def _identity(f: Findings) -> dict[str, Any]:
    theirs, ours = f.fingerprints if f.rows or f.part["fingerprint"] else (None, None)
    sides = {"reference": (f.part["reference"], theirs), "candidate": (f.part["candidate"], ours)}
    return {
        n: {**side, "fingerprint": mark or side["fingerprint"]} for n, (side, mark) in sides.items()
    }


def _settings(f: Findings, budget: float | None) -> dict[str, Any]:
    settings = {**f.part["settings"], "budget": budget, "shard": None}
    probes = f.part["probes"]
    if probes is not None:
        settings |= {n: probes[n] for n in ("profile", "documents", "tokens")}
        settings["probes_sha256"] = probes["sha256"]
    return settings


def _ledger_row(r: Row) -> dict[str, Any]:
    return {
        **r.to_json(),
        "bound": _BOUNDS.get(r.rule) if r.lossy else None,
        "rule": f"{r.rule}: {r.bound}",
    }


def _coverage(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    seen = [s for s in found["softcap"] if s["utilisation"] is not None]
    return {**found, "softcap": seen}


def _floor(f: Findings) -> dict[str, Any] | None:
    return None if f.floor is None else f.floor.to_json()


def _series(f: Findings) -> dict[str, Any]:
    assert f.result is not None
    kl: list[Array] = []
    at: list[Array] = []
    dp: list[Array] = []
    for r in f.result.records:
        s, places = r.stats, r.offset + np.arange(len(r.stats))
        kl.append(s.kl[s.finite])
        at.append(places[s.finite])
        scored = s.select(s.scored)
        with np.errstate(under="ignore"):
            dp.append(np.exp(scored.logp_cand) - np.exp(scored.logp_ref))
    values, positions, change = (np.concatenate(x) if x else np.empty(0) for x in (kl, at, dp))
    shares = [*range(101), 99.5, 99.9, 99.99]
    return {
        "kl_by_position": _by_position(values, positions, f.part["window"]),
        "window": f.part["window"],
        "floor_kl": None if f.floor is None else f.floor.kl_max,
        "kl_ecdf": [[float(np.percentile(values, p)), p / 100] for p in sorted(shares)] if len(values) else [],
        "dp_percentiles": [[p, float(np.percentile(change, p))] for p in DP_PERCENTILES] if len(change) else [],
    }  # fmt: skip


def _by_position(kl: Array, at: Array, window: int | None) -> list[dict[str, Any]]:
    """KL in bins of positions, none of which crosses the window's edge."""
    longest = int(at.max()) + 1 if len(at) else 0
    width = max(1, math.ceil(longest / BINS))
    edges = sorted(
        {*range(0, longest, width), longest, *([window] if window and window < longest else [])}
    )
    rows = []
    for start, stop in pairwise(edges):
        x = kl[(at >= start) & (at < stop)]
        if len(x):
            rows.append({
                "position": start, "median": float(np.median(x)), "p99": float(np.percentile(x, 99)),
                "max": float(x.max()), "count": len(x),
            })  # fmt: skip
    return rows


def _agreement(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Positions with the same top-1 token, by the reference's margin."""
    s = Stats.join([r.stats for r in records])
    s = s.select(s.finite)
    rows = []
    for low, high in zip(MARGINS, (*MARGINS[1:], None), strict=True):
        inside = (s.margin >= low) & (s.margin < (math.inf if high is None else high))
        rows.append(
            {
                "from": low,
                "to": high,
                "positions": int(inside.sum()),
                "same": int((inside & s.agree).sum()),
            }
        )
    return rows


def _blocks(f: Findings) -> dict[str, Any]:
    assert f.result is not None
    first = f.divergent
    layers = [
        {
            "layer": e.layer, "kind": e.kind,
            "isolated": finite(e.isolated), "accumulated": finite(e.accumulated),
            "isolated_far": finite(e.isolated_far), "accumulated_far": finite(e.accumulated_far),
            "floor": None if f.floor is None else f.floor.hidden(e.layer),
            "threshold": None if f.floor is None else f.floor.threshold("hidden", e.layer),
        }
        for e in f.result.blocks
    ]  # fmt: skip
    found: dict[str, Any] = {"layers": layers, "first_divergent": None, "hypotheses": []}
    if f.floor is None or not (f.beyond or first is not None):
        return found
    lossy = any(r.lossy for r in f.rows or ()) or bool(f.part["candidate"]["quantized"])
    guesses = hypotheses(
        f.result,
        f.floor,
        inside=f.inside,
        differences=f.part["identity"]["differences"],
        rows=f.rows or (),
        lossy=lossy,
    )
    found["hypotheses"] = [h.to_json() for h in guesses]
    if lossy and any(r.verdict != PASS for r in f.rows or ()):
        return found  # where rounded weights part says nothing of the damaged one
    if first is not None:
        tap = f.inside.tap if f.inside is not None and f.inside.layer == first.layer else None
        place = {
            "probe": first.probe,
            "position": first.position,
            "tap": tap,
            "text": phrase(first, f.inside),
        }
        if 0 <= first.layer < len(f.result.blocks):
            found["first_divergent"] = {"layer": first.layer, **place}
        else:
            found["outside_blocks"] = {"kind": first.kind, **place}
    return found


def _worst(f: Findings) -> list[dict[str, Any]]:
    assert f.summary is not None
    assert f.result is not None
    categories = {r.document: r.category for r in f.result.records}
    return [_worst_row(f.part, w, categories[w.document]) for w in f.summary.worst]


def _worst_row(part: Mapping[str, Any], w: Worst, category: str) -> dict[str, Any]:
    place = key(w.document, w.position)
    around = part["contexts"].get(place, {"before": [], "token": "", "after": []})
    tops = (part["likely"] or {}).get(
        place, {"reference": [[w.top1_ref, None]], "candidate": [[w.top1_cand, None]]}
    )
    pieces = part["pieces"] or {}

    def top(name: str) -> list[dict[str, Any]]:
        return [
            {"id": int(i), "piece": pieces.get(str(int(i)), f"[{int(i)}]"), "p": p}
            for i, p in tops[name]
        ]

    return {
        "document": w.document, "category": category, "position": w.position, **around,
        "kl": w.kl, "tv": w.tv, "max_diff": w.max_diff, "margin": w.margin,
        "reference_top": top("reference"), "candidate_top": top("candidate"),
    }  # fmt: skip
