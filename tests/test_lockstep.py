"""Two runners side by side: what is reported is what happened, and the guards can fail."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from verify_cases import model, probe, random_probes, sample, sample_floor, sample_probes

from g2kit.convert.open import Checkpoint
from g2kit.formats.errors import ConfigError, FormatError, UsageError
from g2kit.model import canonical
from g2kit.verify.batches import padded, plan_batches, targets
from g2kit.verify.block_errors import EMBEDDING, Trace, position_errors
from g2kit.verify.lockstep import (
    LockstepResult,
    bisect_taps,
    divergent,
    first_divergent,
    gives_table,
    merge_results,
    run_lockstep,
    scan_taps,
    shortest_showing,
)
from g2kit.verify.runners import open_runner
from g2kit.verify.views import changed, edited

pytest.importorskip("torch")
pytest.importorskip("jax")


def lockstep(
    ref: Any, cand: Any, probes: Any, names: tuple[str, str] = ("torch", "torch"), **options: Any
) -> LockstepResult:
    config = options.pop("config", None)
    with open_runner(names[0], ref) as a, open_runner(names[1], cand, config=config) as b:
        return run_lockstep(a, b, probes, **options)


def spoiled(c: Checkpoint, template: str, layer: int, factor: float = 1.5) -> Checkpoint:
    """A tensor scaled; upside down where a norm behind it would undo that."""
    name = template.format(i=layer)
    hidden = template in (canonical.V, canonical.O, canonical.DOWN)
    return changed(
        c, {name: edited(c.tensors[name], lambda w: w[::-1].copy() if hidden else w * factor)}
    )


def kl_max(result: LockstepResult) -> float:
    return max(float(r.stats.kl.max()) for r in result.records)


# ---- the numbers ----------------------------------------------------------------------------------------------------


def test_errors_of_positions() -> None:
    ref = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], np.float32)
    cand = np.array([[3.0, 4.5], [0.0, 0.0], [math.nan, 1.0], [1.0, 0.0]], np.float32)
    found = position_errors(ref, cand)
    assert found[0] == pytest.approx(0.1)
    assert found[1] == 0
    assert math.isnan(found[2])
    assert found[3] == 0
    assert position_errors(np.zeros((1, 2)), np.ones((1, 2)))[0] > 1e100


@given(
    st.lists(st.floats(0, 10) | st.just(math.nan), min_size=1, max_size=40),
    st.integers(1, 40),
    st.floats(0, 11),
)
def test_a_trace_knows_the_first_position_above_any_threshold(
    values: list[float], window: int, limit: float
) -> None:
    errors = np.array(values)
    t = Trace.of("p", 0, "isolated", errors, window)
    above = [i for i, e in enumerate(values) if e > limit]
    assert t.first_above(limit) == (above[0] if above else None)
    assert t.near.count + t.far.count == int(np.isfinite(errors).sum())
    far = [e for e in values[window:] if not math.isnan(e)]
    assert t.far.largest == max(far, default=0.0)
    assert Trace.from_json(json.loads(json.dumps(t.to_json()))) == t


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120), st.integers(1, 4))
def test_batches_hold_every_probe_once_and_shards_part_them(
    lengths: list[int], limit: int, shards: int
) -> None:
    batches = plan_batches(lengths, limit)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit
    parts = [batches[i::shards] for i in range(shards)]
    assert sorted(b for p in parts for b in p) == sorted(batches)


def test_targets_are_the_next_tokens_of_scored_probes() -> None:
    np.testing.assert_array_equal(targets(probe("a", [2, 5, 7])), [5, 7, -1])
    np.testing.assert_array_equal(targets(probe("a", [2, 5, 7], scored=False)), [-1, -1, -1])
    tokens, real = padded([np.array([2, 5]), np.array([2])], 0)
    np.testing.assert_array_equal(tokens, [[2, 5], [2, 0]])
    np.testing.assert_array_equal(real, [[True, True], [True, False]])


def test_statistics_are_those_of_the_whole_logits() -> None:
    from g2kit.model.logits import compare_logits

    good = model()
    bad = spoiled(good, canonical.GATE, 1)
    probes = random_probes(good.config, [9, 5, 9])
    found = {r.document: r.stats for r in lockstep(good, bad, probes).records}
    with open_runner("torch", good) as a, open_runner("torch", bad) as b:
        for p in probes:
            want = compare_logits(a.logits(p.tokens)[0], b.logits(p.tokens)[0], targets=targets(p))
            got = found[p.id]
            np.testing.assert_allclose(got.kl, want.kl, rtol=1e-3)
            np.testing.assert_allclose(got.logp_cand[:-1], want.logp_cand[:-1], rtol=1e-5)
            assert np.isnan(got.logp_cand[-1])
            np.testing.assert_array_equal(got.top1_cand, want.top1_cand)
            assert want.kl.max() > 1e-3


def test_padded_batches_equal_single_runs() -> None:
    c = model()
    probes = random_probes(c.config, [5, 17, 6, 11])
    bad = spoiled(c, canonical.GATE, 2, 1.01)
    together = lockstep(c, bad, probes, batch_tokens=100)
    alone = lockstep(c, bad, probes, batch_tokens=1)
    assert [r.document for r in together.records] == [r.document for r in alone.records]
    for a, b in zip(together.records, alone.records, strict=True):
        np.testing.assert_allclose(a.stats.kl, b.stats.kl, rtol=1e-2, atol=1e-11)
        np.testing.assert_allclose(a.stats.lse_ref, b.stats.lse_ref, rtol=1e-5)
    for x, y in zip(together.errors, alone.errors, strict=True):
        assert (x.reached or 0) == pytest.approx(y.reached or 0, rel=1e-2, abs=2e-6)
        assert x.positions == y.positions == 39
    assert kl_max(alone) > 1e-7


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_shards_give_the_same_bytes(shards: int) -> None:
    c = model()
    probes = random_probes(c.config, [5, 17, 6, 11, 4, 9])
    bad = spoiled(c, canonical.GATE, 2)
    whole = lockstep(c, bad, probes, batch_tokens=20)
    parts = [lockstep(c, bad, probes, batch_tokens=20, shard=(i, shards)) for i in range(shards)]
    merged = merge_results(parts[::-1])
    assert json.dumps(merged.to_json()) == json.dumps(whole.to_json())
    assert merged.errors == whole.errors
    assert kl_max(whole) > 1e-4
    with pytest.raises(UsageError, match="twice"):
        merge_results([whole, whole])
    with pytest.raises(UsageError, match="parts to merge are none"):
        merge_results([])


def test_results_survive_json() -> None:
    c = model("gemma-2b")
    r = lockstep(c, spoiled(c, canonical.Q, 1), random_probes(c.config, [5, 7]))
    text = json.dumps(r.to_json(), allow_nan=False)
    assert json.dumps(LockstepResult.from_json(json.loads(text)).to_json()) == text
    for key, value in (
        ("version", 2),
        ("head", "x"),
        ("traces", [[1]]),
        ("kinds", 3),
        ("records", None),
    ):
        with pytest.raises(FormatError):
            LockstepResult.from_json({**json.loads(text), key: value})


# ---- the same, and not the same --------------------------------------------------------------------------------------


def test_the_same_checkpoint_is_equal_to_the_bit() -> None:
    r = lockstep(sample(), sample(), sample_probes())
    assert kl_max(r) == 0
    assert [e.reached for e in r.errors] == [0.0] * 6
    assert [e.own for e in r.blocks] == [0.0] * 4
    assert first_divergent(r, sample_floor()) is None


@pytest.mark.parametrize("name", ["jax", "transformers"])
def test_other_runners_agree_within_the_floor(name: str) -> None:
    floor = sample_floor()
    r = lockstep(sample(), sample(), sample_probes(), ("torch", name))
    assert 0 < kl_max(r) < (floor.threshold("kl_max") or 0)
    assert divergent(r, floor) == []
    assert r.head == ("hidden" if name == "jax" else "tiles")
    assert all((e.own is None) == (name == "transformers") for e in r.blocks)
    if name == "jax":
        with open_runner("torch", sample()) as a, open_runner("jax", sample()) as b:
            assert scan_taps(a, b, sample_probes()[0].tokens, floor) == []


def test_the_agreement_of_other_runners_can_fail() -> None:
    floor = sample_floor()
    wrong = sample().config.with_(sliding_window=65)
    r = lockstep(sample(), sample(), sample_probes(), ("torch", "jax"), config=wrong)
    found = divergent(r, floor)
    assert kl_max(r) > (floor.threshold("kl_max") or 0)
    assert {d.layer for d in found} == {0, 2}
    assert {d.position for d in found} == {64}


def test_logits_of_the_runners_and_of_hidden_states_are_the_same() -> None:
    c = model()
    bad = spoiled(c, canonical.GATE, 1)
    probes = random_probes(c.config, [5, 9, 7])
    one = lockstep(c, bad, probes)
    # two positions at a time, to see that they are put together again
    two = lockstep(c, bad, probes, tiles=True, scratch=3 * 64 * 16 * 2)
    assert (one.head, two.head) == ("hidden", "tiles")
    for a, b in zip(one.records, two.records, strict=True):
        np.testing.assert_allclose(a.stats.kl, b.stats.kl, rtol=1e-3, atol=1e-10)
        np.testing.assert_array_equal(a.stats.target, b.stats.target)
        np.testing.assert_allclose(a.stats.logp_ref, b.stats.logp_ref, rtol=1e-5)


def test_a_wider_copy_of_a_table_is_the_same_table() -> None:
    """The head's rounding would else be taken for a difference of the models."""
    wide = changed(
        sample(),
        {n: _as_float32(t) for n, t in sample().tensors.items()},
    )
    assert wide.tensors[canonical.EMBED].dtype == np.float32
    assert kl_max(lockstep(sample(), wide, sample_probes()[:2])) == 0


def _as_float32(tensor: Any) -> Any:
    other = edited(tensor, lambda w: w.astype(np.float32))
    other.dtype = np.dtype(np.float32)
    return other


def test_gives_table() -> None:
    for name, has in (("torch", True), ("jax", True), ("transformers", False)):
        with open_runner(name, sample()) as r:
            assert gives_table(r) is has


# ---- where they part -------------------------------------------------------------------------------------------------


TAPS_OF = {
    canonical.INPUT_NORM: "attn_in", canonical.Q: "scores", canonical.V: "o_in", canonical.O: "attn_out",
    canonical.POST_ATTENTION_NORM: "after_attn", canonical.PRE_FFW_NORM: "mlp_in", canonical.UP: "down_in",
    canonical.DOWN: "mlp_out", canonical.POST_FFW_NORM: "out",
}  # fmt: skip


@pytest.mark.parametrize(("template", "names"), [
    *((t, ("torch", "torch")) for t in TAPS_OF), (canonical.Q, ("jax", "torch")),
])  # fmt: skip
def test_a_wrong_weight_is_found_at_its_layer_and_tap(
    template: str, names: tuple[str, str]
) -> None:
    floor, probes = sample_floor(), sample_probes()[1:4]
    bad = spoiled(sample(), template, 1)
    r = lockstep(sample(), bad, probes, names)
    found = divergent(r, floor)
    assert [d.layer for d in found] == [1]
    tokens = shortest_showing(r, probes, found[0])
    assert tokens is not None
    with open_runner(names[0], sample()) as a, open_runner(names[1], bad) as b:
        assert bisect_taps(a, b, tokens, 1, floor) == TAPS_OF[template]
        assert bisect_taps(a, b, probes[0], 0, floor) is None
        assert bisect_taps(a, b, probes[0], 2, floor) is None


def test_accumulated_errors_only_still_find_the_first_layer() -> None:
    r = lockstep(sample(), spoiled(sample(), canonical.V, 2), sample_probes()[:3], isolated=False)
    at = first_divergent(r, sample_floor())
    assert at is not None
    assert (at.layer, at.isolated) == (2, False)
    assert all(e.own is None for e in r.blocks)


def test_embedding_and_final_norm_are_layers_of_their_own() -> None:
    floor = sample_floor()
    for name, layer in ((canonical.EMBED, EMBEDDING), (canonical.FINAL_NORM, 4)):
        bad = changed(sample(), {name: edited(sample().tensors[name], lambda w: w * 2)})
        found = divergent(lockstep(sample(), bad, sample_probes()[:2]), floor)
        assert found[0].layer == layer


def test_nan_is_named_with_its_first_layer_and_position() -> None:
    c = model()

    def poison(w: np.ndarray) -> np.ndarray:
        w[9] = np.nan
        return w

    bad = changed(c, {canonical.EMBED: edited(c.tensors[canonical.EMBED], poison)})
    probes = [probe("P0/a", [2, 3, 4]), probe("P0/b", [2, 5, 9, 4])]
    r = lockstep(c, bad, probes)
    first = r.non_finite[0]
    assert (first.layer, first.probe, first.position, first.side) == (
        EMBEDDING,
        "P0/b",
        2,
        "candidate",
    )
    stats = {x.document: x.stats for x in r.records}
    # row 9 of the table is NaN, so are its logits everywhere
    assert not stats["P0/a"].finite.any()
    norm = canonical.INPUT_NORM.format(i=2)
    bad = changed(c, {norm: edited(c.tensors[norm], lambda w: w * np.nan)})
    r = lockstep(c, bad, probes)
    assert [(n.layer, n.position) for n in r.non_finite] == [(2, 0)] * 2
    at = first_divergent(r, sample_floor())
    assert at is not None
    assert at.error is None


def test_gemma_1_has_no_far_positions() -> None:
    c = model("gemma-7b")
    r = lockstep(c, spoiled(c, canonical.Q, 1), random_probes(c.config, [9]))
    assert all(e.accumulated_far is None and e.kind != "local" for e in r.errors)


# ---- bad input ---------------------------------------------------------------------------------------------------------


def test_what_cannot_run_side_by_side_says_so() -> None:
    c = model()
    with open_runner("torch", c) as a:
        with pytest.raises(UsageError, match="one runner; open it twice"):
            run_lockstep(a, a, random_probes(c.config, [3]))
        for other, name in ((model(layers=3), "num_hidden_layers is 4 in the reference and 3"),
                            (model(vocab=63), "vocab_size is 64 in the reference and 63"),
                            (model(d=28), "hidden_size is 24 in the reference and 28")):  # fmt: skip
            with open_runner("torch", other) as b, pytest.raises(ConfigError, match=name):
                run_lockstep(a, b, random_probes(c.config, [3]))
        p = probe("x", [2, 3])
        with open_runner("torch", c) as b, pytest.raises(UsageError, match="same id"):
            run_lockstep(a, b, [p, p])
        with open_runner("transformers", sample()) as b, pytest.raises(UsageError, match="taps"):
            bisect_taps(a, b, p, 0, sample_floor())
    with pytest.raises(UsageError, match="batch_tokens is 0"):
        plan_batches([1], 0)


@pytest.mark.llama
def test_llama_cpp_agrees_within_a_floor_that_knows_its_table(tmp_path: Any) -> None:
    from g2kit.convert import convert, open_checkpoint
    from g2kit.verify.floor import measure_floor

    pytest.importorskip("llama_cpp")
    convert(sample().path, tmp_path / "gguf", to="gguf", dtype="f32")
    with open_checkpoint(tmp_path / "gguf") as gguf:
        floor = measure_floor(sample(), sample_probes(), emulate="llama_cpp", tiles=True)
        r = lockstep(sample(), gguf, sample_probes(), ("torch", "llama_cpp"))
    assert r.errors == []
    assert (sample_floor().threshold("kl_max") or 0) < kl_max(r) < (floor.threshold("kl_max") or 0)
