"""Known mistakes: each is what it says, is noticed, and is found where it was made; and the test of that can fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from verify_cases import model, random_probes, sample, sample_floor, sample_probes

from g2kit.formats.dtypes import BF16, F32
from g2kit.formats.errors import UsageError
from g2kit.model import canonical
from g2kit.verify.branch import Branch, Change, Remembered
from g2kit.verify.claims import judge
from g2kit.verify.floor import Floor
from g2kit.verify.mutants import ExchangedLayers, Mutant, _flip_exponent, mutants
from g2kit.verify.runners import open_runner
from g2kit.verify.self_test import Trial, _try, crossing_probes, self_test, trials
from g2kit.verify.views import changed, renamed, shifted_rows

pytest.importorskip("torch")

# verification's fifteen, then the others
FIFTEEN = {
    "window-off", "window-by-one", "layers-flipped", "attention-cap", "final-cap", "query-scale", "rope-base",
    "norms-plus-one", "norms-swapped", "gate-up", "gelu-erf", "norm-epsilon", "one-weight", "one-bit", "value-row",
}  # fmt: skip
OTHERS = {
    "layer-global", "norm-plus-one", "final-norm", "norms-swapped-2", "query-key", "layers-swapped", "embedding-shifted",
}  # fmt: skip


@cache
def found() -> dict[str, Trial]:
    return {t.mutant.id: t for t in trials(sample(), sample_probes(), sample_floor())}


def differing(c: Any, m: Mutant) -> set[str]:
    """Names of tensors whose values differ."""
    return {
        n
        for n, t in m.checkpoint.tensors.items()
        if not np.array_equal(t.read(), c.tensors[n].read())
    }


# ---- every mistake is noticed ----------------------------------------------------------------------------------------


def test_all_known_mistakes_are_tried() -> None:
    assert set(found()) == FIFTEEN | OTHERS


@pytest.mark.parametrize("name", sorted(FIFTEEN | OTHERS))
def test_every_mistake_fails_and_is_found_where_it_was_made(name: str) -> None:
    t = found()[name]
    assert "L1" in t.caught_by
    kinds = {"config": {"C0"}, "weight": {"W1"}, "code": set()}[t.mutant.kind]
    assert kinds <= set(t.caught_by)
    assert t.right_place(sample_floor()), (t.found, t.inside)
    assert t.hypothesis


WORDS = {
    "window-off": "sliding_window: 64 and none", "layers-flipped": "local and global layers are exchanged",
    "layer-global": "layer 2 is run with another sliding window", "attention-cap": "attn_logit_softcapping",
    "final-cap": "final_logit_softcapping", "query-scale": "query_pre_attn_scalar", "rope-base": "rope_theta",
    "norm-epsilon": "rms_norm_eps", "gelu-erf": "GELU", "norms-plus-one": "1 is added",
    "norm-plus-one": "layer 2: input_layernorm", "gate-up": "gate_proj or up_proj", "query-key": "q_proj or k_proj",
    "layers-swapped": "layers 1 and 2 are exchanged", "value-row": "layer 2: v_proj", "one-weight": "layer 2: down_proj",
    "one-bit": "layer 2: o_proj", "embedding-shifted": "rows of the embedding", "final-norm": "final norm",
    "norms-swapped": "layer 2: post_attention_layernorm",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WORDS))
def test_the_hypothesis_names_it(name: str) -> None:
    assert WORDS[name] in found()[name].hypothesis


def test_the_report_of_the_self_test() -> None:
    import json

    data = self_test(sample(), sample_probes(), sample_floor(), only=["value-row", "final-cap"])
    json.dumps(data, allow_nan=False)
    assert (data["caught"], data["of"]) == (2, 2)
    cap, row = data["mutants"]
    assert (cap["id"], cap["expected_layers"], cap["found_layer"]) == ("final-cap", [5], 5)
    assert (row["id"], row["expected_layers"], row["found_layer"], row["tap"]) == (
        "value-row",
        [2],
        2,
        "o_in",
    )
    assert row["claims"]["W1"] == "FAIL"
    assert row["kl_max"] > row["kl_mean"] > 0


# ---- and the test of that can fail -----------------------------------------------------------------------------------


def trial(m: Mutant, floor: Floor, judge: Any = judge) -> Trial:
    with open_runner("torch", sample()) as base:
        probes = list(sample_probes()[1:4])
        return _try(m, sample(), Remembered(base), probes, floor, judge, None, lambda n, s: None)


def test_no_mistake_is_not_caught() -> None:
    none = Mutant("none", "nothing", changed(sample()), (2,), 2, "weight")
    t = trial(none, sample_floor())
    assert t.caught_by == []
    assert t.found_layer(sample_floor()) is None
    assert not t.right_place(sample_floor())
    assert t.hypothesis == ""


def test_a_mistake_elsewhere_is_the_wrong_place() -> None:
    real = next(m for m in mutants(sample()) if m.id == "value-row")
    t = trial(replace(real, layers=(1,), place=1), sample_floor())
    assert "L1" in t.caught_by
    assert not t.right_place(sample_floor())


def test_a_loose_floor_catches_nothing_by_the_function() -> None:
    loose = replace(sample_floor(), k=1e30)
    t = trial(next(m for m in mutants(sample()) if m.id == "value-row"), loose)
    assert t.caught_by == ["W1"]
    assert not t.right_place(loose)


def test_a_blind_judge_catches_nothing() -> None:
    def blind(evidence: Any) -> Sequence[Any]:
        return [replace(c, verdict="PASS") for c in judge(evidence)]

    assert trial(next(iter(mutants(sample()))), sample_floor(), blind).caught_by == []


def test_a_short_prompt_misses_the_window() -> None:
    """What a check of a few tokens cannot see: the function is the same there."""
    short = sample_probes()[1:3]
    assert max(len(p.tokens) for p in short) <= 64
    rows = self_test(sample(), short, sample_floor(), only=["window-off", "layers-flipped"])[
        "mutants"
    ]
    assert [r["caught_by"] for r in rows] == [["C0"], []]
    assert not any(r["right_place"] for r in rows)


def test_wrong_names_and_floors() -> None:
    with pytest.raises(UsageError, match=r"no mutant is called 'nonsense'.*window-off"):
        self_test(sample(), sample_probes(), sample_floor(), only=["nonsense"])
    with pytest.raises(UsageError, match="needs a float32 floor, this is one of bfloat16"):
        self_test(sample(), sample_probes(), replace(sample_floor(), dtype="bfloat16"))


# ---- every mistake is what it says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-27b"])
def test_only_the_named_layers_are_changed(arch: str) -> None:
    c = model(arch)
    tried = list(mutants(c))
    assert len({m.id for m in tried}) == len(tried)
    for m in tried:
        names = differing(c, m)
        if m.kind == "weight":
            layers = {int(n.split(".")[2]) for n in names if ".layers." in n}
            assert layers == set(m.layers), m.id
            assert names, m.id
        else:
            assert not names, m.id
            assert m.kind == "code" or m.checkpoint.config != c.config, m.id
        assert all(t.dtype == c.tensors[n].dtype for n, t in m.checkpoint.tensors.items())
    ids = {m.id for m in tried}
    assert ("window-off" in ids) == arch.startswith("gemma2")


def test_gemma_1_mistakes_are_found_too() -> None:
    from g2kit.verify.floor import measure_floor

    c = model("gemma-7b", layers=3)
    probes = random_probes(c.config, [20, 30, 9, 12])
    floor = measure_floor(c, probes)
    for t in trials(c, probes, floor):
        assert t.caught_by, t.mutant.id
        if t.mutant.id not in ("gelu-erf", "norm-epsilon"):
            assert t.right_place(floor), (t.mutant.id, t.found)


def test_layers_exchanged() -> None:
    c = sample().config
    values = {n: getattr(c, n) for n in type(c).__dataclass_fields__}
    flipped, one = ExchangedLayers(**values), ExchangedLayers(**values, exchanged=(2,))
    assert [flipped.is_local(i) for i in range(4)] == [not c.is_local(i) for i in range(4)]
    assert [one.is_local(i) for i in range(4)] == [True, False, False, False]
    assert flipped.layer_types != c.layer_types


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_flipped_bit_is_one_bit(dtype: np.dtype) -> None:
    w = np.array([[0.5, 3e-6], [-1e-5, 0.25]], dtype)
    before = w.copy()
    _flip_exponent(w)
    assert (w != before).sum() == 1
    assert float(w[1, 0]) == pytest.approx(float(before[1, 0]) * 2**16)


def test_views() -> None:
    c = model()
    table = c.tensors[canonical.EMBED]
    moved = shifted_rows(table)
    want = np.roll(table.read(), 1, axis=0)
    np.testing.assert_array_equal(moved.read(), want)
    for a, b in ((0, 64), (0, 1), (0, 5), (5, 9), (63, 64)):
        np.testing.assert_array_equal(moved.read_rows(a, b), want[a:b])
    np.testing.assert_array_equal(np.concatenate([r for _, _, r in moved.blocks(500)]), want)
    q, k = (c.tensors[t.format(i=0)] for t in (canonical.Q, canonical.GATE))
    other = renamed(q, c.tensors[canonical.Q.format(i=1)])
    assert other.name == q.name
    np.testing.assert_array_equal(
        other.read_rows(2, 4), c.tensors[canonical.Q.format(i=1)].read()[2:4]
    )
    assert k.name in changed(c, {q.name: other}).tensors
    # nothing was changed in the checkpoint itself
    assert not np.array_equal(q.read(), other.read())


def test_what_is_remembered_is_what_ran() -> None:
    c = model()
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    with open_runner("torch", c) as base:
        want = [*base.hidden_states(ids), base.final_hidden()]
        kept = Remembered(base)
        for _ in range(2):
            got = [kept.start(ids), *(kept.advance() for _ in range(4)), kept.final_hidden()]
            for a, b in zip(want, got, strict=True):
                np.testing.assert_array_equal(a, b)
        kept.start(ids)
        with pytest.raises(UsageError, match="does not give taps"):
            kept.advance(lambda n, v: None)
        with pytest.raises(UsageError, match="does not give logits"):
            kept.logit_tiles()


def test_crossing_probes() -> None:
    c = sample().config
    assert len(crossing_probes(sample_probes(), c)[0].tokens) == 70
    assert crossing_probes(sample_probes()[1:4], c) == []
    assert crossing_probes(sample_probes(), c.with_(sliding_window=None)) == []


# ---- the reference's side is shared ----------------------------------------------------------------------------------

CHANGES = {
    "window-off": (False, {0, 2}, False, False, 64), "window-by-one": (False, {0, 2}, False, False, 64),
    "layers-flipped": (False, {0, 1, 2, 3}, False, False, 64), "layer-global": (False, {2}, False, False, 64),
    "attention-cap": (False, {0, 1, 2, 3}, True, False, 0), "final-cap": (False, set(), False, True, 0),
    "norm-epsilon": (False, {0, 1, 2, 3}, True, False, 0), "gelu-erf": (False, {0, 1, 2, 3}, False, False, 0),
    "final-norm": (False, set(), True, False, 0), "layers-swapped": (False, {1, 2}, False, False, 0),
    "one-weight": (False, {2}, False, False, 0), "norms-plus-one": (False, {0, 1, 2, 3}, True, False, 0),
    "embedding-shifted": (True, set(), False, True, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_a_mistake_changes(name: str) -> None:
    m = next(m for m in mutants(sample()) if m.id == name)
    c = Change.between(sample(), m.checkpoint, code=m.activation is not None)
    assert (c.embedding, set(c.blocks), c.final, c.head, c.start) == CHANGES[name]


@pytest.mark.parametrize(
    "name", ["window-by-one", "layers-flipped", "query-scale", "one-weight", "embedding-shifted"]
)
def test_a_branch_computes_what_the_whole_model_does(name: str) -> None:
    """Against running every block of the changed model; equal to the bit where nothing can differ."""
    m = next(m for m in mutants(sample()) if m.id == name)
    ids = np.stack([p.tokens[:69] for p in sample_probes() if len(p.tokens) >= 69])
    change = Change.between(sample(), m.checkpoint)
    with open_runner("torch", m.checkpoint) as whole:
        want = [*whole.hidden_states(ids), whole.final_hidden()]
    with open_runner("torch", sample()) as base, open_runner("torch", m.checkpoint) as own:
        ref = Remembered(base)
        cand = Branch(ref, own, change)
        inputs = ref.hidden_states(ids)
        got = [cand.start(ids)]
        for layer in range(4):
            got.append(cand.advance())
            alone = cand.replay(inputs[layer])
            assert np.array_equal(alone, inputs[layer + 1]) == (layer not in change.blocks)
        got.append(cand.final_hidden())
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-4)
    for kept, mine in zip(inputs, got[:-1], strict=True):
        assert np.array_equal(kept[:, : change.start], mine[:, : change.start])
    first = change.first
    assert first is not None or change.embedding
    assert cand.ran < 2 * 4 or len(change.blocks) == 4 or change.embedding


def test_a_mistake_that_few_tokens_do_not_show_gets_more() -> None:
    """Six tokens of a model whose changed row nothing reads at first."""
    tried = list(trials(sample(), sample_probes(), sample_floor(), only=["gelu-erf", "one-bit"],
                        budgets=(8, 200)))  # fmt: skip
    assert all("L1" in t.caught_by for t in tried)
    assert min(t.positions for t in tried) < 60


def test_states_of_a_prefix_are_found() -> None:
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    with open_runner("torch", model()) as base:
        ref = Remembered(base)
        whole = ref.hidden_states(ids)
        part = ref.prefix(ids[1, :5])
        assert np.array_equal(part[3], whole[3][1:, :5])
        other = ref.prefix(ids[1, 1:5])
        assert other[0].shape == (1, 4, whole[0].shape[2])
