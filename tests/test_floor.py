"""Noise floors: the estimators measure what they say, and a wrong function would not pass for noise."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
from verify_cases import model, random_probes, sample, sample_floor, sample_probes

from g2kit.formats.dtypes import BF16
from g2kit.formats.errors import FormatError, UsageError
from g2kit.model import canonical
from g2kit.verify.floor import Floor, estimate, floor_probes, largest_of, measure_floor
from g2kit.verify.lockstep import run_lockstep
from g2kit.verify.noise import Estimate
from g2kit.verify.permutation import permuted
from g2kit.verify.runners import open_runner
from g2kit.verify.views import changed, edited

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from g2kit.verify.rounding import GeluLinear, StochasticLinear, erf_gelu, stochastic, table_gelu  # noqa: E402


def gap(a: Any, b: Any, dtype: str = "float64", **options: Any) -> float:
    ids = np.random.default_rng(0).integers(0, a.config.vocab_size, (2, 13))
    with (
        open_runner("torch", a, dtype=dtype) as x,
        open_runner("torch", b, dtype=dtype, **options) as y,
    ):
        return float(np.abs(x.logits(ids) - y.logits(ids)).max())


@pytest.mark.parametrize("arch", ["gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-9b"])
def test_permuted_weights_are_the_same_function(arch: str) -> None:
    c = model(arch)
    other = permuted(c)
    for t in (canonical.Q, canonical.O, canonical.V, canonical.GATE, canonical.DOWN):
        a, b = (np.stack([x.tensors[t.format(i=i)].read() for i in range(4)]) for x in (c, other))
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(np.sort(a.ravel()), np.sort(b.ravel()))
    assert 0 < gap(c, other) < 1e-12
    assert 0 < gap(c, other, "float32") < 1e-4
    # the guard: one of the permutations left out is another function
    names = [canonical.O.format(i=i) for i in range(4)]
    half = changed(other, {n: c.tensors[n] for n in names})
    assert gap(c, half) > 1e-3


def test_stochastic_rounding_is_right_on_average_and_within_one_step() -> None:
    x = torch.full((20000,), 1 + 2**-9, dtype=torch.float32)  # a quarter between two bfloat16
    y = stochastic(x, torch.bfloat16, torch.Generator().manual_seed(0)).float()
    assert set(y.tolist()) == {1.0, 1 + 2**-7}
    assert float(y.double().mean()) == pytest.approx(1 + 2**-9, abs=3e-4)
    z = torch.tensor([1 / 3, -7e20, 0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)
    r = stochastic(z, torch.float32, torch.Generator().manual_seed(1))
    assert r.dtype == torch.float32
    np.testing.assert_allclose(r[:3].double(), z[:3], rtol=2**-23)
    assert r[3:5].tolist() == [math.inf, -math.inf]
    assert math.isnan(r[5])
    with pytest.raises(TypeError):
        stochastic(x, torch.float32, torch.Generator())


def test_stochastic_products_repeat_for_a_seed() -> None:
    x, w = torch.randn(5, 8), torch.randn(6, 8)
    one, two, other = (StochasticLinear(s)("n", x, w) for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, x @ w.T)


def test_gelu_variants() -> None:
    x = torch.linspace(-12, 12, 2001)
    right = torch.nn.functional.gelu(x, approximate="tanh")
    assert 1e-5 < float((table_gelu(x) - right).abs().max()) < 12 * 2**-10
    assert torch.equal(table_gelu(x)[-10:], x[-10:])
    assert not table_gelu(x)[:10].any()
    assert 1e-5 < float((erf_gelu(x) - right).abs().max()) < 1e-3
    c = model()
    same = GeluLinear(lambda g: torch.nn.functional.gelu(g, approximate="tanh"))
    assert gap(c, c, "float32", linear=same) == 0
    assert gap(c, c, "float32", linear=GeluLinear(erf_gelu)) > 1e-4


def test_a_view_rounds_to_bfloat16_like_the_run() -> None:
    """The float64 run must have the weights of the bfloat16 run, or their rounding would count as noise."""
    from g2kit.verify.floor import _rounded

    c = model(seed=4)
    norm = canonical.FINAL_NORM
    fine = changed(c, {norm: edited(c.tensors[norm], lambda w: w * np.float32(1.001))})
    rounded = _rounded(fine)
    for n, t in rounded.tensors.items():
        want = fine.tensors[n].read().astype(BF16).astype(np.float32)
        np.testing.assert_array_equal(t.read(), want)
        np.testing.assert_array_equal(t.read_rows(1, 3), want[1:3])
    assert not np.array_equal(rounded.tensors[norm].read(), fine.tensors[norm].read())
    assert gap(fine, rounded, "bfloat16") == 0


def test_the_sample_has_a_floor_in_every_type() -> None:
    f32 = sample_floor()
    bf16 = measure_floor(sample(), sample_probes(), "bfloat16", budget=200)
    assert [e.name for e in f32.estimators] == [
        "float64 run",
        "permuted weights",
        "stochastic rounding",
    ]
    assert 1e-13 < f32.kl_max < 1e-8
    assert 1e-5 < bf16.kl_max < 1
    assert 1e4 * f32.kl_mean < bf16.kl_mean
    assert all(len(e.hidden) == len(e.isolated) == 6 for e in f32.estimators)
    for layer in range(4):
        own, reached = f32.hidden(layer, isolated=True), f32.hidden(layer)
        assert own is not None
        assert reached is not None
        assert 1e-8 < own < 1e-5 > reached
        assert 1e-8 < f32.tap("scores", layer) < 1e-5
    assert {n for n, _ in f32.skipped} == {"far", "second", "emulated"}
    f64 = measure_floor(sample(), sample_probes(), "float64", budget=100)
    assert [e.name for e in f64.estimators] == ["permuted weights"]
    assert f64.kl_max < 1e-20


def test_far_positions_are_measured_without_running_them() -> None:
    """RoPE's angles lose digits with position, so noise does grow; a long probe need not be run for that."""
    from g2kit.verify.probes import Probe

    long = Probe("P4/512", "P4", "long", "x", np.full(512, 5), None, False)
    f = measure_floor(sample(), [*sample_probes()[:3], long], names=("float64", "far"), budget=160)
    near, far = f.estimators
    assert far.name == "float64 run at positions to 512"
    assert far.hidden[1] > 1.5 * near.hidden[1]
    assert far.tokens == near.tokens <= 160


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_an_offset_changes_nothing_in_exact_arithmetic(name: str) -> None:
    c = model()
    ids = np.random.default_rng(0).integers(0, 64, (2, 13))
    with (
        open_runner(name, c, dtype="float64") as a,
        open_runner(name, c, dtype="float64", offset=999) as b,
    ):
        x, y = a.logits(ids), b.logits(ids)
    assert 0 < np.abs(x - y).max() < 1e-9


def test_thresholds() -> None:
    e = Estimate("a", "float32", 9, 1, 4e-12, 1e-12, 2e-6, (0.0, 1e-6, 3e-6), (0.0, 1e-6, 0.0),
                 {"scores": (5e-7,), **{t: (1e-9,) for t in _TAPS if t != "scores"}})  # fmt: skip
    g = Estimate("b", "float32", 9, 1, 1e-12, 2e-12, 1e-6)
    f = Floor("float32", (e, g))
    assert f.threshold("kl_max") == pytest.approx(4e-11)
    assert f.threshold("kl_mean") == pytest.approx(2e-11)
    assert f.threshold("rms_logit") == pytest.approx(math.sqrt(10) * 2e-6)
    assert f.threshold("hidden", 1) == pytest.approx(math.sqrt(10) * 3e-6)
    # nothing is expected nearer than one rounding
    assert f.threshold("hidden", -1) == pytest.approx(math.sqrt(10) * 2.0**-24)
    assert f.threshold("scores", 0) == pytest.approx(math.sqrt(10) * 5e-7)
    assert f.threshold("o_in", 0) == pytest.approx(math.sqrt(10) * 2.0**-24)
    assert f.threshold("hidden", 2) is None
    assert Floor("float32", (g,)).threshold("isolated", 0) is None
    assert Floor("float32", (e,), k=40).threshold("kl_max") == pytest.approx(1.6e-10)
    for metric, layer in (("kl", None), ("hidden", None), ("o", 1)):
        with pytest.raises(UsageError, match="no metric"):
            f.threshold(metric, layer)


_TAPS = (
    "attn_in",
    "scores",
    "o_in",
    "attn_out",
    "after_attn",
    "mlp_in",
    "down_in",
    "mlp_out",
    "out",
)


def test_floors_add_in_the_root_of_kl() -> None:
    a = Floor(
        "float32", (Estimate("a", "float32", 9, 1, 4e-12, 4e-12, 1e-6, (1e-6, 1e-6), (0.0, 0.0)),)
    )
    b = Floor(
        "bfloat16", (Estimate("b", "bfloat16", 8, 2, 9e-12, 1e-12, 3e-6, (2e-6, 5e-6), (0.0, 0.0)),)
    )
    both = a.plus(b)
    assert (both.dtype, both.k) == ("bfloat16", 10)
    assert both.kl_max == pytest.approx(25e-12)
    assert both.kl_mean == pytest.approx(9e-12)
    assert both.rms_logit == pytest.approx(4e-6)
    assert both.estimators[0].hidden[1] == pytest.approx(2.0**-9 + 6e-6, rel=1)


def test_floors_survive_json_and_bad_ones_are_refused() -> None:
    f = sample_floor()
    data = json.loads(json.dumps(f.to_json(), allow_nan=False))
    assert Floor.from_json(data) == f
    assert data["kl_max"] == f.kl_max
    bad: list[Any] = [
        None,
        {},
        {**data, "k": -1},
        {**data, "dtype": "int4"},
        {**data, "estimators": []},
    ]
    for key, value in (
        ("kl_max", -1.0),
        ("kl_mean", math.nan),
        ("hidden", 3),
        ("taps", {}),
        ("tokens", "x"),
    ):
        bad.append({**data, "estimators": [{**data["estimators"][0], key: value}]})
    for x in bad:
        with pytest.raises(FormatError, match="not a noise floor"):
            Floor.from_json(x)


@pytest.mark.parametrize("index", [0.2, 0.5])
def test_the_bound_on_the_largest_holds_for_heavy_tails(index: float) -> None:
    """At 95 % and with an estimated index, 15 of 20 is the least that a right bound gives; the largest seen never does."""
    rng = np.random.default_rng(0)
    held = seen = 0
    for _ in range(20):
        values = 1e-12 * rng.uniform(size=20_000) ** -index
        part = values[:500]
        held += largest_of(part, 20_000) >= values.max()
        seen += part.max() >= values.max()
        assert largest_of(part, 20_000) < 1e3 * values.max()
    assert held >= 15
    assert seen <= 5
    assert largest_of(np.array([1.0, 2.0]), 10**6) == 2
    assert largest_of(np.zeros(50), 10**6) == 0


def test_floor_probes_are_few_and_of_all_groups() -> None:
    c = model()
    probes = random_probes(c.config, [60, 30, 20, 50, 7, 9, 33, 21])
    chosen = floor_probes(probes, 120)
    assert sum(len(p.tokens) for p in chosen) <= 120
    assert len(chosen[0].tokens) == 30
    assert {p.id.partition("/")[0] for p in chosen} == {"P0", "P1", "P2"}
    assert len({p.id for p in chosen}) == len(chosen)
    by = {p.id: p for p in probes}
    for p in chosen:
        np.testing.assert_array_equal(p.tokens, by[p.id].tokens[: len(p.tokens)])
    with pytest.raises(UsageError, match="at least one probe"):
        floor_probes([])


def test_what_a_floor_cannot_be_measured_with() -> None:
    probes = sample_probes()[:1]
    with pytest.raises(UsageError, match="torch or jax runner, not with 'llama_cpp'"):
        measure_floor(sample(), probes, runner="llama_cpp")
    with pytest.raises(UsageError, match="no arithmetic of 'mlx' is known"):
        measure_floor(sample(), probes, emulate="mlx", names=("emulated",))
    with pytest.raises(UsageError, match="no estimator of the float32 floor could run"):
        measure_floor(sample(), probes, names=("second",))


def test_a_missing_package_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.endswith(".jax_runner")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jax", None)
    f = measure_floor(sample(), sample_probes()[1:3], second="jax", names=("permuted", "second"))
    assert [e.name for e in f.estimators] == ["permuted weights"]
    assert f.skipped[0][0] == "second"
    assert "pip install" in f.skipped[0][1]


def test_nothing_finite_is_no_floor() -> None:
    c = model()
    bad = changed(
        c, {canonical.FINAL_NORM: edited(c.tensors[canonical.FINAL_NORM], lambda w: w * np.nan)}
    )
    with open_runner("torch", bad) as a, open_runner("torch", bad) as b:
        result = run_lockstep(a, b, random_probes(c.config, [5]))
    with pytest.raises(UsageError, match="no finite position"):
        estimate("x", "float32", result)
