"""What a comparison may claim, when, and by which rule: one table, judged on evidence that others measured.

Thresholds are multiples of a measured noise floor or a budget the user chose. Where the evidence cannot decide, the verdict
is INCONCLUSIVE and says what would settle it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..formats.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_INPUT, EXIT_OK, UsageError
from ..model.bootstrap import Interval
from .claim_types import (
    ERROR,
    EXACT,
    FAIL,
    INCONCLUSIVE,
    PASS,
    Claim,
    Evidence,
    Limits,
    Measured,
    Proof,
)  # fmt: skip
from .identity import FUNCTION, NOTE, SIZE, USE
from .ledger import Row

EXITS = {PASS: EXIT_OK, FAIL: EXIT_FAIL, INCONCLUSIVE: EXIT_INCONCLUSIVE, ERROR: EXIT_INPUT}
_ORDER = (PASS, INCONCLUSIVE, FAIL, ERROR)
# Stored bits per weight -> mean KL in nats that is taken to be usual. From llama.cpp's scoreboard (Llama 3 8B: q8_0 0.0014,
# q6_K 0.0055, q5_K_M 0.011, q4_0 0.072), rounded up; --budget sets another.
BUDGETS = ((16.0, 0.001), (8.0, 0.003), (6.0, 0.01), (5.0, 0.02), (4.0, 0.08), (3.0, 0.3), (0.0, 1.0))  # fmt: skip
_LISTED = 4


@dataclass(frozen=True)
class Rule:
    """A row of :data:`CLAIMS`: when a claim is made, and how it is judged."""

    id: str
    title: str
    applies: Callable[[Evidence], bool]
    judge: Callable[[Evidence, Rule], Claim]

    def claim(
        self,
        verdict: str,
        sentence: str,
        evidence: Sequence[Proof] = (),
        missing: Sequence[str] = (),
    ) -> Claim:
        """A claim of this row."""
        return Claim(self.id, self.title, verdict, sentence, tuple(evidence), tuple(missing))


def judge(evidence: Evidence) -> list[Claim]:
    """Every claim that applies, in the table's order."""
    return [rule.judge(evidence, rule) for rule in CLAIMS if rule.applies(evidence)]


def overall(claims: Sequence[Claim]) -> str:
    """The worst verdict; INCONCLUSIVE where nothing was claimed."""
    verdicts = [c.verdict for c in claims] or [INCONCLUSIVE]
    return max(verdicts, key=_ORDER.index)


def budget_of(bits: float, wanted: float | str | None = None) -> tuple[float, str]:
    """Mean KL in nats allowed to a candidate, and where that comes from.

    Args:
        bits: stored bits per weight.
        wanted: the user's; None for the preset of that many bits.

    Raises:
        UsageError: not a positive number.
    """
    if wanted is None:
        preset = next(b for b in BUDGETS if bits >= b[0])
        return preset[1], f"preset for {preset[0]:g} bits and more"
    try:
        value = float(wanted)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UsageError(
            f"the budget is {wanted!r}, expected a positive number: mean KL in nats.",
            fix="for example --budget 0.01; leave it out for the preset of the candidate's bits.",
        )
    return value, "--budget"


# ---------------------------------------------------------------- weights and identity


def _w1(e: Evidence, rule: Rule) -> Claim:
    if e.rows is None:
        return _w1_by_fingerprint(e, rule)
    rows = [r for r in e.rows if not r.lossy]
    bad = [r for r in rows if r.verdict != PASS]
    proof = [_count("tensors equal bit for bit", rows, bad, "no tolerance")]
    if bad:
        return rule.claim(FAIL, f"{len(bad)} of {len(rows)} tensors differ: {_named(bad)}.", proof)
    rest = len(e.rows) - len(rows)
    wide = sum(r.reference_dtype != r.candidate_dtype for r in rows)
    text = f"{len(rows)} of {len(rows)} tensors are the same, bit for bit"
    text += f" ({wide} in another type that holds the same values)" if wide else ""
    text += f"; {rest} more were changed on purpose (W2)" if rest else ""
    return rule.claim(PASS, f"{text}.", proof)


def _w1_by_fingerprint(e: Evidence, rule: Rule) -> Claim:
    a, b = e.fingerprints
    if a is None or b is None:
        return rule.claim(
            INCONCLUSIVE, "A fingerprint is missing, so the weights could not be compared.",
            missing=["record the reference again with its fingerprint"],
        )  # fmt: skip
    if a == b:
        return rule.claim(PASS, f"Fingerprints are equal: the recorded weights, bit for bit ({a}).")
    return rule.claim(
        FAIL,
        f"Fingerprints differ: {a} was recorded, the candidate is {b}; what a lossy conversion costs is measured "
        "against the checkpoint itself.",
    )


def _w2(e: Evidence, rule: Rule) -> Claim:
    rows = [r for r in e.rows or () if r.lossy]
    bad = [r for r in rows if r.verdict != PASS]
    errors = [r.relative_error for r in rows if r.relative_error is not None]
    steps = [r.max_steps for r in rows if r.max_steps is not None]
    proof = [
        Proof(
            "tensors within their bound",
            len(rows) - len(bad),
            None,
            len(rows),
            "tensors",
            "analytic",
            "higher",
        ),
        Proof("relative error, largest", max(errors, default=0.0)),
        Proof("error in steps, largest", max(steps, default=0.0), unit="steps"),
    ]
    if bad:
        text = (
            f"{len(bad)} of {len(rows)} changed tensors are further off than their format explains"
        )
        return rule.claim(FAIL, f"{text}: {_named(bad)}.", proof)
    text = f"{len(rows)} changed tensors are within the bounds of their formats"
    kept = sum(r.promised is True for r in rows)
    text += f", {kept} of them what the candidate's manifest names, bit for bit" if kept else ""
    return rule.claim(
        PASS, f"{text}; largest relative error {max(errors, default=0.0):.2g}.", proof
    )


def _count(metric: str, rows: Sequence[Row], bad: Sequence[Row], source: str) -> Proof:
    return Proof(metric, len(rows) - len(bad), None, len(rows), "tensors", source, "higher")


def _named(rows: Sequence[Row]) -> str:
    shown = [f"{r.name} ({r.note or r.bound})" for r in rows[:_LISTED]]
    more = len(rows) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _c0(e: Evidence, rule: Rule) -> Claim:
    found = e.identity
    if found.pieces is None:
        rule = replace(rule, title="The configuration is the same")
    size, wrong = found.of(SIZE), found.of(FUNCTION, USE)
    what = f"{found.fields} configuration fields"
    what += f" and {found.pieces} tokenizer pieces" if found.pieces is not None else ""
    proof = [Proof("differences", len(size) + len(wrong), None, 0, "", "no tolerance")]
    if size:
        text = f"The two are different models: {_listed(size)}"
        return rule.claim(ERROR, f"{text}. Compare two checkpoints of one model.", proof)
    if wrong:
        many = "difference" if len(wrong) == 1 else "differences"
        text = f"{len(wrong)} {many} (reference / candidate): {_listed(wrong)}"
        return rule.claim(FAIL, f"{text}.", proof)
    notes = found.of(NOTE)
    tail = f" Not counted: {_listed(notes)}." if notes else ""
    return rule.claim(PASS, f"{what} are the same.{tail}", proof)


def _listed(found: Sequence[Any]) -> str:
    shown = "; ".join(str(d) for d in found[: 2 * _LISTED])
    return shown + (f"; and {len(found) - 2 * _LISTED} more" if len(found) > 2 * _LISTED else "")


# ---------------------------------------------------------------- function


def _non_finite(m: Measured, rule: Rule) -> Claim | None:
    if m.non_finite is None:
        return None
    return rule.claim(FAIL, f"NaN or infinity: {m.non_finite}.")


def _same_function(e: Evidence, rule: Rule) -> Claim:
    """L1, L2, X1: within the noise floor, on evidence that covers the model."""
    m, limits = e.measured, e.limits
    assert m is not None
    coarsest = "float64" if set(e.dtypes) == {"float64"} else "float32"
    words = _WORDS[rule.id].format(dtype=coarsest)
    return _within_floor(m, limits, rule, words, e.failed_checks, e.uncovered)


_WORDS = {
    "L1": "the difference is noise of {dtype}",
    "L2": "the difference is noise of the compute type",
    "X1": "the difference is noise of the two machines",
    "Q2": "the kernel's difference is noise",
}


def _within_floor(
    m: Measured,
    limits: Limits | None,
    rule: Rule,
    words: str,
    failed: Sequence[str] = (),
    uncovered: Sequence[str] = (),
) -> Claim:
    bad = _non_finite(m, rule)
    if bad is not None:
        return bad
    proof = _proofs(m, limits)
    over = [
        p
        for p in proof
        if p.threshold is not None and p.value is not None and p.value > p.threshold
    ]
    if over:
        worst = over[0]
        text = f"{worst.metric} is {worst.value:.2g}, {worst.source} allows {worst.threshold:.2g}"
        place = f"; the first block to differ is {m.divergent}" if m.divergent else ""
        return rule.claim(FAIL, f"{text}{place}.", proof)
    if failed:
        return rule.claim(FAIL, " ".join(failed), proof)
    missing = list(uncovered)
    unmeasured = limits is None or limits.kl_max is None
    if unmeasured:
        why = limits.source if limits else "none could be measured"
        missing.insert(0, f"a noise floor ({why})")
    if m.lower_bound:
        missing.append(
            "a recording with hidden states: from the largest logits KL is only bounded from below"
        )
    if m.kl_max is None:
        missing.insert(0, "at least one position with finite logits")
    if missing:
        text = "The evidence does not cover the model."
        if unmeasured and len(missing) == 1:
            text = "There is no noise floor to judge by."
        return rule.claim(INCONCLUSIVE, text, proof, missing)
    assert limits is not None
    text = f"Over {m.positions} positions of {m.documents} sequences {words}"
    return rule.claim(
        PASS, f"{text}: largest KL {m.kl_max:.2g} nats, {limits.kl_max:.2g} allowed.", proof
    )


def _proofs(m: Measured, limits: Limits | None) -> list[Proof]:
    source = limits.source if limits else "no floor"
    if limits is None:
        limits = Limits(None, None, source)
    root = limits.root_source or source
    proof = [
        Proof("KL, maximum", m.kl_max, None, limits.kl_max, "nats", source),
        Proof("KL, mean", m.kl_mean, None, limits.kl_mean, "nats", source),
        Proof("RMS logit difference, maximum", m.rms_max, None, limits.rms_max, "", root),
    ]  # fmt: skip
    if m.block_error is not None:
        proof.append(
            Proof(
                "a block's own relative error, maximum",
                m.block_error,
                None,
                m.block_threshold,
                "",
                root,
            )
        )
    return proof


def _q1(e: Evidence, rule: Rule) -> Claim:
    m = e.measured
    assert m is not None
    bad = _non_finite(m, rule)
    if bad is not None:
        return bad
    if e.failed_checks:
        return rule.claim(FAIL, " ".join(e.failed_checks))
    i = m.kl
    interval = None if i.low is None or i.high is None else (i.low, i.high)
    proof = [Proof("KL, mean", i.estimate, interval, e.budget, "nats", e.budget_source)]
    if m.tv is not None:
        proof.append(Proof("sampled tokens that change", m.tv, unit="share"))
    if interval is None or i.estimate is None:
        why = i.reason or "there are no positions"
        return rule.claim(
            INCONCLUSIVE, f"There is no interval for the mean KL: {why}.", proof,
            [f"more {m.clusters}: the ci profile, or --text with a longer file"],
        )  # fmt: skip
    low, high = interval
    what = f"mean KL {i.estimate:.3g} [{low:.3g}, {high:.3g}] nats over {i.documents} {m.clusters}"
    if low > e.budget:
        return rule.claim(FAIL, f"{what}; the budget is {e.budget:g} ({e.budget_source}).", proof)
    if high < e.budget:
        share = f"; {100 * m.tv:.2g} % of sampled tokens change" if m.tv is not None else ""
        return rule.claim(PASS, f"{what}, within the budget of {e.budget:g}{share}.", proof)
    more = more_documents(i, e.budget)
    text = f"{what} spans the budget of {e.budget:g}"
    return rule.claim(INCONCLUSIVE, f"{text}.", proof, [f"about {more} more {m.clusters}"])


def more_documents(interval: Interval, budget: float) -> int:
    """Documents that would be needed besides, the interval shrinking as one over the root of their number."""
    assert interval.low is not None
    assert interval.high is not None
    assert interval.estimate is not None
    half = max(interval.high - interval.estimate, interval.estimate - interval.low)
    gap = max(abs(interval.estimate - budget), 0.05 * budget)
    return max(1, math.ceil(interval.documents * ((half / gap) ** 2 - 1)))


def _q2(e: Evidence, rule: Rule) -> Claim:
    if e.kernel is None:
        return rule.claim(
            INCONCLUSIVE, "No kernel was run on the packed weights.",
            missing=["name the runner that serves them with --cand-runner, such as llama_cpp"],
        )  # fmt: skip
    return _within_floor(e.kernel, e.kernel_limits, rule, f"{_WORDS['Q2']} ({e.kernel_name})")


def _ran(e: Evidence) -> bool:
    return e.measured is not None


CLAIMS: tuple[Rule, ...] = (
    Rule("W1", "The weights are the same, bit for bit",
         lambda e: any(not r.lossy for r in e.rows) if e.rows is not None else not e.quantized, _w1),
    Rule("W2", "Changed weights are as close as their format allows",
         lambda e: any(r.lossy for r in e.rows or ()), _w2),
    Rule("C0", "The configuration and the tokenizer are the same", lambda e: True, _c0),
    Rule("L1", "Both compute the same function (float32)",
         lambda e: _ran(e) and e.exact and not e.lossy and not e.recorded, _same_function),
    Rule("L2", "Both compute the same as deployed",
         lambda e: _ran(e) and not e.exact and not e.lossy and not e.recorded, _same_function),
    Rule("Q1", "What changing the weights costs is within the budget",
         lambda e: _ran(e) and e.lossy, _q1),
    Rule("Q2", "The kernel computes what its weights say",
         lambda e: e.kernel is not None, _q2),
    Rule("X1", "This machine computes what was recorded",
         lambda e: _ran(e) and e.recorded and not e.lossy, _same_function),
)  # fmt: skip


__all__ = [
    "BUDGETS", "CLAIMS", "ERROR", "EXACT", "EXITS", "FAIL", "INCONCLUSIVE", "PASS", "Claim", "Evidence",
    "Limits", "Measured", "Proof", "Rule", "budget_of", "judge", "more_documents", "overall",
]  # fmt: skip
