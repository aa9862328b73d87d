"""ggml blocks: layouts against gguf's own decoder, bytes against llama.cpp's encoders, rounding against its loss."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats.errors import LossyError, NonFiniteError, ShapeError, UsageError
from g2kit.quant import gptq
from g2kit.quant.columns import descend_columns, ldlq_columns
from g2kit.quant.ggml import FORMATS, Blocks, encode, hessian, layout, plain
from g2kit.quant.ggml.bridge import blocks_of
from g2kit.quant.ggml.encode import row_unit
from g2kit.quant.scheme import Codes, Scheme

NAMES = list(FORMATS)


def decoded(blocks: Blocks) -> np.ndarray:
    """By llama.cpp's Python package."""
    kind = gguf.GGMLQuantizationType(blocks.format.code)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks.data.numpy(), kind)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def weights(out: int = 8, n: int = 512, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes with a few outliers."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, n, generator=g) * (0.02 + torch.rand(out, 1, generator=g))
    w[:, ::37] *= 4
    return w


def inputs_hessian(n: int, seed: int = 1) -> torch.Tensor:
    """Correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * n, n, generator=g) @ (torch.eye(n) + 0.05 * torch.randn(n, n, generator=g))
    x = x * (0.05 + torch.rand(n, generator=g) ** 4)
    return x.T @ x / len(x)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_ggufs(name: str) -> None:
    f = FORMATS[name]
    kind = gguf.GGMLQuantizationType(f.code)
    assert kind.name == name
    assert gguf.GGML_QUANT_SIZES[kind] == (f.weights, f.nbytes)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_bytes_decode_as_gguf_decodes_them_and_pack_again(name: str, seed: int) -> None:
    f = FORMATS[name]
    rng = np.random.default_rng(seed)
    raw = torch.from_numpy(rng.integers(0, 256, (3, f.row_bytes(512)), dtype=np.uint8))
    blocks = Blocks(f, raw)
    ours, theirs = blocks.dequantize().numpy(), decoded(blocks)
    usable = np.isfinite(theirs)
    assert np.array_equal(np.isfinite(ours), usable)
    assert np.array_equal(ours[usable].view(np.uint32), theirs[usable].view(np.uint32))
    again = layout.unpack(layout.pack(blocks.fields()), f)
    for a, b in zip(vars(again).values(), vars(blocks.fields()).values(), strict=True):
        assert a is b or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize("mode", ["plain", "importance", "hessian"])
@pytest.mark.parametrize("name", NAMES)
def test_encoded_weights_decode_alike_and_are_near(name: str, mode: str) -> None:
    w, h = weights(), inputs_hessian(512)
    options = {
        "plain": {},
        "importance": {"importance": h.diagonal()},
        "hessian": {"hessian": h, "factor": gptq.factor(h), "rounds": 1},
    }[mode]
    blocks = encode(w, name, **options)
    assert blocks.shape == (8, 512)
    assert same_bits(blocks.dequantize().numpy(), decoded(blocks))
    e = w - blocks.dequantize()
    # codes that follow the inputs are farther from the weights, but not in what the inputs see of them
    by = h if mode == "hessian" else torch.eye(512)
    error = float((((e @ by) * e).sum() / ((w @ by) * w).sum()).sqrt())
    assert error < 4.5 / 2 ** FORMATS[name].bits


@pytest.mark.parametrize("name", sorted(plain.PLAIN))
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-30, 12),
    kind=st.sampled_from(["normal", "ties", "sparse", "constant"]),
)
def test_plain_encoders_give_llama_cpps_bytes(
    name: str, seed: int, exponent: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 96)).astype(np.float32)
    w = {
        "normal": w,
        "ties": np.round(w * 4) / 2,
        "sparse": np.where(rng.random(w.shape) < 0.1, w, 0),
        "constant": np.full_like(w, w[0, 0]),
    }[kind].astype(np.float32) * np.float32(2.0**exponent)
    theirs = gguf.quants.quantize(w, gguf.GGMLQuantizationType(FORMATS[name].code))
    assert np.array_equal(encode(torch.from_numpy(w), name).data.numpy(), theirs)


SIZES = (0.0, 1e-44, 1e-38, 6e-8, 1e-5, 1.0, 6e4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from(SIZES), min_size=4, max_size=4),
    tail=st.sampled_from(SIZES),
)
def test_odd_values_stay_finite_and_near(
    name: str, weighted: bool, seed: int, sizes: list[float], tail: float
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.uniform(-1, 1, (4, 256)) * np.array(sizes)[:, None]
    w[:, 200:] *= tail if tail <= 1 else 1  # neighbours of another size in one block
    x = torch.from_numpy(w.astype(np.float32))
    importance = (
        torch.from_numpy(rng.random(256).astype(np.float32)).round(decimals=1) if weighted else None
    )
    y = encode(x, name, importance=importance).dequantize()
    assert bool(torch.isfinite(y).all())
    # within the range of the row, float16's smallest scale aside
    slack = 1.3 * x.abs().amax(1) + 2.0**-24 * 128
    assert bool((y.abs().amax(1) <= slack).all())
    assert bool((y[x.abs().amax(1) == 0] == 0).all())


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "Q6_K", "IQ4_XS", "Q4_0"])
def test_hessian_rounding_beats_importance_and_refining_never_loses(name: str) -> None:
    w, h = weights(16), inputs_hessian(512)
    f = gptq.factor(h)
    assert f is not None

    def loss(b: Blocks) -> float:
        e = w - b.dequantize()
        return float(((e @ h) * e).sum())

    nearest = loss(encode(w, name, importance=h.diagonal()))
    rounded = loss(encode(w, name, hessian=h, factor=f, rounds=0))
    refined = loss(encode(w, name, hessian=h, factor=f, rounds=2, sweeps=1))
    assert rounded < 0.9 * nearest
    assert refined < 0.99 * rounded


@pytest.mark.parametrize("name", NAMES)
def test_rescaling_never_raises_the_loss_of_any_row(name: str) -> None:
    w, h = weights(16), inputs_hessian(512)
    f = gptq.factor(h)
    assert f is not None
    fields = encode(w, name, hessian=h, factor=f, rounds=0).fields()
    before = hessian.loss(w, fields, h)
    better = hessian.rescale(w, fields, h, torch.ones(16, 1))
    after = hessian.loss(w, better, h)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert float(after.sum()) < float(before.sum())
    assert torch.equal(
        layout.unpack(layout.pack(better), FORMATS[name]).dequantize(), better.dequantize()
    )


def test_a_diagonal_hessian_rounds_to_nearest() -> None:
    """With independent inputs there is nothing to correct: LDLQ's codes are the nearest ones."""
    w = weights(4, 256)
    h = torch.diag(torch.rand(256) + 0.1)
    f = gptq.factor(h)
    assert f is not None
    for name in NAMES:
        plainly = encode(w, name, importance=h.diagonal())
        assert torch.equal(encode(w, name, hessian=h, factor=f, rounds=0).data, plainly.data)


@pytest.mark.parametrize("table", ["IQ4_XS", "Q4_K", "Q3_K", "Q8_0"])
def test_grid_picks_the_nearest_value_of_all(table: str) -> None:
    f = FORMATS[table]
    fields = encode(weights(4, 256), table, importance=torch.ones(256)).fields()
    grid = hessian.BlockGrid(fields)
    codes = range(f.low - f.first if f.table is None else 0, len(f.levels))
    every = torch.stack(
        [replace(fields, codes=torch.full_like(fields.codes, c)).dequantize()[:, 70] for c in codes]
    )
    target = torch.linspace(-3, 3, 4)
    q, value = grid.nearest(70, target)
    best = (every - target).abs().amin(0)
    assert torch.equal((value - target).abs(), best)
    assert torch.equal(value, every.gather(0, (q.long() - codes[0])[None])[0])


def test_columns_agree_with_the_textbook_loop() -> None:
    """LDLQ against GPTQ as its paper has it: inverse, Cholesky, error pushed forward; float64, no damping."""
    w, h = weights(6, 64).double(), inputs_hessian(64).double()
    s = Scheme(4, 32)
    from g2kit.quant.grid import plain_grid

    scales, _ = plain_grid(w.float(), s)
    f = gptq.factor(h, act_order=False, ladder=(0.0,))
    assert f is not None
    f = replace(f, unit=f.unit.double(), dtype=torch.float64)
    found = ldlq_columns(w, gptq.UniformGrid(64, scales, None, s, torch.float64), f)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, want = w.clone(), torch.zeros(6, 64)
    for k in range(64):
        sc = scales[:, k // 32].double()
        q = torch.round(left[:, k] / sc + 8).clamp(0, 15)
        want[:, k] = q
        left[:, k:] -= ((left[:, k] - (q - 8) * sc) / upper[k, k])[:, None] * upper[k, k:]
    assert torch.equal(found.float(), want)


def test_descending_ends_where_no_single_code_gains() -> None:
    w, h = weights(4, 64), inputs_hessian(64)
    s = Scheme(3, 32)
    codes = gptq.rtn(w, s, h.diagonal())
    grid = gptq.UniformGrid(64, codes.scales, None, s)
    end = replace(codes, codes=descend_columns(w, grid, codes.dequantize(), h, 50))
    least = gptq.loss(w, end, h)
    assert float(least.sum()) < float(gptq.loss(w, codes, h).sum())
    for column in range(0, 64, 7):
        for step in (-1, 1):
            moved = end.codes.to(torch.int16).clone()
            moved[:, column] = (moved[:, column] + step).clamp(0, 7)
            other = gptq.loss(w, replace(end, codes=moved.to(torch.uint8)), h)
            assert bool((other >= least * (1 - 1e-5)).all())


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"), [(4, True, "Q4_0"), (8, True, "Q8_0"), (4, False, "Q4_1")]
)
def test_uniform_codes_become_blocks_with_the_same_values(
    bits: int, symmetric: bool, name: str
) -> None:
    codes = gptq.rtn(weights(4, 128), Scheme(bits, 32, symmetric))
    if codes.zeros is not None:
        codes = replace(codes, zeros=torch.full_like(codes.zeros, 8))
    blocks = blocks_of(codes)
    assert blocks.format.name == name
    assert np.array_equal(decoded(blocks), codes.dequantize().numpy())


def test_offsets_that_float16_rounds_are_refused_unless_asked_for() -> None:
    base = gptq.rtn(weights(1, 32), Scheme(4, 32, False))
    odd = Codes(
        base.scheme,
        base.codes,
        torch.full((1, 1), 255 * 2.0**-12),
        torch.full((1, 1), 15, dtype=torch.uint8),
    )
    with pytest.raises(LossyError, match="1 of 1 offsets"):
        blocks_of(odd)
    near = blocks_of(odd, allow_rounding=True).dequantize() - odd.dequantize()
    assert 0 < float(near.abs().max()) <= 2.0**-11 * 15 * 255 * 2.0**-12


def test_schemes_without_a_block_type_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no GGUF block type holds int4 g64 sym.*Q4_0"):
        blocks_of(gptq.rtn(weights(2, 64), Scheme(4, 64)))


def test_bad_input_is_refused() -> None:
    w = weights(2, 256)
    with pytest.raises(UsageError, match=r"'Q9_9' is no block type.*Q4_K"):
        encode(w, "Q9_9")
    with pytest.raises(UsageError, match=r"Q4_K has blocks of 256.*in_features 96.*Q4_0"):
        encode(w[:, :96], "Q4_K")
    with pytest.raises(UsageError, match="keep this tensor"):
        encode(w[:, :7], "Q4_0")
    with pytest.raises(NonFiniteError, match="weight holds NaN"):
        encode(w * float("nan"), "Q4_K")
    with pytest.raises(NonFiniteError, match="importance holds NaN"):
        encode(w, "Q4_K", importance=torch.full((256,), float("inf")))
    with pytest.raises(ShapeError, match=r"importance has shape \[3\], expected \[256\]"):
        encode(w, "Q4_K", importance=torch.ones(3))
    with pytest.raises(ShapeError, match="factor is missing"):
        encode(w, "Q4_K", hessian=torch.eye(256))
    with pytest.raises(ShapeError, match=r"expected \[out, in\]"):
        encode(w[0], "Q4_K")
    with pytest.raises(LossyError, match="Q4_0 holds up to"):
        encode(w * 1e9, "Q4_0")


def test_units_are_powers_of_two_near_the_largest() -> None:
    unit = row_unit(torch.tensor([[0.0], [3.0], [1e-44], [6e4]]))
    assert torch.equal(torch.frexp(unit)[0], torch.full((4, 1), 0.5))
    assert float(unit[1]) == 4.0
    assert float(unit[3]) == 65536.0


def llama(w: np.ndarray, name: str, importance: np.ndarray | None = None) -> Blocks:
    """llama.cpp's own encoder."""
    llama_cpp = pytest.importorskip("llama_cpp")
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    run = library.ggml_quantize_chunk
    run.restype, i64, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    run.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    f = FORMATS[name]
    data = np.zeros((len(w), f.row_bytes(w.shape[1])), np.uint8)
    given = None if importance is None else np.ascontiguousarray(importance, np.float32).ctypes.data
    run(f.code, w.ctypes.data, data.ctypes.data, 0, len(w), w.shape[1], given)
    return Blocks(f, torch.from_numpy(data))


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
def test_against_llama_cpps_encoder(name: str) -> None:
    w, h = weights(32, 1024), inputs_hessian(1024).diagonal()
    w[0, :64], w[1, 32:70] = 0.0, -0.0  # the sign of zero decides bits too
    w[1, 40] = 0.0
    theirs = llama(w.numpy(), name)
    assert same_bits(theirs.dequantize().numpy(), decoded(theirs))
    assert torch.equal(layout.pack(theirs.fields()), theirs.data)
    if name in plain.PLAIN:
        assert torch.equal(encode(w, name).data, theirs.data)

    def error(b: Blocks, by: torch.Tensor | float) -> float:
        return float(((b.dequantize() - w).square() * by).sum())

    assert error(encode(w, name), 1.0) <= error(theirs, 1.0)
    assert error(encode(w, name, importance=h), h) < error(llama(w.numpy(), name, h.numpy()), h)
