"""The int8 variant: pairs become float32 weights that remember their codes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2kit.formats import torch_pickle
from g2kit.formats.base import Slot, Source, Tensor, leading_rows
from g2kit.formats.dtypes import BF16, F16, F32, I8
from g2kit.formats.errors import (
    DtypeError,
    ExtraTensorError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
)
from g2kit.formats.packed import torch_int8
from g2kit.formats.packed.table import TORCH_INT8
from g2kit.formats.packed.torch_int8 import combine
from g2kit.formats.packed.uniform import Grid
from g2kit.formats.torch_plan import plan

from .plan_writer import materialise

OFFICIAL = Path(__file__).parent / "data" / "gemma_pytorch"


class InMemory(Tensor):
    """An array as a tensor that counts the rows it gives away."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        super().__init__(name, array.dtype, array.shape, Path("q.ckpt"), array.dtype.name)
        self.array = array
        self.rows_read: list[int] = []

    def read(self, index=()):
        start, stop, rest = leading_rows(self.shape, index)
        self.rows_read += range(start, stop)
        out = self.array[start:stop] if self.shape else self.array
        return np.array(out[rest] if rest else out)


def source(**arrays: np.ndarray) -> Source:
    tensors = {n.replace("__", "."): a for n, a in arrays.items()}
    return Source("torch_pickle", Path("q.ckpt"), {n: InMemory(n, a) for n, a in tensors.items()})


CODES = np.array([[-128, 127, 0], [1, -1, 5]], np.int8)
SCALES = np.array([0.5, 3.0], np.float32)


def test_official_file():
    opened = torch_pickle.open_source(OFFICIAL / "model-quant.ckpt")
    exact = torch_pickle.open_source(OFFICIAL / "model.ckpt")
    combined = combine(opened)
    assert set(combined.tensors) == set(exact.tensors)
    assert [n for n in combined.tensors if n.endswith("scaler")] == []
    quantized = {n: t for n, t in combined.tensors.items() if t.quantized}
    assert len(quantized) == 1 + 4 * 5  # embedding; qkv, o, gate, up, down
    for name, t in quantized.items():
        want = exact.tensors[name].read().astype(np.float32)
        scale = opened.tensors[name + "_scaler"].read().astype(np.float32)
        codes = opened.tensors[name].read()
        got = t.read()
        assert (got.dtype, t.dtype, t.stored, t.shape) == (F32, F32, "torch_int8", want.shape)
        assert np.array_equal(got, codes.astype(np.float32) * scale[:, None])
        # the same weights rounded: no further off than half a step of their row
        assert (np.abs(got - want) <= 0.5001 * scale[:, None] + 1e-7).all(), name
        assert np.array_equal(t.read((slice(2, 5), 1)), got[2:5, 1])
        assert t.quantized.bits == 8 + 32 / want.shape[1]
    for name in set(combined.tensors) - set(quantized):
        assert combined.tensors[name] is opened.tensors[name]
    assert combined.format == opened.format
    assert combined.metadata == opened.metadata
    combined.check_unchanged()
    combined.close()
    exact.close()
    with pytest.raises(OSError, match="Bad file"):
        opened.check_unchanged()  # closing one closes the other: they are the same file


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_values_and_rows_read(dtype):
    s = source(x__weight=CODES, x__weight_scaler=SCALES.astype(dtype), n__weight=SCALES)
    t = combine(s).tensors["x.weight"]
    codes, scales = s.tensors["x.weight"], s.tensors["x.weight_scaler"]
    assert t.quantized.kind == torch_int8.KIND
    assert (t.quantized.shape, t.quantized.bits) == ((2, 3), 8 + 8 * np.dtype(dtype).itemsize / 3)
    assert codes.rows_read == scales.rows_read == []  # nothing is read to open
    assert t.read((1,)).tolist() == [3, -3, 15]
    assert codes.rows_read == scales.rows_read == [1]
    assert t.read((1, 2)).shape == ()
    assert t.quantized.dequantize(0, 1).tolist() == [[-64, 63.5, 0]]
    assert t.quantized.dequantize(1, 1).shape == (0, 3)
    assert t.read().tolist() == [[-64, 63.5, 0], [3, -3, 15]]


def test_blocks(monkeypatch):
    monkeypatch.setattr(torch_int8, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    codes = rng.integers(-128, 128, (11, 3)).astype(np.int8)
    scales = rng.random(11).astype(np.float32)
    t = combine(source(x__weight=codes, x__weight_scaler=scales)).tensors["x.weight"]
    assert np.array_equal(t.read((slice(1, 10),)), (codes * scales[:, None])[1:10])


def test_source_without_pairs_is_as_it_was():
    s = source(n__weight=SCALES, ids=CODES)
    assert combine(s).tensors == s.tensors


@pytest.mark.parametrize(
    ("arrays", "error", "words"),
    [
        ({"x__weight": CODES}, MissingTensorError, "1 int8 weights have no scaler: x.weight_scaler"),
        ({"x__weight": CODES, "y__weight_scaler": SCALES}, MissingTensorError, "x.weight_scaler"),
        ({"x__weight_scaler": SCALES}, ExtraTensorError, "no int8 weight: x.weight_scaler"),
        ({"x__weight": SCALES, "x__weight_scaler": SCALES}, ExtraTensorError, "half quantized"),
        ({"x__weight": CODES, "x__weight_scaler": SCALES[:1]}, ShapeError, "[1], the int8 weight [2, 3]"),
        ({"x__weight": CODES, "x__weight_scaler": SCALES[:, None]}, ShapeError, "[2, 1]"),
        ({"x__weight": CODES[0], "x__weight_scaler": SCALES[:1]}, ShapeError, "[3]"),
        ({"x__weight": CODES, "x__weight_scaler": np.array(1.0, np.float32)}, ShapeError, "shape []"),
        ({"x__weight": CODES, "x__weight_scaler": np.array([1, 2])}, DtypeError, "int64"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(arrays, error, words):
    with pytest.raises(error) as e:
        combine(source(**arrays))
    assert type(e.value) is error
    assert words in str(e.value)
    assert "q.ckpt" in str(e.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scalers_that_are_not_finite(bad):
    scales = np.ones(9, np.float32)
    scales[6] = bad
    s = source(x__weight=np.ones((9, 2), np.int8), x__weight_scaler=scales)
    t = combine(s).tensors["x.weight"]
    assert t.read((slice(0, 6),)).shape == (6, 2)
    with pytest.raises(NonFiniteError) as e:
        t.read((slice(4, 9),))
    assert f"1 of 5 scalers are not finite, the first is {scales[6]} in row 6" in str(e.value)
    assert e.value.tensor == "x.weight_scaler"


def test_written_and_opened_again(tmp_path):
    slots = [Slot("x.weight", I8, (2, 3)), Slot("x.weight_scaler", F32, (2,))]
    materialise(plan(slots), {"x.weight": CODES, "x.weight_scaler": SCALES}, tmp_path)
    opened = combine(torch_pickle.open_source(tmp_path))
    assert opened.tensors["x.weight"].read().tolist() == [[-64, 63.5, 0], [3, -3, 15]]
    opened.close()


@given(st.integers(1, 40), st.integers(1, 67), st.integers(0, 99))
def test_pack_and_open_are_inverses(out: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Grid(out, columns, 8, columns, True)
    codes = rng.integers(0, 256, (out, columns)).astype(np.uint8)
    scales = rng.uniform(-0.1, 0.1, (out, 1)).astype(BF16).astype(F32)
    arrays = TORCH_INT8.pack(grid, codes, scales, None)
    assert {s: (a.dtype, a.shape) for s, a in arrays.items()} == TORCH_INT8.layout(grid)
    read = combine(source(**{"x" + s.replace(".", "__"): a for s, a in arrays.items()}))
    weight = read.tensors["x.weight"]
    assert np.array_equal(weight.read(), (codes.astype(F32) - 128) * scales)
    packed = weight.quantized
    assert isinstance(packed, torch_int8.TorchInt8Weight)
    assert np.array_equal(packed.codes.read().astype(np.int16) + 128, codes)
