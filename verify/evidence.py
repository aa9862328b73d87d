"""From merged measurements to what claims are judged on: thresholds, largest errors, what was not covered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.logits_stats import Record
from ..model.logits_summary import Summary, summarise
from .claims import Evidence, Limits, Measured, budget_of
from .coverage import REQUIRED
from .decoding import NEAR_TIE
from .divergence import Divergence, Inside, divergent
from .floor import Floor
from .identity import Difference, Identity
from .lockstep import LockstepResult
from .probes import GROUPS
from .unnoticed import warning
from .weights import QUANTIZED, Row, fingerprints

DOCUMENTS = "P2"  # the group intervals are computed from


@dataclass(frozen=True)
class Findings:
    """Parts put together and parsed.

    Attributes:
        part: a merged part: its plain fields.
        rows: the ledger with all its notes, None where a side holds no weights.
        result: of the models, None where none ran.
        kernel: of the packed weights' own kernel.
        floor: noise between the two runs.
        kernel_floor: noise of the kernel.
        summary: of ``result``.
        documents: summary of the documents alone, from which intervals are.
        inside: of the first divergent block.
    """

    part: Mapping[str, Any]
    rows: list[Row] | None
    result: LockstepResult | None
    kernel: LockstepResult | None
    floor: Floor | None
    kernel_floor: Floor | None
    summary: Summary | None
    documents: Summary | None
    inside: Inside | None

    @property
    def identity(self) -> Identity:
        """C0."""
        found = self.part["identity"]
        differences = tuple(Difference(**d) for d in found["differences"])
        return Identity(differences, found["fields"], found["pieces"], tuple(found["untested"]))

    @property
    def fingerprints(self) -> tuple[str | None, str | None]:
        """Of both sides' weights."""
        if self.rows is not None:
            return fingerprints(self.rows)
        return self.part["reference"]["fingerprint"], self.part["fingerprint"]

    @property
    def beyond(self) -> bool:
        """Whether logits differ by more than noise."""
        return self.summary is not None and beyond(self.summary, self.floor)

    @property
    def divergent(self) -> Divergence | None:
        """The first layer that differs by more than noise; see :func:`first_layer`."""
        if self.result is None or self.summary is None:
            return None
        return first_layer(self.result, self.summary, self.floor)


def evidence(f: Findings) -> Evidence:
    """What the claims are judged on."""
    part = f.part
    settings = part["settings"]
    engines = settings["reference_engine"], settings["candidate_run_by"]
    recorded = part["reference"]["kind"] == "recording"
    runner = part["reference"].get("runner") or engines[0] if recorded else engines[0]
    bits = part["bits"]
    if f.rows and not part["candidate"]["quantized"]:
        bits = 16.0
    budget, source = budget_of(bits, settings["budget_option"])
    return Evidence(
        identity=f.identity,
        rows=f.rows,
        fingerprints=f.fingerprints,
        dtypes=(runner["dtype"], "as stored" if part["rounds_inputs"] else engines[1]["dtype"]),
        recorded=recorded,
        quantized=bool(part["candidate"]["quantized"]),
        bits=bits,
        measured=_measured(
            f.result, f.summary, f.documents, f.floor, f.inside, has_documents(part)
        ),
        limits=_limits(f.floor) or Limits(None, None, part["floor_reason"] or "none was measured"),
        kernel=_measured(f.kernel, _summary(f.kernel), None, None, None),
        kernel_name=part["kernel_name"] or "",
        kernel_limits=_limits(f.kernel_floor),
        failed_checks=[f"{c['id']} {c['title']}: {c['detail']}" for c in _checks(part, "FAIL")],
        uncovered=_uncovered(part),
        budget=budget,
        budget_source=source,
    )


def has_documents(part: Mapping[str, Any]) -> bool:
    """Whether natural documents are among the probes, so that intervals are over them."""
    return any(g == DOCUMENTS for _, g in (part["probes"] or {"list": ()})["list"])


def documents_of(records: Sequence[Record], part: Mapping[str, Any]) -> list[Record]:
    """The natural documents; all scored records where there are none."""
    groups = {i: g for i, g in part["probes"]["list"]}
    chosen = [r for r in records if groups.get(r.document) == DOCUMENTS]
    return chosen or [r for r in records if r.stats.scored.any()] or list(records)


def near_tie(floor: Floor | None) -> float | None:
    """The margin below which noise alone may exchange the two largest logits, as in P9; None without a floor."""
    limit = None if floor is None else floor.threshold("rms_logit")
    return None if limit is None else NEAR_TIE * limit


def not_verified(f: Findings) -> list[str]:
    """Sentences on what no claim of this report covers."""
    part = f.part
    wide = warning(part["let_pass"])
    said = [*([] if wide is None else [wide]), *part["identity"]["untested"]]
    if f.rows is None:
        said.append("Weights were not compared tensor by tensor: a recording holds none.")
    if any(r.rule == QUANTIZED and r.promised is None for r in f.rows or ()):
        said.append(
            "The candidate has no manifest of g2kit for its packed weights: a damaged code whose row stays within its "
            "bound would look like rounding."
        )
    if f.result is None:
        said.append("The models were not run.")
        return said
    said += _left_out(part["probes"])
    for r in (part["coverage"] or {}).get("regimes", []):
        if not r["exercised"] and r["name"] not in required(part):
            amount = "" if r["value"] is None else f" ({r['value']:g} of {r['needed']:g})"
            said.append(f"Not exercised: {r['name']}{amount}: {_sentence(r['detail'])}")
    if any(d == "bfloat16" for d in evidence(f).dtypes):
        said.append(
            "In bfloat16, faults smaller than its rounding cannot be seen; float32 shows them."
        )
    if part["candidate"]["quantized"] and f.kernel is None:
        said.append(
            "The kernel that serves the packed weights was not run (torch and jax dequantize them): "
            "name its program, --cand-runner transformers or llama_cpp."
        )
    return said


def _left_out(probes: Mapping[str, Any]) -> list[str]:
    """Groups of probes that were not run, or not all of: those that the profile leaves out in one sentence."""
    named = [
        (f"{GROUPS.get(s['group'], 'probes')} ({s['group']})", s["why"]) for s in probes["skipped"]
    ]
    chosen = f"the {probes['profile']} profile"
    by_design = list(dict.fromkeys(name for name, why in named if chosen in why))
    said = [f"Not run: {name}: {_sentence(why)}" for name, why in named if chosen not in why]
    if by_design:
        said.insert(
            0, f"By design, {chosen} runs only a part or nothing of: {', '.join(by_design)}."
        )
    return said


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _checks(part: Mapping[str, Any], verdict: str) -> list[dict[str, Any]]:
    checks = (part["coverage"] or {}).get("checks", [])
    return [c for c in checks if c["verdict"] == verdict]


def required(part: Mapping[str, Any]) -> tuple[str, ...]:
    """Regimes that a claim about the function needs; soft-caps are not seen where two recordings are compared."""
    recorded = part["candidate"]["kind"] == "recording"
    return tuple(r for r in REQUIRED if not (recorded and "soft-cap" in r))


def _uncovered(part: Mapping[str, Any]) -> list[str]:
    regimes = (part["coverage"] or {}).get("regimes", [])
    return [
        f"{r['name']}: {_amount(r['value'])} where {r['needed']:g} is needed ({r['detail']})"
        for r in regimes
        if r["name"] in required(part) and not r["exercised"]
    ]


def _amount(value: float | None) -> str:
    return "nothing was measured" if value is None else f"{value:g}"


def _limits(floor: Floor | None) -> Limits | None:
    if floor is None:
        return None
    best = max(floor.estimators, key=lambda e: e.kl_max)
    sources = [
        f"{x:.3g} x floor ({best.name}, {floor.dtype})" for x in (floor.k, math.sqrt(floor.k))
    ]
    names = ("kl_max", "kl_mean", "rms_logit")
    largest, mean, rms = (floor.threshold(n) for n in names)
    return Limits(largest, rms, sources[0], mean, sources[1])


def _summary(result: LockstepResult | None) -> Summary | None:
    return None if result is None else summarise(result.records, draws=200)


def _measured(
    result: LockstepResult | None,
    summary: Summary | None,
    documents: Summary | None,
    floor: Floor | None,
    inside: Inside | None,
    texts: bool = False,
) -> Measured | None:
    if result is None or summary is None:
        return None
    overall, chosen = summary.overall, documents or summary
    kl, rms = overall.metrics.get("kl"), overall.metrics.get("rms_diff")
    first = first_layer(result, summary, floor)
    tv = chosen.overall.metrics.get("tv")
    return Measured(
        documents=overall.documents,
        positions=overall.positions,
        kl_max=None if kl is None else kl.percentiles["100"],
        kl=chosen.intervals["kl"],
        clusters="documents" if texts else "sequences",
        kl_mean=None if kl is None else kl.mean,
        rms_max=None if rms is None else rms.percentiles["100"],
        tv=None if tv is None else tv.mean,
        non_finite=_non_finite(result, summary),
        divergent=None if first is None else phrase(first, inside),
        block_error=_largest(result, floor, first)[0],
        block_threshold=_largest(result, floor, first)[1],
        lower_bound=result.head == "top-k",
    )


def beyond(summary: Summary, floor: Floor | None) -> bool:
    """Whether KL or the largest RMS logit difference is above its threshold."""
    metrics = summary.overall.metrics
    if floor is None or not metrics:
        return False
    pairs = (("kl", "kl_max"), ("rms_diff", "rms_logit"))
    limits = [(metrics[m].percentiles["100"], floor.threshold(t)) for m, t in pairs]
    limits.append((metrics["kl"].mean, floor.threshold("kl_mean")))
    return any(limit is not None and value > limit for value, limit in limits)


def first_layer(result: LockstepResult, summary: Summary, floor: Floor | None) -> Divergence | None:
    """The first layer that differs by more than noise.

    A block's own error says so by itself. Errors that were carried along, which grow with depth and by chance, only
    where the logits differ too; then they say from where on.
    """
    if floor is None:
        return None
    first = next(iter(divergent(result, floor)), None)
    if first is None or first.isolated or first.error is None or beyond(summary, floor):
        return first
    return None


def _largest(
    result: LockstepResult, floor: Floor | None, first: Divergence | None
) -> tuple[float | None, float | None]:
    """Error and threshold of the divergent layer, else of the one that comes nearest to its own."""
    if first is not None:
        return first.error, first.threshold
    if floor is None:
        return None, None
    found = []
    for e in result.blocks:
        limit = floor.threshold("isolated", e.layer)
        if e.own is not None and limit:
            found.append((e.own / limit, e.own, limit))
    return max(found)[1:] if found else (None, None)


def phrase(d: Divergence, inside: Inside | None) -> str:
    """A layer and where in it, in words."""
    names = {"embedding": "the embedding", "final": "the final norm"}
    text = names.get(d.kind, f"block {d.layer} ({d.kind})")
    if inside is not None and inside.layer == d.layer:
        text += f" at {inside.tap}"
    return f"{text}, from position {d.position} of {d.probe} on"


def _non_finite(result: LockstepResult, summary: Summary) -> str | None:
    """Where the first NaN or infinity is, in forward order; None without one."""
    hidden = min(result.non_finite, key=lambda n: (n.layer, n.probe, n.position), default=None)
    if hidden is not None:
        place = (hidden.layer, hidden.probe, hidden.position)
        sides = {n.side for n in result.non_finite if (n.layer, n.probe, n.position) == place}
        who = "both sides'" if len(sides) == 2 else f"the {hidden.side}'s"
        names = {-1: "the embedding", len(result.blocks): "the final norm"}
        where = names.get(hidden.layer, f"block {hidden.layer}")
        text = f"first in {who} output of {where}, position {hidden.position} of {hidden.probe}"
        logits = summary.first_non_finite
        if logits is None or logits[:2] == (hidden.probe, hidden.position):
            return text
        return f"{text}; in the logits at position {logits[1]} of {logits[0]} too"
    if summary.first_non_finite is None:
        return None
    document, position, side = summary.first_non_finite
    return f"first in the {side}'s logits at position {position} of {document}"


def finite(x: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return x if x is not None and math.isfinite(x) else None
