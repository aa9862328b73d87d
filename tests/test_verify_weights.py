"""The ledger of weights: what is equal, what may be rounded and by how much, and what is noticed otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import convert, digest, open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.formats.base import QuantizedWeight
from g2kit.formats.dtypes import BF16, F16, F32
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.verify.weights import Row, compare_weights, findings, fingerprints

CONFIG = small("gemma2-2b", layers=2)
Q0 = canonical.Q.format(i=0)
Weights = dict[str, np.ndarray]


def ledger(ref: Weights, cand: Weights) -> dict[str, Row]:
    rows = compare_weights(checkpoint(CONFIG, ref), checkpoint(CONFIG, cand))
    return {r.name: r for r in findings(rows)}


def changed(ref: Weights, name: str, array: np.ndarray) -> Weights:
    return {**ref, name: np.ascontiguousarray(array)}


@pytest.fixture(scope="module")
def ref() -> Weights:
    return random_weights(CONFIG, 1)


def test_equal_weights_are_equal_and_have_one_fingerprint(ref: Weights) -> None:
    one, two = checkpoint(CONFIG, ref), checkpoint(CONFIG, dict(ref))
    rows = compare_weights(one, two)
    assert {(r.verdict, r.rule, r.different, r.lossy) for r in rows} == {
        ("PASS", "equal", 0, False)
    }
    root = digest.root(digest.digests(one))
    assert fingerprints(rows) == (root, root)


def test_one_bit_is_noticed_and_placed(ref: Weights) -> None:
    bits = ref[Q0].view(np.uint16).copy()
    bits[3, 5] ^= 1
    row = ledger(ref, changed(ref, Q0, bits.view(BF16)))[Q0]
    assert (row.verdict, row.different, row.equal) == ("FAIL", 1, bits.size - 1)
    one, two = (float(w[3, 5]) for w in (ref[Q0], bits.view(BF16)))
    assert row.note == (
        f"first difference at [3, 5]: {one:.6g} in the reference, {two:.6g} in the candidate; "
        f"1 of {bits.size} elements differs"
    )
    assert row.max_steps == pytest.approx(1)
    assert row.hash != row.reference_hash
    assert row.sqnr_db is not None
    assert row.sqnr_db > 40


def test_a_nan_is_shown_with_what_it_was(ref: Weights) -> None:
    w = ref[Q0].copy()
    w[3, 5] = np.nan
    row = ledger(ref, changed(ref, Q0, w))[Q0]
    was = f"{float(ref[Q0][3, 5]):.6g} in the reference, nan in the candidate"
    assert row.note == f"1 element is NaN or infinite, the first at [3, 5] ({was})"
    w[2, 5] = 7
    row = ledger(ref, changed(ref, Q0, w))[Q0]
    assert "the first at [3, 5]; first difference at [2, 5]: " in row.note
    assert row.note.endswith(f"7 in the candidate; 2 of {w.size} elements differ")


def test_minus_zero_is_another_value(ref: Weights) -> None:
    zero = ref[Q0].copy()
    zero[0, 0] = 0.0
    minus = zero.copy()
    minus[0, 0] = -0.0
    assert ledger({**ref, Q0: zero}, changed(ref, Q0, minus))[Q0].different == 1
    assert ledger({**ref, Q0: zero}, changed(ref, Q0, minus.astype(F32)))[Q0].different == 1


def test_a_wider_type_must_hold_the_same_values(ref: Weights) -> None:
    wide = ref[Q0].astype(F32)
    row = ledger(ref, changed(ref, Q0, wide))[Q0]
    assert (row.verdict, row.rule, row.lossy) == ("PASS", "widened", False)
    wide[0, 0] = np.nextafter(wide[0, 0], np.float32(9))
    row = ledger(ref, changed(ref, Q0, wide))[Q0]
    assert (row.verdict, row.different) == ("FAIL", 1)


def test_a_narrower_type_must_round_to_nearest() -> None:
    ref = random_weights(CONFIG, 2, F32)
    row = ledger(ref, changed(ref, Q0, ref[Q0].astype(BF16)))[Q0]
    assert (row.verdict, row.rule, row.lossy) == ("PASS", "narrowed", True)
    assert row.max_steps is not None
    assert 0.4 < row.max_steps <= 0.5
    truncated = (ref[Q0].view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    row = ledger(ref, changed(ref, Q0, truncated))[Q0]
    assert row.verdict == "FAIL"
    assert "not the rounded reference" in row.note


def test_subnormal_and_overflowing_values_of_a_narrower_type(ref: Weights) -> None:
    odd = ref[Q0].copy()
    odd[0, :2] = [2.0**-20 * 1.25, 2.0**-30]
    row = ledger({**ref, Q0: odd}, changed(ref, Q0, odd.astype(F16)))[Q0]
    assert row.verdict == "PASS", row
    odd[0, 0] = 1e5
    with np.errstate(over="ignore"):
        row = ledger({**ref, Q0: odd}, changed(ref, Q0, odd.astype(F16)))[Q0]
    assert (row.verdict, row.nonfinite) == ("FAIL", 1)
    assert "overflow f16" in row.note


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_fail_even_when_equal(ref: Weights, value: float) -> None:
    bad = ref[Q0].copy()
    bad[2, 1] = value
    for one in (ref, {**ref, Q0: bad}):
        row = ledger(one, changed(ref, Q0, bad))[Q0]
        assert (row.verdict, row.nonfinite) == ("FAIL", 1)
        assert "the first at [2, 1]" in row.note


def test_exchanged_tensors_are_named(ref: Weights) -> None:
    gate, up = canonical.GATE.format(i=1), canonical.UP.format(i=1)
    rows = ledger(ref, {**ref, gate: ref[up], up: ref[gate]})
    assert f"holds what the reference has as {up}" in rows[gate].note
    assert f"holds what the reference has as {gate}" in rows[up].note
    norms = canonical.INPUT_NORM.format(i=0), canonical.INPUT_NORM.format(i=1)
    rows = ledger(ref, {**ref, norms[0]: ref[norms[1]]})
    assert norms[1] in rows[norms[0]].note
    assert "the same bits as" in rows[norms[0]].note


def test_a_copy_that_the_reference_has_too_is_no_finding(ref: Weights) -> None:
    same = {**ref, canonical.Q.format(i=1): ref[Q0]}
    assert ledger(same, dict(same))[Q0].note == ""


def test_norm_with_one_added_and_shifted_embedding_are_recognised(ref: Weights) -> None:
    name = canonical.INPUT_NORM.format(i=0)
    wide = {n: w.astype(F32) for n, w in ref.items()}
    assert "larger by exactly 1" in ledger(wide, changed(wide, name, wide[name] + 1))[name].note
    low = np.roll(ref[canonical.EMBED], 1, axis=0)
    row = ledger(ref, changed(ref, canonical.EMBED, low))[canonical.EMBED]
    assert "one too low" in row.note
    high = np.roll(ref[canonical.EMBED], -1, axis=0)
    assert "one too high" in ledger(ref, changed(ref, canonical.EMBED, high))[canonical.EMBED].note


def test_zero_rows_are_counted(ref: Weights) -> None:
    holed = ref[Q0].copy()
    holed[[1, 4]] = 0
    row = ledger(ref, changed(ref, Q0, holed))[Q0]
    assert (row.zero_rows, row.verdict) == (2, "FAIL")
    assert "2 rows are all zero" in row.note


def test_padding_rows_that_one_side_lacks(ref: Weights) -> None:
    padded = random_weights(CONFIG, 1, rows=CONFIG.vocab_size + 8)
    rows = ledger(padded, ref)
    assert rows[canonical.EMBED_PADDING].verdict == "PASS"
    both = compare_weights(checkpoint(CONFIG, padded), checkpoint(CONFIG, ref))
    assert len(set(fingerprints(both))) == 1
    padded[canonical.EMBED_PADDING][1, 1] = 1
    rows = ledger(padded, ref)
    assert rows[canonical.EMBED_PADDING].verdict == "FAIL"
    assert "no token reaches them" in rows[canonical.EMBED_PADDING].note
    more = {**padded, canonical.EMBED_PADDING: padded[canonical.EMBED_PADDING][:4]}
    assert "shape" in ledger(padded, more)[canonical.EMBED_PADDING].note


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_are_the_whole(ref: Weights, count: int) -> None:
    one, two = checkpoint(CONFIG, ref), checkpoint(CONFIG, changed(ref, Q0, -ref[Q0]))
    whole = compare_weights(one, two)
    parts = [compare_weights(one, two, part=(i, count)) for i in range(count)]
    assert sorted(r.name for p in parts for r in p) == sorted(r.name for r in whole)
    assert {r.name: r for p in parts for r in p} == {r.name: r for r in whole}
    assert [Row.from_json(r.to_json()) for r in whole] == whole


class Rounded(QuantizedWeight):
    """Rounded to ``bits`` in groups, as float32."""

    kind = "test"

    def __init__(self, values: np.ndarray, bits: int, group: int) -> None:
        self.values, self.group_size, self.shape = values, group, values.shape
        self.bits, self.code_bits = bits + 32 / group, bits

    def dequantize(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def rounded(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Round to nearest with a symmetric grid per group."""
    x = w.astype(np.float32).reshape(len(w), -1, group)
    step = np.abs(x).max(-1, keepdims=True) / (2 ** (bits - 1) - 0.5)
    return (np.round(x / step) * step).reshape(w.shape).astype(np.float32)


def packed(ref: Weights, values: np.ndarray, bits: int, group: int) -> Checkpoint:
    made = checkpoint(CONFIG, changed(ref, Q0, values))
    made.tensors[Q0].source.quantized = Rounded(values, bits, group)
    return made


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_weights_must_be_within_their_steps(ref: Weights, bits: int) -> None:
    good = rounded(ref[Q0], bits, 8)

    def row(values: np.ndarray) -> Row:
        rows = compare_weights(checkpoint(CONFIG, ref), packed(ref, values, bits, 8))
        return next(r for r in rows if r.name == Q0)

    found = row(good)
    assert (found.verdict, found.rule, found.lossy) == ("PASS", "quantized", True), found.note
    assert found.max_steps is not None
    assert found.max_steps <= 0.51
    # the error falls by about 6 dB a bit
    assert found.sqnr_db == pytest.approx(6.02 * bits - 4, abs=4)
    holed = good.copy()
    holed[5] = 0
    assert row(holed).verdict == "FAIL"
    assert "worst row 5" in row(holed).note
    assert row(np.roll(good, 1, axis=0)).verdict == "FAIL"
    assert row(good * np.float32(2)).verdict == "FAIL"


def test_official_int8() -> None:
    data = Path(__file__).parent / "data" / "gemma_pytorch"
    with (
        open_checkpoint(data / "model.ckpt", config=_config()) as ref,
        open_checkpoint(data / "model-quant.ckpt", config=_config()) as cand,
    ):
        rows = compare_weights(ref, cand)
    lossy = [r for r in rows if r.rule == "quantized"]
    assert lossy
    assert {r.verdict for r in rows} == {"PASS"}, [r for r in rows if r.verdict != "PASS"]


def _config() -> Path:
    return Path(__file__).parent / "data" / "hf_sharded" / "config.json"


@pytest.mark.parametrize(("to", "dtype", "lossy"), [
    ("gguf", "keep", 0), ("maxtext", "keep", 21), ("safetensors", "f16", 29), ("safetensors", "f32", 0),
])  # fmt: skip
def test_conversions_of_the_sample(tmp_path: Path, to: str, dtype: str, lossy: int) -> None:
    convert(sample_dir(), tmp_path / "x", to=to, dtype=dtype)
    with open_checkpoint(sample_dir()) as ref, open_checkpoint(tmp_path / "x") as cand:
        rows = compare_weights(ref, cand)
    assert {r.verdict for r in rows} == {"PASS"}
    assert sum(r.lossy for r in rows) == lossy
