"""The rule table: every rule can be reached, nothing is said about equal models, and what is said follows the pattern."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from verify_cases import sample, sample_floor

from g2kit.model.logits_stats import Record, Stats
from g2kit.verify.block_errors import EMBEDDING, Trace
from g2kit.verify.hypotheses import _FIELDS, RULES, Pattern, hypotheses, pattern_of
from g2kit.verify.identity import FUNCTION, KINDS
from g2kit.verify.ledger import EQUAL, Row
from g2kit.verify.lockstep import Inside, LockstepResult, NonFinite
from g2kit.verify.runners import TAPS

KINDS_OF = {EMBEDDING: "embedding", 0: "local", 1: "global", 2: "local", 3: "global", 4: "final"}
WINDOW = 64


def result(
    wrong: dict[int, tuple[float, int]], *, isolated: bool = True, kl: float = 0.0, **more: Any
) -> LockstepResult:
    """Layers in ``wrong`` have that error from that position on; what follows a layer accumulates it."""
    traces = []
    reached = np.zeros(100)
    for layer, kind in KINDS_OF.items():
        errors = np.zeros(100)
        if layer in wrong:
            size, start = wrong[layer]
            errors[start:] = size
        reached = np.maximum(reached, errors)
        if isolated and kind in ("local", "global"):
            traces.append(Trace.of("p", layer, "isolated", errors, WINDOW))
        traces.append(Trace.of("p", layer, "accumulated", reached, WINDOW))
    return LockstepResult([_record(kl)], traces, KINDS_OF, WINDOW, "hidden", **more)


def _record(kl: float) -> Record:
    columns: dict[str, Any] = {n: np.zeros(100) for n in Stats.empty().to_json()}
    columns |= {n: np.ones(100, bool) for n in ("finite_ref", "finite_cand")}
    columns["kl"] = np.full(100, kl)
    return Record("p", "c", Stats(**columns))


def first(r: LockstepResult, **more: Any) -> str:
    found = hypotheses(r, sample_floor(), **more)
    assert found[0].because
    return found[0].text


def test_nothing_is_said_about_equal_models() -> None:
    assert hypotheses(result({}), sample_floor()) == []
    assert hypotheses(result({1: (1e-9, 0)}), sample_floor()) == []
    assert pattern_of(result({}), sample_floor()) is None


@pytest.mark.parametrize(("wrong", "inside", "text"), [
    ({0: (0.1, 64), 2: (0.1, 70)}, None, "the sliding window differs or is ignored in local layers"),
    ({0: (0.1, 63), 2: (0.1, 63)}, None, "the candidate's sliding window is one smaller"),
    ({1: (0.1, 64), 3: (0.1, 64)}, None, "global layers are run with a sliding window"),
    (dict.fromkeys(range(4), (0.1, 64)), None, "local and global layers are exchanged"),
    ({2: (0.1, 64)}, None, "layer 2 is run with another sliding window"),
    ({2: (0.1, 0)}, None, "a weight of layer 2 is wrong"),
    ({1: (0.1, 0), 2: (0.1, 0)}, None, "layers 1 and 2 are exchanged"),
    ({0: (0.1, 0), 2: (0.1, 0)}, None, "a step in local layers only differs"),
    ({1: (0.1, 0), 3: (0.1, 0)}, None, "a step in global layers only differs"),
    (dict.fromkeys(range(4), (0.1, 0)), None, "a hyper-parameter or an arithmetic step"),
    (dict.fromkeys(range(4), (0.1, 1)), ("scores", 0.1, True), "queries are scaled by another factor"),
    (dict.fromkeys(range(4), (0.1, 1)), ("scores", 0.1, False), "RoPE differs"),
    (dict.fromkeys(range(4), (0.1, 1)), ("o_in", 0.1, None), "the soft-cap of attention scores"),
    (dict.fromkeys(range(4), (0.1, 0)), ("attn_in", 0.1, None), "1 is added once too often"),
    (dict.fromkeys(range(4), (1e-4, 0)), ("attn_in", 1e-6, None), "the norms' epsilon differs"),
    ({3: (0.1, 0)}, ("mlp_in", 0.1, None), "layer 3: the gain of the norm before the feed-forward"),
    ({EMBEDDING: (1.4, 0)}, None, "rows of the embedding"),
    ({EMBEDDING: (1e-4, 0)}, None, "a little off"),
    ({4: (0.1, 0)}, None, "the final norm"),
])  # fmt: skip
def test_patterns(wrong: dict[int, tuple[float, int]], inside: Any, text: str) -> None:
    at = None
    if inside is not None:
        tap, size, diagonal = inside
        at = Inside(min(wrong), tap, 0, size, diagonal)
    assert text in first(result(wrong), inside=at)


def test_logits_alone_point_at_the_head() -> None:
    assert "final soft-cap or the output head" in first(result({}, kl=1e-3))


def test_accumulated_errors_say_from_where() -> None:
    assert "from layer 2 on" in first(result({2: (0.1, 0)}, isolated=False))


def test_rounded_weights_are_expected_to_differ() -> None:
    r = result(dict.fromkeys(range(4), (0.1, 0)))
    assert "rounded or quantized" in first(r, lossy=True)
    # but a window is no rounding
    r = result({0: (0.1, 64), 2: (0.1, 64)})
    assert "sliding window" in first(r, lossy=True)


def test_intermediates_alone_are_enough() -> None:
    scan = [Inside(i, "attn_in", 0, 2e-6, None) for i in range(4)]
    assert "epsilon" in first(result({}), scan=scan)


def test_a_nan_is_a_divergence() -> None:
    r = result({}, non_finite=[NonFinite(1, "p", 7, "candidate")])
    assert "layer 1 is damaged" in first(r)
    r = result({}, non_finite=[NonFinite(EMBEDDING, "p", 7, "candidate")])
    assert "the embedding is damaged" in first(r)


def test_a_nan_is_put_down_to_the_tensors_that_differ() -> None:
    r = result({2: (0.1, 0)}, non_finite=[NonFinite(1, "p", 7, "candidate")])
    good = Row("good", (2,), "bf16", "bf16", EQUAL, "PASS", 2, 0)
    other = replace(good, name="other", verdict="FAIL", different=1, note="first difference at [1]")
    bad = replace(other, name="bad", nonfinite=1, note="1 element is NaN or infinite")
    texts = [h.text for h in hypotheses(r, sample_floor(), rows=[good, other, bad])]
    assert texts == [
        "bad is damaged: 1 element is NaN or infinite",
        "other is damaged: first difference at [1]",
    ]


def test_a_damaged_tensor_among_rounded_ones_is_named() -> None:
    r = result(dict.fromkeys(range(4), (0.1, 0)))
    rounded = Row("good", (2,), "bf16", "int4", "quantized", "PASS", 0, 2)
    bad = replace(rounded, name="bad", verdict="FAIL", note="not the weight that was written")
    found = hypotheses(r, sample_floor(), rows=[rounded, bad], lossy=True)
    assert [h.text for h in found] == ["bad is damaged: not the weight that was written"]


def test_differences_of_configurations_come_first_where_they_fit() -> None:
    window = {"field": "sliding_window", "reference": 64, "candidate": 32}
    theta = {"field": "rope_theta", "reference": 1e4, "candidate": 1e6}
    r = result({0: (0.1, 32), 2: (0.1, 32)})
    texts = [h.text for h in hypotheses(r, sample_floor(), differences=[theta, window])]
    assert texts[0] == "the configurations differ in sliding_window: 64 and 32"
    assert len(texts) == 1, "the rule would only say so again"
    cap = {"field": "final_logit_softcapping", "reference": 30.0, "candidate": None}
    texts = [
        h.text for h in hypotheses(result({}, kl=1e-3), sample_floor(), differences=[theta, cap])
    ]
    assert texts == ["the configurations differ in final_logit_softcapping: 30 and none"]
    # a weight is no matter of configuration
    texts = [h.text for h in hypotheses(result({2: (0.1, 0)}), sample_floor(), differences=[cap])]
    assert texts == ["a weight of layer 2 is wrong"]


def test_every_rule_can_be_reached_and_says_something() -> None:
    base = Pattern("one", "all", None, "large", None, 1, 2, 0, WINDOW, False)
    layers = (
        "embedding",
        "one",
        "two",
        "local",
        "global",
        "all",
        "some",
        "final",
        "head",
        "from",
        "nan",
    )
    reached = set()
    for name, where, tap, size, diagonal, lossy, at in itertools.product(
        layers,
        ("all", "far"),
        (None, *TAPS),
        ("small", "large"),
        (None, True, False),
        (True, False),
        (63, 64),
    ):
        p = replace(
            base, layers=name, positions=where, tap=tap, size=size, lossy=lossy, position=at
        )
        p = replace(p, diagonal=diagonal)
        rule = next((r for r in RULES if r.fits(p)), None)
        if rule is not None:
            reached.add(rule)
            assert "{" not in rule.text.format(first=1, second=2, place="x")
    assert reached == set(RULES)


def test_the_table_of_fields_has_every_field_of_the_function() -> None:
    assert set(_FIELDS) == {n for n, k in KINDS.items() if k == FUNCTION} | {"layer_types"}


def test_the_sample_has_the_window_of_these_tests() -> None:
    assert sample().config.sliding_window == WINDOW
