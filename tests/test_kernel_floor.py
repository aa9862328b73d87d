"""llama.cpp's rounding of inputs, imitated: against ggml's own quantizer, and against llama.cpp where it is installed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from configs import small
from memory import checkpoint, random_weights

from g2kit.convert import convert
from g2kit.convert.open import LazyTensor
from g2kit.formats.base import QuantizedWeight
from g2kit.formats.dtypes import BF16, F16, F32
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.verify.compare import compare
from g2kit.verify.kernel_floor import KernelRunner, input_rounding, is_exact, kernel_estimate
from g2kit.verify.probes import build_probes
from g2kit.verify.runners.torch_runner import TorchRunner

CONFIG = small("gemma2-2b", layers=4)
Q0 = canonical.Q.format(i=0)


class Blocks(QuantizedWeight):
    """A packed weight that only says how long its blocks are."""

    kind, bits = "test", 8.5

    def __init__(self, weights: int) -> None:
        self.block = type("Block", (), {"weights": weights})

    def dequantize(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("not needed")


def tensor(dtype: np.dtype, packed: int | None = None) -> LazyTensor:
    made = checkpoint(CONFIG, random_weights(CONFIG, 1, dtype)).tensors[Q0]
    made.source.quantized = None if packed is None else Blocks(packed)
    return made


@pytest.fixture
def x() -> np.ndarray:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 512)).astype(np.float32) * 10.0 ** rng.integers(
        -3, 3, (3, 512)
    )
    values[1, 32:64] = 0
    return values.astype(np.float32)


def test_blocks_of_32_are_ggmls_q8_0(x: np.ndarray) -> None:
    rounding = input_rounding(tensor(F32, 32))
    assert rounding is not None
    kind = gguf.GGMLQuantizationType.Q8_0
    want = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    got = rounding(torch.from_numpy(x)).numpy()
    # ties may go either way
    step = np.abs(x.reshape(3, -1, 32)).max(-1, keepdims=True) / 127
    assert np.abs((got - want).reshape(3, -1, 32)).max() <= (step * 1.01).max()
    assert np.mean(got != want) < 0.01


def test_blocks_of_256_have_one_scale(x: np.ndarray) -> None:
    rounding = input_rounding(tensor(F32, 256))
    assert rounding is not None
    got = rounding(torch.from_numpy(x)).numpy().reshape(3, 2, 256)
    step = np.abs(x.reshape(3, 2, 256)).max(-1, keepdims=True) / 127
    codes = got / step
    assert np.abs(codes - np.round(codes)).max() < 1e-4
    assert np.abs(got - x.reshape(3, 2, 256)).max() <= 0.501 * step.max()


def test_tokens_are_rounded_as_compressed_tensors_rounds_them(x: np.ndarray) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    args = quantization.QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
    )
    value = torch.from_numpy(x)[None]
    scale, zero = helpers.compute_dynamic_scales_and_zp(value, args, torch.nn.Linear(512, 1))
    want = forward.fake_quantize(x=value, scale=scale, zero_point=zero, args=args)
    packed = tensor(F32, 512)
    assert input_rounding(packed, "transformers") is None
    packed.source.quantized.kind = "int-quantized"  # type: ignore[union-attr]
    rounding = input_rounding(packed, "transformers")
    assert rounding is not None
    assert torch.allclose(rounding(value), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_half_weights_take_half_inputs(dtype: np.dtype, torch_dtype: torch.dtype) -> None:
    rounding = input_rounding(tensor(dtype))
    assert rounding is not None
    y = torch.randn(4, 64)
    assert torch.equal(rounding(y), y.to(torch_dtype).float())
    assert input_rounding(tensor(F32)) is None


def test_the_estimate_is_noise_of_this_size() -> None:
    probes = list(build_probes(CONFIG, None, "smoke"))
    half = checkpoint(CONFIG, random_weights(CONFIG, 1))
    wide = checkpoint(CONFIG, {n: w.astype(F32) for n, w in random_weights(CONFIG, 1).items()})
    assert (is_exact(wide), is_exact(half)) == (True, False)
    # only the table of GELU is left where nothing is rounded
    assert 0 < kernel_estimate(wide, probes).kl_mean < kernel_estimate(half, probes).kl_mean


def test_the_head_rounds_too() -> None:
    half = random_weights(CONFIG, 1)
    weights = {n: w if n == canonical.EMBED else w.astype(F32) for n, w in half.items()}
    with (
        TorchRunner(checkpoint(CONFIG, weights)) as one,
        KernelRunner(checkpoint(CONFIG, weights)) as two,
    ):
        for runner in (one, two):
            runner.start([2, 5, 9])
            runner.finish()
        # final hidden states differ by the table of GELU alone, logits by a bfloat16 more
        h = np.abs(one.final_hidden() / two.final_hidden() - 1)
        z = np.abs(next(iter(one.logit_tiles()))[2] - next(iter(two.logit_tiles()))[2])
        assert np.median(z) > 2.0**-10
        assert np.median(h) < 2.0**-8


@pytest.mark.llama
def test_llama_cpp_is_as_far_as_that(tmp_path: Path) -> None:
    convert(sample_dir(), tmp_path / "x.gguf", to="gguf")
    report = compare(sample_dir(), tmp_path / "x.gguf", profile="smoke", cand_runner="llama_cpp")
    found = {c["id"]: c for c in report["claims"]}
    assert found["L2"]["verdict"] == "PASS"
    mean = next(e for e in found["L2"]["evidence"] if e["metric"] == "KL, mean")
    # within the threshold, but no less than a hundredth of it: the floor is that of this very kernel
    assert mean["threshold"] / 100 < mean["value"] < mean["threshold"] / 5
