"""ggml blocks at their edges: extreme weights and scales against gguf's decoder, and everything against llama.cpp's library."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats.errors import NonFiniteError
from g2kit.quant import gptq
from g2kit.quant.ggml import FORMATS, Blocks, encode, layout
from g2kit.quant.ggml.plain import PLAIN

Array = np.ndarray[Any, np.dtype[Any]]
NAMES = list(FORMATS)
# bits of float16: zeros of both signs, subnormal, smallest normal, one, largest, of both signs
HALVES = (0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF)
FLOAT16_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_XS": (0,),
}  # fmt: skip


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def blocks(name: str, seed: int, halves: tuple[int, ...], fill: int | None) -> Array:
    """Two rows of one type with chosen scales; other bytes random, or all ``fill``."""
    f, rng = FORMATS[name], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (2, f.row_bytes(512)), dtype=np.uint8)
    if fill is not None:
        raw[:] = fill
    each = raw.reshape(-1, f.nbytes)
    for at in FLOAT16_AT[name]:
        each[:, at : at + 2] = np.array([rng.choice(halves)], "<u2").view(np.uint8)
    return raw


def extreme(kind: str, seed: int, exponent: int) -> Array:
    """Weights float32 ``[4, 512]``."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((4, 512)) * 2.0**exponent
    if kind == "zeros":
        w[:] = 0
    elif kind == "outlier":
        w[:, rng.integers(512)] = rng.choice([-6e4, 6e4])
    elif kind == "one weight":
        w[:] = 0
        w[:, rng.integers(512)] = 2.0**exponent
    elif kind == "one sign":
        w = np.abs(w)
    elif kind == "constant":
        w[:] = -(2.0**exponent)
    elif kind == "denormal":
        w *= 2.0**-140
    elif kind == "zero blocks":
        w[:, 32:320] = 0
    return w.astype(np.float32)


KINDS = ("zeros", "outlier", "one weight", "one sign", "constant", "denormal", "zero blocks")
extremes = given(
    kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 10)
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    halves=st.lists(st.sampled_from(HALVES), min_size=1, max_size=3).map(tuple),
    fill=st.sampled_from([None, None, 0x00, 0xFF, 0x80, 0x7F]),
)
def test_blocks_of_any_finite_scale_decode_as_gguf_decodes_them(
    name: str, seed: int, halves: tuple[int, ...], fill: int | None
) -> None:
    f, raw = FORMATS[name], blocks(name, seed, halves, fill)
    ours = Blocks(f, torch.from_numpy(raw))
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(f.code))
    assert np.array_equal(bits(ours.dequantize().numpy()), bits(theirs))
    assert torch.equal(layout.pack(ours.fields()), ours.data)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@extremes
def test_extreme_weights_come_back_near(name: str, kind: str, seed: int, exponent: int) -> None:
    f, w = FORMATS[name], torch.from_numpy(extreme(kind, seed, exponent))
    made = encode(w, name)
    back = made.dequantize()
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(made.data.numpy(), gguf.GGMLQuantizationType(f.code))
    assert np.array_equal(bits(back.numpy()), bits(theirs))
    assert bool(torch.isfinite(back).all())
    error = (w - back).view(4, -1, f.weights).norm(dim=-1)
    # no block is further off than zeros would be, but for the smallest scale that float16 has
    most = w.view(4, -1, f.weights).norm(dim=-1)
    assert bool((error <= most * 1.0001 + 2.0**-24 * 128 * f.weights**0.5).all())
    if kind in ("zeros", "zero blocks"):
        zero = (w == 0).view(4, -1, f.weights).all(-1)
        assert bool((error[zero] == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused(name: str, value: float) -> None:
    w = torch.ones(4, 512)
    h = torch.eye(512)
    for at in ((0, 0), (3, 511)):
        bad = w.clone()
        bad[at] = value
        with pytest.raises(NonFiniteError, match="the weight holds NaN or infinity"):
            encode(bad, name)
        moments = h.clone()
        moments[at[1], at[1]] = value
        with pytest.raises(NonFiniteError, match="the Hessian holds NaN or infinity"):
            encode(w, name, hessian=moments, factor=gptq.factor(h))


# ---------------------------------------------------------------- llama.cpp's own library


@cache
def library() -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))


def decoded(name: str, raw: Array) -> Array:
    """By ``dequantize_row_*``."""
    width = raw.shape[1] // FORMATS[name].nbytes * FORMATS[name].weights
    out = np.zeros((len(raw), width), np.float32)
    run = getattr(library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    run(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def encoded(name: str, w: Array) -> Array:
    """By ``ggml_quantize_chunk``, without importance."""
    f, i64, pointer = FORMATS[name], ctypes.c_int64, ctypes.c_void_p
    run = library().ggml_quantize_chunk
    run.restype = ctypes.c_size_t
    run.argtypes = [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]
    out = np.zeros((len(w), f.row_bytes(w.shape[1])), np.uint8)
    run(f.code, w.ctypes.data, out.ctypes.data, 0, len(w), w.shape[1], None)
    return out


def valid(name: str, raw: Array) -> bool:
    """What llama.cpp's ``--check-tensors`` asks."""
    run = library().ggml_validate_row_data
    run.restype, run.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return bool(run(FORMATS[name].code, raw.ctypes.data, raw.nbytes))


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    halves=st.lists(st.sampled_from(HALVES), min_size=1, max_size=3).map(tuple),
    fill=st.sampled_from([None, None, None, 0x00, 0xFF, 0x80, 0x7F]),
)
def test_our_decoder_is_llama_cpps(
    name: str, seed: int, halves: tuple[int, ...], fill: int | None
) -> None:
    raw = blocks(name, seed, halves, fill)
    ours = Blocks(FORMATS[name], torch.from_numpy(raw)).dequantize().numpy()
    assert np.array_equal(bits(ours), bits(decoded(name, raw)))


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@extremes
def test_our_encoder_is_llama_cpps_or_better(
    name: str, kind: str, seed: int, exponent: int
) -> None:
    w = extreme(kind, seed, exponent)
    made = encode(torch.from_numpy(w), name)
    ours = made.data.numpy()
    assert valid(name, ours)
    if name in PLAIN and kind != "denormal":  # there C converts infinity to an integer
        assert np.array_equal(ours, encoded(name, w))
        return
    if kind == "denormal":
        return
    theirs = decoded(name, encoded(name, w))
    wide = w.astype(np.float64)
    errors = [np.square(wide - x).sum() for x in (decoded(name, ours), theirs)]
    # but for what float16 scales, subnormal ones of small weights above all, make of the largest by chance
    assert errors[0] <= errors[1] * 1.001 + 1e-4 * np.square(wide).sum()


@pytest.mark.llama
@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_accepts_our_blocks_and_notices_damage(name: str) -> None:
    raw = encode(torch.randn(4, 512), name).data.numpy().copy()
    assert valid(name, raw)
    at = FLOAT16_AT[name][0]
    raw.reshape(-1, FORMATS[name].nbytes)[0, at : at + 2] = [0, 0x7C]
    assert not valid(name, raw)
