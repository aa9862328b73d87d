"""Packed layouts: pack and open are inverses, equal to the official code where it is installed, and total on bad input."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from g2kit.formats import safetensors
from g2kit.formats.base import Slot, Source, Tensor, leading_rows
from g2kit.formats.dtypes import BF16, F16
from g2kit.formats.errors import (
    DtypeError,
    ExtraTensorError,
    FormatError,
    G2Error,
    LossyError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from g2kit.formats.packed import awq, bits, views
from g2kit.formats.packed.table import FORMATS, combine, looks_packed, require
from g2kit.formats.packed.uniform import Grid, UniformWeight

from .plan_writer import materialise


class InMemory(Tensor):
    def __init__(self, name: str, array: np.ndarray) -> None:
        super().__init__(name, array.dtype, array.shape, Path("m.safetensors"), array.dtype.name)
        self.array = array

    def read(self, index=()):
        start, stop, rest = leading_rows(self.shape, index)
        out = self.array[start:stop] if self.shape else self.array
        return np.array(out[rest] if rest else out)


def source(arrays: dict[str, np.ndarray]) -> Source:
    tensors = {n: InMemory(n, a) for n, a in arrays.items()}
    return Source("safetensors", Path("m.safetensors"), tensors)


def config_for(name: str, grid: Grid) -> dict[str, Any]:
    """The least a config.json must say for the reader."""
    ct_groups = {"g": {"weights": {"num_bits": grid.bits, "type": "int"}}}
    return {
        "compressed-tensors": {"quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": ct_groups}},
        "int-quantized": {"quantization_config": {
            "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": ct_groups}},
        "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
        "mlx": {"quantization": {"bits": grid.bits, "group_size": grid.group_size}},
    }[name]  # fmt: skip


Case = tuple[Grid, np.ndarray, np.ndarray, np.ndarray | None]


def case(grid: Grid, seed: int) -> Case:
    """Random codes, scales of both signs on the bf16 grid, zeros from 1 (GPTQ has no 0)."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**grid.bits, (grid.out_features, grid.in_features)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.1, (grid.out_features, grid.groups)) * rng.choice([-1, 1])
    scales = scales.astype(BF16).astype(np.float32)
    if grid.symmetric:
        return grid, codes, scales, None
    zeros = rng.integers(1, 2**grid.bits, scales.shape).astype(np.uint8)
    return grid, codes, scales, zeros


def expected(made: Case) -> np.ndarray:
    grid, codes, scales, zeros = made
    z = grid.middle if zeros is None else zeros.astype(np.float32)[..., None]
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    return ((grouped - z) * scales[..., None]).reshape(codes.shape)


def packed(name: str, made: Case, prefix: str = "x") -> dict[str, np.ndarray]:
    return {prefix + s: a for s, a in FORMATS[name].pack(*made).items()}


def opened(name: str, made: Case) -> UniformWeight:
    combined = combine(source(packed(name, made)), config_for(name, made[0]))
    assert list(combined.tensors) == ["x.weight"]
    return combined.tensors["x.weight"].quantized


# ---------------------------------------------------------------- the bit stream


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 131), st.integers(0, 99))
def test_bits_round_trip(width, rows, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, (rows, count)).astype(np.uint8)
    words = bits.pack(codes, width)
    assert (words.dtype, words.shape) == (np.uint32, (rows, -(-count * width // 32)))
    assert np.array_equal(bits.unpack(words, width, count), codes)
    # the definition: code i at bit i * width, least significant first, nothing behind the last
    for row, stream in zip(codes, words, strict=True):
        number = sum(int(w) << 32 * k for k, w in enumerate(stream))
        assert number == sum(int(c) << width * i for i, c in enumerate(row))


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        bits.pack(np.array([[8]], np.uint8), 3)


@given(
    st.sampled_from([2, 3, 4, 8]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 1), st.integers(0, 99)
)  # fmt: skip
def test_bits_equal_compressed_tensors(width, rows, count, axis, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**width, (rows, count)).astype(np.uint8)
    official = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (width - 1)).to(torch.int8)
    want = official.pack_to_int32(signed, width, packed_dim=axis).numpy()
    along = codes if axis else np.ascontiguousarray(codes.T)
    got = bits.pack(along, width).view(np.int32)
    assert np.array_equal(got if axis else got.T, want)
    words = np.ascontiguousarray(want if axis else want.T)
    assert np.array_equal(bits.unpack(words, width, along.shape[1]), along)


# ---------------------------------------------------------------- every format


@st.composite
def grids(draw):
    group = draw(st.sampled_from([32, 64, 5]))
    return Grid(
        draw(st.integers(1, 40)),
        group * draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 3, 4, 8])),
        group,
        draw(st.booleans()),
    )


READ = [n for n in FORMATS if n != "torch-int8"]


@settings(max_examples=60)
@given(grids(), st.booleans(), st.integers(0, 99))
@pytest.mark.parametrize("name", READ)
def test_pack_and_open_are_inverses(name, grid, row, seed):
    if row or name == "int-quantized":
        grid = Grid(
            grid.out_features, grid.in_features, grid.bits, grid.in_features, grid.symmetric
        )
    if name == "int-quantized":
        grid = Grid(grid.out_features, grid.in_features, 8, grid.in_features, True)
    if name in ("gptq", "awq"):  # rows come in whole words
        grid = Grid(
            32 * (1 + grid.out_features % 3),
            grid.in_features,
            grid.bits,
            grid.group_size,
            grid.symmetric,
        )
    if name == "awq":
        grid = Grid(grid.out_features, grid.in_features, 4, grid.group_size, grid.symmetric)
    assume(FORMATS[name].fault(grid) is None)
    made = case(grid, seed)
    arrays = FORMATS[name].pack(*made)
    assert {s: (a.dtype, a.shape) for s, a in arrays.items()} == FORMATS[name].layout(grid)
    weight = opened(name, made)
    _, codes, scales, zeros = made
    assert np.array_equal(weight.codes.read(), codes)
    assert np.array_equal(weight.scales.read().astype(np.float32), scales)
    got = np.full(scales.shape, grid.middle) if weight.zeros is None else weight.zeros.read()
    assert np.array_equal(got, np.full(scales.shape, grid.middle) if zeros is None else zeros)
    assert np.array_equal(weight.dequantize(0, grid.out_features), expected(made))
    a, b = sorted((seed % (grid.out_features + 1), grid.out_features // 2))
    assert np.array_equal(weight.dequantize(a, b), expected(made)[a:b])
    assert np.array_equal(weight.codes.read((slice(a, b),)), codes[a:b])
    assert (weight.group_size, weight.code_bits) == (grid.group_size, grid.bits)


@pytest.mark.parametrize("name", READ)
def test_read_from_a_file_by_rows(name, tmp_path, monkeypatch):
    monkeypatch.setattr("g2kit.formats.packed.uniform._BLOCK", 100)  # several blocks
    made = case(Grid(32, 64, *((8, 64) if name == "int-quantized" else (4, 32)), True), 5)
    arrays = packed(name, made)
    slots = [Slot(n, a.dtype, a.shape) for n, a in arrays.items()]
    materialise(safetensors.plan(slots), arrays, tmp_path)
    file = safetensors.open_source(tmp_path)
    assert looks_packed(file)
    tensor = combine(file, config_for(name, made[0])).tensors["x.weight"]
    assert tensor.dtype == np.float32
    assert tensor.stored.startswith(f"{name} int")
    assert np.array_equal(tensor.read(), expected(made))
    assert np.array_equal(tensor.read((slice(3, 9), 1)), expected(made)[3:9, 1])
    assert tensor.read((slice(4, 4),)).shape == (0, 64)
    file.close()


def test_only_two_matrices_stay_in_memory(monkeypatch):
    monkeypatch.setattr(views, "_SMALL", 0)
    made = case(Grid(32, 32, 4, 32, True), 0)
    many = {k: v for i in range(5) for k, v in packed("gptq", made, f"x{i}").items()}
    combined = combine(source(many), config_for("gptq", made[0]))
    for tensor in combined.tensors.values():
        assert np.array_equal(tensor.read(), expected(made))
    assert len(views.Columns._kept[False]) == 2
    reads = 0

    class Counting(InMemory):
        def read(self, index=()):
            nonlocal reads
            reads += 1
            return super().read(index)

    one = views.Columns(Counting("x", np.arange(12, dtype=np.int32).reshape(3, 4)))
    assert one.read(1, 3).tolist() == [[1, 5, 9], [2, 6, 10]]
    assert one.read(0, 1).tolist() == [[0, 4, 8]]
    assert reads == 1


# ---------------------------------------------------------------- layouts against their descriptions


def test_gptq_words():
    """What GPTQModel documents: word 0x77777777 for symmetric 4-bit zeros, 0x7F7F7F7F for 8 bits; ceil-free shapes."""
    for width, word in ((4, 0x77777777), (8, 0x7F7F7F7F)):
        arrays = FORMATS["gptq"].pack(*case(Grid(32, 64, width, 32, True), 0))
        assert np.unique(arrays[".qzeros"]).tolist() == [word]
        assert arrays[".qweight"].shape == (64 * width // 32, 32)
        assert arrays[".g_idx"].tolist() == [0] * 32 + [1] * 32
    # three bits: the bit positions of the legacy layout
    grid, codes, *rest = case(Grid(32, 32, 3, 32, True), 1)
    words = FORMATS["gptq"].pack(grid, codes, *rest)[".qweight"].view(np.uint32)
    row = codes[4].astype(int)
    assert words[0, 4] == sum(row[j] << 3 * j for j in range(10)) + ((row[10] & 3) << 30)
    assert words[1, 4] == (row[10] >> 2) + sum(row[11 + j] << 3 * j + 1 for j in range(10)) + (
        (row[21] & 1) << 31
    )
    assert words[2, 4] == (row[21] >> 1) + sum(row[22 + j] << 3 * j + 2 for j in range(10))


def test_gptq_versions_and_activation_order():
    made = case(Grid(32, 64, 4, 32, False), 3)
    arrays = packed("gptq", made)
    v2 = dict(arrays)
    v2["x.qzeros"] = (arrays["x.qzeros"].view(np.uint32) + np.uint32(0x11111111)).view(np.int32)
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}
    again = combine(source(v2), config).tensors["x.weight"]
    assert np.array_equal(again.read(), expected(made))
    order = np.random.default_rng(0).permutation(64)
    shuffled = arrays | {"x.g_idx": arrays["x.g_idx"][order]}
    grid, codes, scales, zeros = made
    g = arrays["x.g_idx"][order]
    want = (codes.astype(np.float32) - zeros[:, g]) * scales[:, g]
    read = combine(source(shuffled), config_for("gptq", grid)).tensors["x.weight"]
    assert np.array_equal(read.read(), want)
    assert read.quantized.group_of is not None
    shuffled["x.g_idx"] = shuffled["x.g_idx"] + 1
    with pytest.raises(FormatError, match="belongs to group 2, there are 2"):
        combine(source(shuffled), config_for("gptq", grid)).tensors["x.weight"].read()
    with pytest.raises(FormatError, match="known are gptq, gptq_v2"):
        combine(
            source(arrays),
            {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "marlin"}},
        )


def test_gptq_zero_of_zero_is_shifted_or_refused():
    grid, codes, scales, zeros = case(Grid(32, 32, 4, 32, False), 0)
    zeros[7] = 0
    codes[7] = np.arange(32) % 15  # never 15: there is room above
    made = grid, codes, scales, zeros
    assert np.array_equal(opened("gptq", made).dequantize(0, 32), expected(made))
    assert opened("gptq", made).zeros.read()[7] == 1
    codes[7, 3] = 15
    with pytest.raises(LossyError) as e:
        FORMATS["gptq"].pack(*made)
    assert "row 7, group 0" in str(e.value)
    assert "compressed-tensors, awq or mlx" in str(e.value)


def test_awq_order():
    grid, codes, scales, zeros = case(Grid(16, 32, 4, 32, False), 0)
    words = FORMATS["awq"].pack(grid, codes, scales, zeros)
    for c in (0, 1):
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            nibble = words[".qweight"].view(np.uint32)[:, c] >> np.uint32(4 * i) & np.uint32(15)
            assert np.array_equal(nibble, codes[8 * c + column])
            zero = words[".qzeros"].view(np.uint32)[:, c] >> np.uint32(4 * i) & np.uint32(15)
            assert np.array_equal(zero, zeros[8 * c + column])
    assert awq.ORDER == (0, 2, 4, 6, 1, 3, 5, 7)


def test_mlx_biases_are_exact():
    for symmetric in (True, False):
        made = case(Grid(8, 64, 4, 32, symmetric), 1)
        arrays = FORMATS["mlx"].pack(*made)
        assert arrays[".scales"].dtype == (BF16 if symmetric else np.float32)
        s, b = (arrays[k].astype(np.float64)[..., None] for k in (".scales", ".biases"))
        codes = made[1].reshape(8, 2, 32)
        assert np.array_equal((s * codes + b).reshape(8, 64), expected(made))


def test_mlx_overrides_by_path():
    a, b = case(Grid(8, 64, 4, 32, True), 1), case(Grid(8, 64, 8, 64, True), 2)
    config = {"quantization": {"bits": 4, "group_size": 32, "y": {"bits": 8, "group_size": 64}}}
    read = combine(source(packed("mlx", a) | packed("mlx", b, "y")), config).tensors
    assert np.array_equal(read["x.weight"].read(), expected(a))
    assert np.array_equal(read["y.weight"].read(), expected(b))


# ---------------------------------------------------------------- what cannot be held


@pytest.mark.parametrize(
    ("name", "grid", "words", "able"),
    [
        ("awq", Grid(32, 64, 3, 32, True), "4 bits only", ["compressed-tensors", "gptq", "mlx"]),
        ("gptq", Grid(33, 64, 4, 32, True), "out_features 33 times 4 bits", ["compressed-tensors", "mlx"]),
        ("mlx", Grid(32, 80, 4, 80, False), "groups are 32, 64, 128", ["compressed-tensors", "gptq", "awq"]),
        ("int-quantized", Grid(32, 64, 8, 64, False), "no zeros", ["compressed-tensors", "gptq", "mlx"]),
        ("torch-int8", Grid(32, 64, 8, 32, True), "group size -1", ["compressed-tensors", "gptq", "mlx"]),
        ("awq", Grid(12, 64, 4, 32, True), "no multiple of 8", ["compressed-tensors", "mlx"]),
    ],
)  # fmt: skip
def test_a_format_that_cannot_hold_a_scheme_lists_which_can(name, grid, words, able):
    with pytest.raises(UsageError) as e:
        require(name, {"a.weight": grid, "b.weight": grid})
    assert words in str(e.value)
    assert "(and 1 more tensors)" in str(e.value)
    assert e.value.expected == able
    assert f"--format {' or '.join(able)}" in e.value.fix


def test_unknown_format():
    with pytest.raises(UsageError, match="use one of compressed-tensors, int-quantized, gptq"):
        require("exl2", {})


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "int-quantized"])
def test_scales_that_the_format_rounds_are_refused(name):
    grid, codes, scales, zeros = case(
        Grid(32, 64, 8 if name == "int-quantized" else 4, 64, True), 0
    )
    scales[3] = 1 + 2**-12
    with pytest.raises(LossyError, match=r"1 of 32 scales are not exact in (bf16|f16)"):
        FORMATS[name].pack(grid, codes, scales, zeros)


# ---------------------------------------------------------------- bad input


def damaged(name: str, made: Case, **changes: Any) -> G2Error:
    arrays = packed(name, made)
    for key, value in changes.items():
        full = "x." + key
        if value is None:
            del arrays[full]
        else:
            arrays[full] = value(arrays[full])
    with pytest.raises(G2Error) as e:
        combine(source(arrays), config_for(name, made[0])).tensors["x.weight"].read()
    return e.value


def test_damaged_parts():
    made = case(Grid(32, 64, 4, 32, True), 0)
    e = damaged("gptq", made, scales=None)
    assert type(e) is MissingTensorError
    assert "1 parts of packed weights are absent: x.scales" in str(e)
    e = damaged("gptq", made, qweight=None)
    assert type(e) is ExtraTensorError
    assert "belong to no packed weight: x.qzeros, x.scales, x.g_idx" in str(e)
    assert type(damaged("gptq", made, qweight=lambda a: a[:, :5])) is ShapeError
    assert type(damaged("gptq", made, qzeros=lambda a: a.astype(np.int64))) is DtypeError
    assert type(damaged("awq", made, scales=lambda a: a[0])) is ShapeError
    assert type(damaged("mlx", made, weight=lambda a: a[:, :3])) is ShapeError
    assert (
        type(damaged("compressed-tensors", made, weight_packed=lambda a: a.view(np.uint32)))
        is DtypeError
    )
    e = damaged("compressed-tensors", made, weight_shape=lambda a: a * 2)
    assert type(e) is ShapeError
    assert "a weight [64, 128] of 4 bits" in str(e)
    assert type(damaged("compressed-tensors", made, weight_shape=lambda a: a * 0)) is ShapeError
    assert type(damaged("compressed-tensors", made, weight_scale=lambda a: a[:, :0])) is ShapeError
    bad = np.full((32, 2), 0.5, F16).T.copy()
    bad[1, 7] = np.nan
    e = damaged("gptq", made, scales=lambda a: bad)
    assert type(e) is NonFiniteError
    assert "in row 7, group 1" in str(e)
    assert e.tensor == "x.scales"


def test_unknown_methods_name_what_is_known():
    arrays = packed("gptq", case(Grid(32, 64, 4, 32, True), 0))
    for quantization, words in (
        ({"quant_method": "hqq"}, "quantized by hqq; known are compressed-tensors, gptq, awq, mlx"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            "format marlin-24; known are pack-quantized",
        ),
        ({}, "quantized by None"),
    ):
        with pytest.raises(FormatError) as e:
            combine(source(arrays), {"quantization_config": quantization})
        assert words in str(e.value)
    with pytest.raises(FormatError, match="no quantization_config says how"):
        combine(source(arrays), None)


def test_a_weight_packed_and_plain():
    arrays = packed("gptq", case(Grid(32, 64, 4, 32, True), 0)) | {
        "x.weight": np.ones((32, 64), np.float32)
    }
    with pytest.raises(ExtraTensorError, match=r"packed and plain: x\.weight"):
        combine(source(arrays), config_for("gptq", Grid(32, 64, 4, 32, True)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 130) | st.sampled_from(["gptq", "int", "gemm", "affine", "awq"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(["bits", "group_size", "quant_method", "format", "config_groups", "g", "weights", "num_bits",
                         "type", "mode", "x", "version", "checkpoint_format"]), inner, max_size=5),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from(READ), JSON, st.data())
def test_whatever_the_files_say_it_is_a_g2error_or_a_weight(name, junk, data):
    made = case(Grid(32, 64, *((8, 64) if name == "int-quantized" else (4, 32)), True), 0)
    arrays = packed(name, made)
    config = config_for(name, made[0])
    victim = data.draw(st.sampled_from([None, *arrays]))
    if victim is None:
        key = next(iter(config))
        config = {key: config[key] | junk if isinstance(junk, dict) else junk}
    else:
        dtype = data.draw(
            st.sampled_from([np.int32, np.int64, np.int8, np.uint32, np.float32, F16])
        )
        shape = data.draw(st.lists(st.integers(0, 40), max_size=3))
        arrays[victim] = np.full(shape, data.draw(st.integers(0, 100)), dtype)
    with suppress(G2Error):  # anything else fails
        for tensor in combine(source(arrays), config).tensors.values():
            if tensor.quantized is not None:
                assert tensor.read().shape == tensor.shape
