"""Logit statistics against a naive float64 implementation, aggregation, shards and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from g2kit.formats.errors import FormatError, ShapeError, UsageError
from g2kit.model.bootstrap import MIN_DOCUMENTS, quantile_interval, ratio_interval, student_t
from g2kit.model.logits import compare, compare_logits
from g2kit.model.logits_stats import Record, Stats, dumps, loads, merge
from g2kit.model.logits_summary import Summary, summarise

SHARED = ("kl", "reverse_kl", "tv", "max_diff", "rms_diff")  # compared relatively


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def capped(hidden: Tensor, table: Tensor, cap: float | None) -> Tensor:
    y = hidden.double() @ table.double().T
    return y if cap is None else cap * torch.tanh(y / cap)


def divergence(la: Tensor, x: Tensor) -> Tensor:
    """Sum of p (expm1(x) - x), as q - p - p x where x is large and p may be 0."""
    p, q = la.exp(), (la + x).exp()
    return torch.where(x.abs() < 1, p * (x.expm1() - x), q - p - p * x).sum(-1)


def naive(a: Tensor, b: Tensor, targets: Tensor | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Textbook formulas in float64 over whole rows; KL as a sum of expm1(x) - x, itself checked below."""
    a, b = a.double(), b.double()
    la, lb = a.log_softmax(-1), b.log_softmax(-1)
    x, d = lb - la, b - a
    order_a = a.sort(descending=True, stable=True)
    order_b = b.sort(descending=True, stable=True)
    out = {
        "kl": divergence(la, x),
        "reverse_kl": divergence(lb, -x),
        "tv": torch.where(x.abs() < 1, la.exp() * x.expm1(), lb.exp() - la.exp()).abs().sum(-1) / 2,
        "max_diff": d.abs().amax(-1),
        "mean_diff": d.mean(-1),
        "rms_diff": (d - d.mean(-1, keepdim=True)).square().mean(-1).sqrt(),
        "margin": order_a.values[:, 0] - order_a.values[:, 1],
        "top1_ref": order_a.indices[:, 0],
        "top1_cand": order_b.indices[:, 0],
        "lse_ref": a.logsumexp(-1),
        "lse_cand": b.logsumexp(-1),
    }
    for k in (5, 10):
        k_ = min(k, a.shape[1])
        pairs = zip(order_a.indices[:, :k_].tolist(), order_b.indices[:, :k_].tolist(), strict=True)
        out[f"overlap{k}"] = torch.tensor([len(set(p) & set(q)) for p, q in pairs]).double() / k_
    if targets is not None:
        out["logp_ref"] = la.gather(1, targets[:, None])[:, 0]
        out["logp_cand"] = lb.gather(1, targets[:, None])[:, 0]
    return {n: v.numpy() for n, v in out.items()}


def check(found: Stats, wanted: dict[str, Any], rel: float, abs_: float = 0.0) -> None:
    for name, value in wanted.items():
        have = getattr(found, name)
        if value.dtype.kind in "iu" or "overlap" in name:
            np.testing.assert_allclose(have, value, rtol=1e-12, err_msg=name)
        else:
            floor = abs_ if name in SHARED else max(abs_, 2e-5)
            np.testing.assert_allclose(have, value, rtol=rel, atol=floor, err_msg=name)


def test_naive_kl_is_the_textbook_one() -> None:
    a, b = random(4, 50).double(), random(4, 50, seed=1).double()
    la, lb = a.log_softmax(-1), b.log_softmax(-1)
    textbook = (la.exp() * (la - lb)).sum(-1)
    np.testing.assert_allclose(naive(a, b)["kl"], textbook, rtol=1e-12)


@pytest.mark.parametrize("cap", [None, 30.0, 3.0])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4, 1e-2, 0.3, 3.0])
def test_hidden_states_against_naive(noise: float, cap: float | None) -> None:
    """Positions, vocabulary and blocks that divide nothing; a shared table keeps float32's digits of tiny differences."""
    table, ref = random(1013, 48, scale=0.5), random(23, 48, seed=1)
    cand = ref + noise * random(23, 48, seed=2)
    targets = torch.arange(23) * 44
    wanted = naive(capped(ref, table, cap), capped(cand, table, cap), targets)
    tiny = {} if noise > 1e-6 else {"scratch": 2 * 4 * 1013 * 7}
    found = compare(ref, cand, table, cap=cap, targets=targets, block_rows=101, **tiny)
    if cap == 3.0:  # saturated: the order of the largest is float32's
        wanted = {n: v for n, v in wanted.items() if n in SHARED}
    check(found, wanted, rel=1e-4, abs_=1e-5 * noise if cap == 3.0 else 0.0)
    assert found.finite.all()
    if noise == 0:
        assert (found.kl == 0).all()
        assert (found.tv == 0).all()
        assert found.agree.all()
    if noise == 1e-7:
        assert 1e-15 < found.kl.mean() < 1e-12


def test_delta_logp_keeps_its_digits() -> None:
    table, ref = random(800, 32), random(9, 32, seed=1)
    cand = ref + 1e-7 * random(9, 32, seed=2)
    targets = torch.arange(9)
    found = compare(ref, cand, table, targets=targets)
    wanted = naive(capped(ref, table, None), capped(cand, table, None), targets)
    delta = wanted["logp_cand"] - wanted["logp_ref"]
    np.testing.assert_allclose(found.logp_cand - found.logp_ref, delta, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 1.0])
def test_two_tables(noise: float) -> None:
    """Different tables: float32 products in float32, exact to naive in float64; also of different hidden sizes."""
    one, ref, cand = random(700, 40), random(11, 40, seed=1), random(11, 24, seed=3)
    two = one + noise * random(700, 40, seed=2)
    wanted = naive(capped(ref, one, 30.0), capped(ref, two, 30.0))
    check(compare(ref.double(), ref, one, two, cap=30.0, block_rows=64), wanted, rel=1e-5)
    single = compare(ref, ref, one, two, cap=30.0, block_rows=64)
    # two float32 products differ by some 1e-6 whatever the tables
    np.testing.assert_allclose(single.kl, wanted["kl"], rtol=1e-2, atol=1e-11)
    np.testing.assert_allclose(single.tv, wanted["tv"], rtol=1e-2, atol=5e-6)
    narrow = random(700, 24, seed=4)
    wanted = naive(capped(ref, one, None), capped(cand, narrow, None))
    check(compare(ref, cand, one, narrow), wanted, rel=1e-4, abs_=1e-5)


def test_equal_blocks_of_two_tables_are_shared() -> None:
    table, ref = random(500, 32), random(7, 32, seed=1)
    cand = ref + 1e-7 * random(7, 32, seed=2)
    wanted = naive(capped(ref, table, 30.0), capped(cand, table, 30.0))
    check(compare(ref, cand, table, table.clone(), cap=30.0), wanted, rel=1e-4)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("far", [0.3, 10.0])
def test_a_far_position_does_not_blur_its_neighbours(cap: float | None, far: float) -> None:
    table, ref = random(900, 48, scale=0.5), random(8, 48, seed=1)
    cand = ref + 1e-7 * random(8, 48, seed=2)
    cand[3] += far
    found = compare(ref, cand, table, cap=cap, block_rows=200)
    wanted = naive(capped(ref, table, cap), capped(cand, table, cap))
    for name in ("kl", "reverse_kl", "tv"):
        np.testing.assert_allclose(getattr(found, name), wanted[name], rtol=1e-3, err_msg=name)


def test_a_missing_soft_cap_is_seen() -> None:
    table, ref = random(300, 32, scale=2.0), random(5, 32, seed=1)
    found = compare(ref, ref, table, cap=30.0, cand_cap=None)
    check(found, naive(capped(ref, table, 30.0), capped(ref, table, None)), rel=1e-4, abs_=1e-4)
    assert found.max_diff.max() > 1


@pytest.mark.parametrize("noise", [0.0, 4.5e-7, 1e-3, 1.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_logits_against_naive(noise: float, shift: float) -> None:
    """A KL of 1e-13, and a constant shift, which must not count."""
    ref = random(13, 3001, scale=4.0)
    cand = ref + noise * random(13, 3001, seed=1) + shift
    targets = torch.arange(13) * 200
    wanted = naive(ref, cand, targets)
    exact = shift == 0 or noise >= 1e-3
    found = compare_logits(ref, cand, targets=targets, block_rows=333)
    if not exact:  # the difference of two float32 has float32's rounding at 5
        wanted = {n: v for n, v in wanted.items() if n != "rms_diff"}
    check(found, wanted, rel=1e-3 if exact else 0.05)
    if noise == 4.5e-7 and not shift:
        assert 2e-14 < found.kl.mean() < 2e-13
    double = compare_logits(ref.double(), cand, targets=targets, scratch=2 * 8 * 3001 * 5)
    check(double, wanted, rel=1e-5)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_extreme_logits(scale: float) -> None:
    """Probabilities that are 0 in float32 under one stream and 1 under the other."""
    ref, cand = random(6, 400, scale=scale), random(6, 400, seed=1, scale=scale)
    found = compare_logits(ref, cand, block_rows=37)
    check(found, naive(ref, cand), rel=1e-4, abs_=1e-3)
    found = compare_logits(ref.double(), cand.double())
    check(found, naive(ref, cand), rel=1e-9, abs_=1e-12)
    # saturated soft-caps; which of the largest are equal depends on the precision
    h, g = ref / 4, cand / 4
    wanted = naive(capped(h, torch.eye(400), 30.0), capped(g, torch.eye(400), 30.0))
    found = compare(h, g, torch.eye(400), cap=30.0)
    check(found, {n: v for n, v in wanted.items() if n in SHARED}, rel=1e-3, abs_=1e-4)
    assert found.finite.all()


@pytest.mark.parametrize(
    ("vocab", "levels"), [(2, 2), (7, 2), (33, 3), (400, 4), (4000, 1), (2500, 40)]
)
def test_ties(vocab: int, levels: int) -> None:
    """Equal logits: the smallest id first, in whatever block or group it lies."""
    generator = torch.Generator().manual_seed(vocab)
    ref = torch.randint(0, levels, (9, vocab), generator=generator).float()
    cand = torch.randint(0, levels, (9, vocab), generator=generator).float()
    for rows in (1, 5, 100, 4096)[vocab > 1000 :]:
        check(compare_logits(ref, cand, block_rows=rows), naive(ref, cand), rel=1e-4, abs_=1e-6)


@settings(max_examples=40)
@given(
    positions=st.integers(1, 9),
    vocab=st.integers(2, 90),
    rows=st.integers(1, 100),
    tile=st.integers(1, 9),
    exponent=st.integers(-7, 1),
    cap=st.sampled_from([None, 30.0]),
)
def test_any_tiling(
    positions: int, vocab: int, rows: int, tile: int, exponent: int, cap: float | None
) -> None:
    table, ref = random(vocab, 8), random(positions, 8, seed=1)
    cand = ref + 10.0**exponent * random(positions, 8, seed=2)
    found = compare(ref, cand, table, cap=cap, block_rows=rows, scratch=2 * 4 * vocab * tile)
    wanted = naive(capped(ref, table, cap), capped(cand, table, cap))
    # a float32 near-tie may order the top k otherwise
    wanted = {n: v for n, v in wanted.items() if "overlap" not in n}
    check(found, wanted, rel=1e-3, abs_=1e-16 if exponent < 0 else 1e-5)


class Lazy:
    """Rows on demand, in bfloat16 NumPy, counting reads."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self.shape, self.largest = array, array.shape, 0

    def read_rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        self.largest = max(self.largest, stop - start)
        return self.array[start:stop]


def in_blocks(table: Tensor, sizes: list[int]) -> Callable[[], Iterator[tuple[int, int, Tensor]]]:
    def blocks() -> Iterator[tuple[int, int, Tensor]]:
        at = 0
        for size in sizes:
            yield at, at + size, table[at : at + size]
            at += size

    return blocks


def test_lazy_tables_give_the_same_bits() -> None:
    table = random(100, 16).bfloat16()
    ref, cand = random(5, 16, seed=1), random(5, 16, seed=2)
    lazy = Lazy(table.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    wanted = compare(ref, cand, table, block_rows=30).to_json()
    assert compare(ref, cand, lazy, block_rows=30).to_json() == wanted
    assert lazy.largest == 30
    for sizes in ([100], [7, 60, 33], [1] * 100):
        blocks = in_blocks(table, sizes)
        assert compare(ref, cand, blocks, vocab=100, block_rows=30).to_json() == wanted
        assert compare(ref, cand, blocks, lazy, vocab=100, block_rows=30).to_json() == wanted


def test_padded_tables() -> None:
    table, h = random(100, 16), random(3, 16, seed=1)
    padded = torch.cat((table, torch.zeros(28, 16)))
    with pytest.raises(ShapeError, match=r"has 100 rows, the candidate's 128.*Fix: pass vocab="):
        compare(h, h, table, padded)
    assert compare(h, h, table, padded, vocab=100).kl.max() == 0


@pytest.mark.parametrize("sizes", [[60], [60, 30]])
def test_short_tables(sizes: list[int]) -> None:
    h, table = random(3, 16), random(100, 16)
    with pytest.raises(FormatError, match=f"end at row {sum(sizes)}, expected rows up to 100"):
        compare(h, h, in_blocks(table, sizes), vocab=100)


def test_holes_in_tables() -> None:
    h, table = random(3, 16), random(100, 16)
    with pytest.raises(
        FormatError, match="says rows 60 to 100 and has 40, expected rows from 50 on"
    ):
        compare(h, h, lambda: [(0, 50, table[:50]), (60, 100, table[60:])], vocab=100)


def test_bad_arguments() -> None:
    h, table = random(3, 16), random(100, 16)
    with pytest.raises(ShapeError, match=r"\(3, 16\) and \(2, 16\).*one document at a time"):
        compare(h, h[:2], table)
    with pytest.raises(ShapeError, match=r"table rows are \(100, 15\), expected \[rows, 16\]"):
        compare(h, h, table[:, :15])
    with pytest.raises(UsageError, match="does not say how many rows"):
        compare(h, h, lambda: iter(()))
    with pytest.raises(UsageError, match="run from 0 to 100, expected -1"):
        compare(h, h, table, targets=torch.tensor([0, 1, 100]))
    with pytest.raises(UsageError, match=r"expected integers \[3\]"):
        compare(h, h, table, targets=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"\(3, 16\) and \(3, 15\)"):
        compare_logits(h, h[:, :15])
    with pytest.raises(ShapeError, match="at least 2"):
        compare_logits(h[:, :1], h[:, :1])
    with pytest.raises(ShapeError, match="vocab is 101, but a table has 100 rows"):
        compare(h, h, table, vocab=101)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_positions(value: float) -> None:
    table, ref = random(100, 16), random(9, 16, seed=1)
    cand = ref + 1e-7
    clean = compare(ref, cand, table, cap=30.0)
    broken = cand.clone()
    broken[4, 3] = value
    found = compare(ref, broken, table, cap=30.0)
    assert found.first_non_finite() == 4
    assert found.finite_ref.all()
    assert found.finite_cand.sum() == 8
    assert math.isnan(found.kl[4])
    assert found.top1_cand[4] == -1
    others = np.arange(9) != 4
    assert found.select(others).to_json() == clean.select(others).to_json()
    bad_table = table.clone()
    bad_table[50, 0] = value
    found = compare(ref, cand, table, bad_table, cap=30.0)
    assert not found.finite_cand.any()
    assert found.finite_ref.all()
    assert not compare(ref, cand, bad_table, cap=30.0).finite_ref.any()
    logits = random(5, 40)
    logits[3, 7] = value
    assert compare_logits(logits, random(5, 40)).first_non_finite() == 3
    summary = summarise([Record("a", "x", clean), Record("b", "x", compare(ref, broken, table))])
    assert summary.first_non_finite == ("b", 4, "candidate")
    assert summary.overall.non_finite == 1
    assert math.isfinite(summary.overall.metrics["kl"].mean)


def test_empty_document() -> None:
    found = compare(random(0, 16), random(0, 16), random(100, 16))
    assert len(found) == 0
    assert found.first_non_finite() is None
    summary = summarise([Record("a", "x", found)])
    assert summary.overall.metrics == {}
    assert summary.intervals["kl"].reason == "there are no positions"
    assert summarise([]).overall.positions == 0


def document(seed: int, noise: float = 0.2, length: int = 20) -> Record:
    table, ref = random(211, 16), random(length, 16, seed=100 + seed)
    cand = ref + noise * random(length, 16, seed=200 + seed)
    targets = torch.arange(length) * 10 % 211
    targets[-1] = -1
    stats = compare(ref, cand, table, cap=30.0, targets=targets)
    return Record(f"d{seed:02}", "code" if seed % 3 else "prose", stats)


def test_flips_and_margins() -> None:
    ref = torch.tensor([[0.0, 1.0, 0.9], [0.0, 5.0, 1.0], [3.0, 0.0, 0.0]])
    cand = torch.tensor([[0.0, 0.9, 1.0], [0.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    found = compare_logits(ref, cand)
    expected, real = found.flips()
    assert (expected.tolist(), real.tolist()) == ([True, False, False], [False, True, False])
    expected, real = found.flips(tolerance=0.01)
    assert (expected.tolist(), real.tolist()) == ([False, False, False], [True, True, False])
    assert found.agree.tolist() == [False, False, True]


def test_summary_by_hand() -> None:
    records = [document(i, length=10 + i) for i in range(8)]
    s = summarise(records, edges=[8, 12], worst=5)
    kl = np.concatenate([r.stats.kl for r in records])
    assert s.overall.positions == len(kl) == sum(range(10, 18))
    assert s.overall.metrics["kl"].mean == pytest.approx(kl.mean(), rel=1e-12)
    assert s.overall.metrics["kl"].percentiles["100"] == kl.max()
    assert s.overall.metrics["kl"].percentiles["99"] == pytest.approx(np.percentile(kl, 99))
    logp = np.concatenate([r.stats.logp_ref[:-1] for r in records])
    assert s.overall.scored == len(logp)
    assert s.overall.perplexity_ref == pytest.approx(math.exp(-logp.mean()))
    assert [g.name for g in s.categories] == ["code", "prose"]
    assert sum(g.positions for g in s.categories) == len(kl)
    assert [(g.name, g.positions) for g in s.ranges[:2]] == [("0-8", 64), ("8-12", 2 + 3 + 6 * 4)]
    assert sum(g.positions for g in s.ranges) == len(kl)
    assert [w.kl for w in s.worst] == sorted(kl.tolist(), reverse=True)[:5]
    w = s.worst[0]
    assert records[int(w.document[1:])].stats.kl[w.position] == w.kl
    assert s.overall.expected_flips + s.overall.real_flips == sum(
        int((~r.stats.agree).sum()) for r in records
    )
    ratio = s.intervals["perplexity_ratio"]
    assert ratio.estimate == pytest.approx(s.overall.perplexity_cand / s.overall.perplexity_ref)
    assert ratio.low < ratio.estimate < ratio.high


def test_offsets_place_positions_in_the_sequence() -> None:
    r = document(1)
    moved = Record("m", "x", r.stats, offset=4090)
    s = summarise([moved], edges=[4096])
    assert [(g.name, g.positions) for g in s.ranges] == [("0-4096", 6), ("4096-4110", 14)]
    assert s.worst[0].position == 4090 + s.worst[0].index


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_any_number_of_shards_gives_the_same_bytes(shards: int) -> None:
    documents = list(range(9))
    wanted = json.dumps(summarise([document(i) for i in documents], draws=200).to_json())
    parts = [loads(dumps(document(i) for i in documents[s::shards])) for s in range(shards)]
    records = merge(reversed(parts))
    assert json.dumps(summarise(records, draws=200).to_json()) == wanted
    assert dumps(records) == dumps(document(i) for i in documents)


def test_a_document_in_two_shards_is_an_error() -> None:
    with pytest.raises(UsageError, match="'d01' is in the statistics twice"):
        merge([[document(1)], [document(1)]])


def test_json_round_trip() -> None:
    records = [document(i) for i in range(MIN_DOCUMENTS)]
    text = dumps(records)
    assert dumps(loads(text)) == text
    s = summarise(records, draws=100)
    plain = json.loads(json.dumps(s.to_json(), allow_nan=False))
    assert Summary.from_json(plain) == s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no list of records"),
        ('{"version": 2, "records": []}', "version 2, expected 1"),
        ('{"version": 1, "records": [1]}', "does not have the fields"),
        (
            '{"version":1,"records":[{"document":1,"category":"","offset":0,"stats":{}}]}',
            "field document .* is no str",
        ),
        (
            '{"version":1,"records":[{"document":"","category":"","offset":0,"stats":{}}]}',
            "have columns",
        ),
    ],
)
def test_foreign_json(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        loads(text)


def test_damaged_columns() -> None:
    good = document(1).stats.to_json()
    for column, value in (("kl", "x"), ("target", 0.5), ("finite_ref", 1), ("top1_ref", 2**70)):
        bad = {**good, column: [value, *good[column][1:]]}
        with pytest.raises(FormatError, match=f"column {column}"):
            Stats.from_json(bad)
    with pytest.raises(FormatError, match="different lengths"):
        Stats.from_json({**good, "kl": good["kl"][1:]})
    with pytest.raises(FormatError, match="not a summary"):
        Summary.from_json({"version": 1})


def test_student_t() -> None:
    """Table values of the two-sided 95 % quantile."""
    for degrees, value in ((5, 2.5706), (9, 2.2622), (30, 2.0423)):
        assert student_t(1.959964, degrees) == pytest.approx(value, abs=2e-3)


def test_intervals_cover() -> None:
    """Of 200 experiments of 12 documents, 95 % intervals hold the true mean about 95 % of the time."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sizes = rng.integers(50, 150, 12)
        means = rng.gamma(2.0, 0.5, 12)  # mean 1, skewed, differs by document
        found = ratio_interval((means * sizes).tolist(), sizes.tolist(), draws=1000, seed=trial)
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 198


def test_documents_not_tokens_are_resampled() -> None:
    """Copies of a token inside a document are no evidence: the interval is as wide as with one."""
    values = np.random.default_rng(0).normal(size=20).tolist()
    one = ratio_interval(values, [1] * 20)
    many = ratio_interval([1000 * v for v in values], [1000] * 20)
    assert many.high - many.low == pytest.approx(one.high - one.low)
    assert one == ratio_interval(values, [1] * 20)
    assert one != ratio_interval(values, [1] * 20, seed=1)


def test_few_documents_give_a_reason() -> None:
    found = ratio_interval([1.0, 2.0], [1, 1])
    assert (found.estimate, found.low, found.high) == (1.5, None, None)
    assert found.reason == "2 sequences are too few to resample, at least 6 are needed"
    fewer = "1 sequence is too few to resample, at least 6 are needed"
    assert quantile_interval([np.ones(3)], 0.9).reason == fewer


def test_equal_documents_give_a_point() -> None:
    found = ratio_interval([0.0] * 8, [5] * 8)
    assert (found.low, found.estimate, found.high) == (0.0, 0.0, 0.0)


def test_quantile_interval() -> None:
    rng = np.random.default_rng(0)
    values = [rng.exponential(size=200) for _ in range(20)]
    found = quantile_interval(values, 0.9, draws=300)
    assert found.estimate == np.quantile(np.concatenate(values), 0.9, method="inverted_cdf")
    assert found.low < -math.log(0.1) < found.high
    assert found == quantile_interval(values, 0.9, draws=300)


def test_repeatable_to_the_bit() -> None:
    assert document(3).stats.to_json() == document(3).stats.to_json()
