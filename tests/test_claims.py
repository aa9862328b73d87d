"""The table of claims: when each is made, what decides it, and what it says where nothing can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from verify_cases import sample_floor

from g2kit.formats.errors import UsageError
from g2kit.model.bootstrap import Interval, ratio_interval
from g2kit.verify.claims import (
    BUDGETS,
    CLAIMS,
    EXITS,
    Claim,
    Evidence,
    Limits,
    Measured,
    budget_of,
    judge,
    more_documents,
    overall,
)
from g2kit.verify.evidence import _limits as limits_of
from g2kit.verify.identity import FUNCTION, NOTE, SIZE, Difference, Identity
from g2kit.verify.weights import EQUAL, NARROWED, QUANTIZED, Row

SAME = Identity((), 18, 3072)
EQUAL_ROW = Row("a", (2, 2), "bf16", "bf16", EQUAL, "PASS", 4, 0)
PACKED_ROW = Row(
    "b", (2, 2), "bf16", "Q4_0", QUANTIZED, "PASS", 0, 4, relative_error=0.05, max_steps=0.5
)
LIMITS = Limits(1e-10, 1e-5, "10 x floor (float64 run, float32)")


def interval(estimate: float, low: float | None, high: float | None, n: int = 64) -> Interval:
    return Interval(estimate, low, high, 0.95, n, None if low is not None else "too few")


GOOD = Measured(10, 100, 1e-12, interval(1e-12, 0.0, 2e-12), rms_max=1e-7, tv=1e-6)
BASE = Evidence(SAME, [EQUAL_ROW], measured=GOOD, limits=LIMITS)


def claims(e: Evidence) -> dict[str, Claim]:
    return {c.id: c for c in judge(e)}


def measured(**changes: Any) -> Evidence:
    return replace(BASE, measured=replace(GOOD, **changes))


def test_the_table() -> None:
    assert [r.id for r in CLAIMS] == ["W1", "W2", "C0", "L1", "L2", "Q1", "Q2", "X1"]
    assert EXITS == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 6, "ERROR": 3}


@pytest.mark.parametrize(("evidence", "made"), [
    (BASE, {"W1", "C0", "L1"}),
    (replace(BASE, measured=None), {"W1", "C0"}),
    (replace(BASE, dtypes=("bfloat16", "bfloat16")), {"W1", "C0", "L2"}),
    (replace(BASE, dtypes=("float32", "bfloat16")), {"W1", "C0", "L2"}),
    (replace(BASE, dtypes=("float64", "float32")), {"W1", "C0", "L1"}),
    (replace(BASE, rows=[EQUAL_ROW, PACKED_ROW], quantized=True, budget=1.0), {"W1", "W2", "C0", "Q1"}),
    (replace(BASE, rows=[PACKED_ROW], quantized=True, budget=1.0, kernel=GOOD, kernel_limits=LIMITS),
     {"W2", "C0", "Q1", "Q2"}),
    (replace(BASE, rows=None, recorded=True), {"W1", "C0", "X1"}),
    (replace(BASE, rows=None, recorded=True, quantized=True, budget=1.0), {"C0", "Q1"}),
])  # fmt: skip
def test_which_claims_are_made(evidence: Evidence, made: set[str]) -> None:
    assert set(claims(evidence)) == made


def test_everything_good_passes() -> None:
    assert {c.verdict for c in judge(BASE)} == {"PASS"}
    assert "1e-10 allowed" in claims(BASE)["L1"].sentence


def test_w1_has_no_tolerance() -> None:
    bad = replace(
        EQUAL_ROW,
        name="model.x",
        verdict="FAIL",
        different=1,
        equal=3,
        note="first difference at [0, 1]",
    )
    found = claims(replace(BASE, rows=[EQUAL_ROW, bad]))["W1"]
    assert found.verdict == "FAIL"
    assert "1 of 2 tensors differ: model.x (first difference at [0, 1])" in found.sentence
    assert (found.evidence[0].value, found.evidence[0].threshold, found.evidence[0].better) == (
        1,
        2,
        "higher",
    )


def test_w1_lists_only_some_of_many() -> None:
    bad = [replace(EQUAL_ROW, name=f"t{i}", verdict="FAIL", different=1) for i in range(9)]
    assert "and 5 more" in claims(replace(BASE, rows=bad))["W1"].sentence


def test_w1_of_a_recording_is_by_fingerprint() -> None:
    recorded = replace(BASE, rows=None, recorded=True)
    for prints, verdict in (
        (("a", "a"), "PASS"),
        (("a", "b"), "FAIL"),
        (("a", None), "INCONCLUSIVE"),
    ):
        assert claims(replace(recorded, fingerprints=prints))["W1"].verdict == verdict


def test_w2_fails_beyond_its_bound() -> None:
    bad = replace(PACKED_ROW, verdict="FAIL", note="RMS error 3 steps")
    found = claims(replace(BASE, rows=[bad], quantized=True, budget=1.0))["W2"]
    assert found.verdict == "FAIL"
    assert "RMS error 3 steps" in found.sentence


def test_w2_counts_tensors_upwards() -> None:
    found = claims(replace(BASE, rows=[PACKED_ROW], quantized=True, budget=1.0))["W2"]
    assert [(p.value, p.threshold, p.better) for p in found.evidence[:1]] == [(1, 1, "higher")]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_l1_names_the_compute_type(dtype: str) -> None:
    sentence = claims(replace(BASE, dtypes=(dtype, dtype)))["L1"].sentence
    assert f"noise of {dtype}" in sentence


def test_rounding_that_changed_nothing_is_lossless() -> None:
    exact = Row("c", (2,), "bf16", "f16", NARROWED, "PASS", 2, 0)
    assert not exact.lossy
    assert set(claims(replace(BASE, rows=[exact]))) == {"W1", "C0", "L1"}


@pytest.mark.parametrize(("kind", "verdict"), [(SIZE, "ERROR"), (FUNCTION, "FAIL"), (NOTE, "PASS")])
def test_c0(kind: str, verdict: str) -> None:
    other = Identity((Difference("sliding_window", 4096, None, kind),), 18, None)
    found = claims(replace(BASE, identity=other))["C0"]
    assert found.verdict == verdict
    assert "sliding_window is 4096 / null" in found.sentence


@pytest.mark.parametrize("changes", [
    {"kl_max": 2e-10}, {"rms_max": 2e-5}, {"block_error": 2e-6, "block_threshold": 1e-6},
])  # fmt: skip
def test_l1_fails_beyond_a_threshold(changes: dict[str, float]) -> None:
    e = measured(**changes, divergent="block 2 (local) at scores, from position 65 of P3/66 on")
    found = claims(e)["L1"]
    assert found.verdict == "FAIL"
    assert "10 x floor (float64 run, float32) allows" in found.sentence
    assert "block 2 (local) at scores" in found.sentence


def test_a_value_at_the_threshold_passes_and_one_above_fails() -> None:
    assert claims(measured(kl_max=1e-10))["L1"].verdict == "PASS"
    assert claims(measured(kl_max=1.0000001e-10))["L1"].verdict == "FAIL"


@pytest.mark.parametrize("rule", ["L1", "L2", "Q1", "X1"])
def test_nan_is_a_failure_whatever_else(rule: str) -> None:
    e = measured(
        non_finite="first in the candidate's output of block 1, position 3 of P0/4", kl_max=None
    )
    e = {
        "L1": e,
        "L2": replace(e, dtypes=("bfloat16",) * 2),
        "Q1": replace(e, quantized=True, budget=1.0),
        "X1": replace(e, recorded=True, rows=None, fingerprints=("a", "a")),
    }[rule]
    found = claims(e)[rule]
    assert found.verdict == "FAIL"
    assert "block 1, position 3 of P0/4" in found.sentence


def test_without_a_floor_nothing_passes() -> None:
    found = claims(replace(BASE, limits=Limits(None, None, "no finite position")))["L1"]
    assert found.verdict == "INCONCLUSIVE"
    assert found.missing == ("a noise floor (no finite position)",)
    assert claims(replace(BASE, limits=None))["L1"].verdict == "INCONCLUSIVE"


def test_what_the_probes_did_not_reach_is_open() -> None:
    found = claims(replace(BASE, uncovered=["window crossed: 0 where 1 is needed"]))["L1"]
    assert (found.verdict, found.missing) == (
        "INCONCLUSIVE",
        ("window crossed: 0 where 1 is needed",),
    )
    # but what was found counts
    assert claims(replace(measured(kl_max=1.0), uncovered=["x"]))["L1"].verdict == "FAIL"


def test_a_failed_check_fails_the_claim() -> None:
    found = claims(replace(BASE, failed_checks=["P8/decode: KL 3 at step 2"]))["L1"]
    assert found.verdict == "FAIL"
    assert "P8/decode" in found.sentence


def test_a_lower_bound_never_passes() -> None:
    e = replace(measured(lower_bound=True), rows=None, recorded=True, fingerprints=("a", "a"))
    assert claims(e)["X1"].verdict == "INCONCLUSIVE"
    e = replace(e, measured=replace(GOOD, lower_bound=True, kl_max=1.0))
    assert claims(e)["X1"].verdict == "FAIL"


def quantized(estimate: float, low: float | None, high: float | None) -> Claim:
    m = replace(GOOD, kl=interval(estimate, low, high))
    return claims(replace(BASE, measured=m, quantized=True, budget=0.1, budget_source="--budget"))[
        "Q1"
    ]


def test_q1_decides_by_its_interval() -> None:
    assert quantized(0.05, 0.04, 0.06).verdict == "PASS"
    assert quantized(0.2, 0.18, 0.22).verdict == "FAIL"
    found = quantized(0.09, 0.07, 0.12)
    assert found.verdict == "INCONCLUSIVE"
    assert found.missing == ("about 512 more sequences",)
    assert quantized(0.05, None, None).verdict == "INCONCLUSIVE"
    assert "too few" in quantized(0.05, None, None).sentence


@pytest.mark.parametrize("clusters", ["documents", "sequences"])
def test_q1_says_what_its_interval_is_over(clusters: str) -> None:
    for low, high in ((0.04, 0.06), (0.07, 0.12)):
        m = replace(GOOD, kl=interval(0.05, low, high), clusters=clusters)
        found = claims(replace(BASE, measured=m, quantized=True, budget=0.1))["Q1"]
        assert f"nats over {m.kl.documents} {clusters}" in found.sentence
    assert found.missing[0].endswith(f"more {clusters}")


def test_more_documents_shrinks_the_interval_to_the_gap() -> None:
    # half width 0.03, gap 0.01: nine times the documents, eight times more
    assert more_documents(interval(0.09, 0.06, 0.12), 0.1) == 64 * 8
    assert more_documents(interval(0.0999, 0.0998, 0.1001), 0.1) == 1


def test_q2_judges_the_kernel_by_its_own_floor() -> None:
    e = replace(
        BASE, quantized=True, budget=1.0, kernel=replace(GOOD, kl_max=0.01), kernel_name="llama_cpp"
    )
    assert claims(replace(e, kernel_limits=Limits(0.02, 1.0, "f")))["Q2"].verdict == "PASS"
    assert claims(replace(e, kernel_limits=Limits(0.002, 1.0, "f")))["Q2"].verdict == "FAIL"
    assert claims(replace(e, kernel_limits=None))["Q2"].verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(("bits", "budget"), [(16.0, 0.001), (8.5, 0.003), (4.5, 0.08), (2.1, 1.0)])
def test_budgets_by_bits(bits: float, budget: float) -> None:
    assert budget_of(bits)[0] == budget
    assert list(BUDGETS) == sorted(BUDGETS, reverse=True)


@pytest.mark.parametrize("wanted", ["x", "nan", "inf", 0, -1.0, "1e400"])
def test_bad_budgets(wanted: Any) -> None:
    with pytest.raises(UsageError, match="expected a positive number"):
        budget_of(4.0, wanted)
    assert budget_of(4.0, "0.5") == (0.5, "--budget")


def test_the_worst_verdict_counts() -> None:
    def of(*verdicts: str) -> str:
        return overall([Claim("W1", "", v, "") for v in verdicts])

    assert of("PASS", "INCONCLUSIVE") == "INCONCLUSIVE"
    assert of("INCONCLUSIVE", "FAIL", "PASS") == "FAIL"
    assert of("FAIL", "ERROR") == "ERROR"
    assert of() == "INCONCLUSIVE"


def test_limits_are_labelled_with_their_own_factor() -> None:
    limits = replace(LIMITS, root_source="3.16 x floor")
    found = claims(
        replace(measured(rms_max=2e-5, block_error=0.0, block_threshold=1.0), limits=limits)
    )["L1"]
    assert "3.16 x floor allows 1e-05" in found.sentence
    sources = {p.metric: p.source for p in found.evidence}
    assert sources["KL, maximum"] == sources["KL, mean"] == LIMITS.source
    assert sources["a block's own relative error, maximum"] == "3.16 x floor"
    assert limits_of(sample_floor()).root_source.startswith("3.16 x floor (")
    assert limits_of(sample_floor()).source.startswith("10 x floor (")


def test_one_difference_is_no_plural() -> None:
    other = Identity((Difference("sliding_window", 4096, None, FUNCTION),), 18, None)
    found = claims(replace(BASE, identity=other))["C0"]
    assert found.sentence.startswith("1 difference (reference / candidate): ")
    assert str(ratio_interval([1.0], [1]).reason).startswith("1 sequence is too few")
