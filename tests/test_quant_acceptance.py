"""From the command to the consumer: what g2quant writes re-opens within its bounds, and the programs people run compute it.

A few combinations run always; all methods, bits and formats with `-m slow`, llama.cpp's with `-m llama`, MLX's with
`-m mlx`. Quality is not the point here, so calibration is short.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from verify_cases import probe

from g2kit.convert import fingerprint, open_checkpoint
from g2kit.formats import safetensors
from g2kit.model import canonical
from g2kit.model.sample import heldout_text, sample_dir
from g2kit.quant.choose import METHODS
from g2kit.quant.cli import FORMATS, g2quant
from g2kit.quant.ggml import FORMATS as BLOCK_TYPES
from g2kit.quant.ggml import Blocks, block_format
from g2kit.terminal import run_cli
from g2kit.verify.compare import compare, compare_weights
from g2kit.verify.floor import measure_floor
from g2kit.verify.runners.torch_runner import TorchRunner

Array = np.ndarray[Any, np.dtype[Any]]
MIXES = [f for f in FORMATS if f.startswith("gguf-")]


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ids of held-out text, as a stream."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(sample_dir() / "tokenizer.model"))
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.array(sp.encode(heldout_text())[: 6 * 47], np.int32))
    return file


def quantized(dst: Path, ids: Path, format: str, *options: str) -> Path:
    """The sample, by the command."""
    args = [str(sample_dir()), str(dst), "--format", format, "--calibration", str(ids), "-q"]
    assert run_cli(g2quant, [*args, "--samples", "5", "--seq-len", "48", *options]) == 0
    return dst


def passes(report: dict[str, Any], *claims: str) -> None:
    """The claims are made, and hold."""
    found = {c["id"]: (c["verdict"], c["sentence"]) for c in report["claims"]}
    for name in claims:
        assert found[name][0] == "PASS", (name, found[name])


def served(path: Path, consumer: str) -> None:
    """W2, C0, and Q2: what the consumer computes is what the weights say, within the noise of its arithmetic."""
    passes(compare(sample_dir(), path, profile="smoke", cand_runner=consumer), "W2", "C0", "Q2")


def rows(name: str) -> list[str]:
    """Options of a scheme such as ``4 g128 asym``."""
    bits, groups, *asym = name.split()
    size = "-1" if groups == "row" else groups.removeprefix("g")
    return ["--bits", bits, "--group-size", size, *(["--asym"] if asym else [])]


# ---------------------------------------------------------------- independent readers, from the formats' descriptions


def stream(words: Array, bits: int, count: int) -> Array:
    """Codes of rows of little-endian words: code i is at bit ``i * bits``."""
    data = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    every = np.unpackbits(data, axis=1, bitorder="little")[:, : bits * count]
    return every.reshape(len(words), count, bits) @ (1 << np.arange(bits))


def by_gptq(t: dict[str, Array], shape: tuple[int, int], bits: int) -> Array:
    """GPTQ version 1: rows of qweight pack inputs, columns of qzeros pack outputs, zeros are stored less one."""
    n, k = shape
    codes = stream(t["qweight"].T, bits, k)
    zeros = stream(t["qzeros"], bits, n) + 1
    group = t["g_idx"]
    return (codes - zeros.T[:, group]) * t["scales"].astype(np.float64).T[:, group]


def by_awq(t: dict[str, Array], shape: tuple[int, int], bits: int) -> Array:
    """AWQ gemm: nibble i of a word is output ``[0, 2, 4, 6, 1, 3, 5, 7][i]`` of its eight."""
    n, k = shape

    def lanes(words: Array) -> Array:
        out = np.zeros((len(words), n), np.int64)
        for c in range(n // 8):
            for i, at in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                out[:, 8 * c + at] = words[:, c].astype(np.int64) >> 4 * i & 15
        return out

    size = k // len(t["scales"])
    zeros, scales = (
        x.repeat(size, 0) for x in (lanes(t["qzeros"]), t["scales"].astype(np.float64))
    )
    return ((lanes(t["qweight"]) - zeros) * scales).T


def by_mlx(t: dict[str, Array], shape: tuple[int, int], bits: int) -> Array:
    """MLX affine: ``scale * code + bias``."""
    codes = stream(t["weight"], bits, shape[1])
    size = shape[1] // t["scales"].shape[1]
    scales, biases = (t[p].astype(np.float64).repeat(size, 1) for p in ("scales", "biases"))
    return codes * scales + biases


def by_compressed_tensors(t: dict[str, Array], shape: tuple[int, int], bits: int) -> Array:
    """pack-quantized: codes plus ``2^(bits-1)`` along inputs, zero points likewise along outputs."""
    n, k = shape
    assert t["weight_shape"].tolist() == [n, k]
    scales = t["weight_scale"].astype(np.float64)
    size = k // scales.shape[1]
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in t:
        zeros = stream(t["weight_zero_point"].T, bits, n).T
    return (stream(t["weight_packed"], bits, k) - zeros.repeat(size, 1)) * scales.repeat(size, 1)


READERS = {
    "compressed-tensors": by_compressed_tensors, "gptq": by_gptq, "awq": by_awq, "mlx": by_mlx,
}  # fmt: skip


def decodes(path: Path, format: str, bits: int) -> None:
    """Every weight read from the raw tensors by its description is the weight that g2kit reads."""
    raw = safetensors.open_source(path)
    with open_checkpoint(path) as opened:
        names = canonical.linears(opened.tensors)
        assert set(opened.quantized) == set(names)
        for name in names:
            prefix = name.removesuffix("weight")
            parts = {
                n.removeprefix(prefix): t.read()
                for n, t in raw.tensors.items()
                if n.startswith(prefix)
            }
            want = READERS[format](parts, opened.tensors[name].shape, bits)
            # products of a code and a bfloat16 scale are exact in float32, MLX's sums of two in float64
            assert np.array_equal(opened.tensors[name].read(), want.astype(np.float32)), name
    raw.close()


def decodes_gguf(path: Path) -> None:
    """gguf's decoder, ours and the opened checkpoint agree on every bit of every tensor in blocks."""
    blocks = 0
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as opened:
        by_source = {t.source.name: t for t in opened.tensors.values()}
        for tensor in reader.tensors:
            kind = gguf.GGMLQuantizationType(tensor.tensor_type)
            if kind.name in ("F32", "F16", "BF16"):
                continue
            blocks += 1
            theirs = gguf.quants.dequantize(tensor.data, kind)
            data = torch.from_numpy(np.array(tensor.data))
            ours = Blocks(block_format(kind.name), data).dequantize().numpy()
            assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)), tensor.name
            assert np.array_equal(by_source[tensor.name].read(), theirs), tensor.name
    assert blocks == 29  # 28 linears and the embedding


# ---------------------------------------------------------------- a few, always


def test_three_bits_as_gptq_describes_them(ids: Path, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", ids, "gptq", *rows("3 g32 asym"), "--method", "rtn")
    passes(compare_weights(sample_dir(), path), "W2", "C0")
    decodes(path, "gptq", 3)


def test_a_mix_of_k_quants_as_gguf_decodes_it(ids: Path, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q.gguf", ids, "gguf-q4_k_m", "--method", "rtn")
    passes(compare_weights(sample_dir(), path), "W2", "C0")
    decodes_gguf(path)


# ---------------------------------------------------------------- all of them

# scheme -> formats that hold it
UNIFORM = {
    "8 row": ("compressed-tensors", "gptq"),
    "8 g32": ("compressed-tensors", "gptq", "mlx", "gguf-q8_0"),
    "4 g128": ("compressed-tensors", "gptq", "awq", "mlx"),
    "4 g32": ("compressed-tensors", "gptq", "awq", "mlx", "gguf-q4_0"),
    "4 row asym": ("compressed-tensors", "awq"),
    "4 g64 asym": ("compressed-tensors", "gptq", "awq", "mlx"),
    "3 g128": ("compressed-tensors", "gptq", "mlx"),
    "3 g64 asym": ("compressed-tensors", "gptq", "mlx"),
    "2 g32": ("compressed-tensors", "gptq", "mlx"),
}
TYPES = [f"gguf-{name.lower()}" for name in BLOCK_TYPES]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("scheme", UNIFORM)
def test_uniform_formats(scheme: str, method: str, ids: Path, tmp_path: Path) -> None:
    """Quantized once; the other formats get the same codes, which `g2quant export` does not round again."""
    codes, first = tmp_path / "codes", tmp_path / "compressed-tensors"
    options = [*rows(scheme), "--method", method, "--keep-codes", str(codes)]
    quantized(first, ids, "compressed-tensors", *options)
    prints = set()
    for format in UNIFORM[scheme]:
        path = tmp_path / (f"{format}.gguf" if format.startswith("gguf") else format)
        args = ["export", str(codes), str(path), "--source", str(sample_dir())]
        assert path == first or run_cli(g2quant, [*args, "--format", format, "-q"]) == 0
        passes(compare_weights(sample_dir(), path), "W2", "C0")
        if format.startswith("gguf"):
            decodes_gguf(path)
        else:
            decodes(path, format, int(scheme[0]))
            prints.add(fingerprint(path))
    assert len(prints) == 1
    if "asym" not in scheme:  # transformers loads asymmetric weights only dequantized
        served(first, "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gptq", "awq", "mlx"])
def test_exported_is_what_is_written_directly(format: str, ids: Path, tmp_path: Path) -> None:
    first = ["--method", "rtn", "--keep-codes", str(tmp_path / "codes")]
    quantized(tmp_path / "first", ids, "compressed-tensors", *first)
    direct = quantized(tmp_path / "direct", ids, format, "--method", "rtn")
    args = ["export", str(tmp_path / "codes"), str(tmp_path / "out"), "--source", str(sample_dir())]
    assert run_cli(g2quant, [*args, "--format", format, "-q"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (direct / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
@every_method
def test_int_quantized_in_transformers(method: str, ids: Path, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q", ids, "int-quantized", *rows("8 row"), "--method", method)
    served(path, "transformers")


def official_int8(file: Path) -> dict[str, torch.Tensor]:
    """gemma_pytorch's int8 weights as it multiplies them, under Hugging Face's names.

    Its Linear computes ``x @ (weight * weight_scaler[:, None]).T``, its Embedding likewise; qkv_proj is Q over K over V.
    """
    state = torch.load(file, weights_only=True)["model_state_dict"]
    dense = {}
    for name, w in state.items():
        if name.endswith("weight_scaler"):
            continue
        scaler = state.get(f"{name}_scaler")
        dense[name] = w.float() if scaler is None else w.float() * scaler.float()[:, None] + 0.0
    out = {}
    for name, w in dense.items():
        if name.endswith("qkv_proj.weight"):
            parts = torch.split(w, [512, 256, 256])
            for part, x in zip("qkv", parts, strict=True):
                out[name.replace("qkv_proj", f"{part}_proj")] = x.clone()
        elif name == "embedder.weight":
            out[canonical.EMBED] = w
        elif name != "freqs_cis":
            out[name] = w
    return out


def check_int8(method: str, ids: Path, tmp_path: Path) -> None:
    """The official layout's arithmetic in another program gives the logits of what g2kit opens."""
    transformers = pytest.importorskip("transformers")
    path = quantized(tmp_path / "q.ckpt", ids, "torch-int8", *rows("8 row"), "--method", method)
    passes(compare_weights(sample_dir(), path), "W2", "C0")
    config = transformers.AutoConfig.from_pretrained(sample_dir())
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = official_int8(path)
    model.load_state_dict(weights | {"lm_head.weight": weights[canonical.EMBED]})
    model.save_pretrained(tmp_path / "hf")
    report = compare(path, tmp_path / "hf", profile="smoke", cand_runner="transformers")
    passes(report, "W1")
    limits = {e["metric"]: e for c in report["claims"] if c["id"] == "L1" for e in c["evidence"]}
    largest = limits["KL, maximum"]
    assert largest["value"] <= largest["threshold"], largest


@pytest.mark.slow
@every_method
def test_gemma_pytorchs_int8(method: str, ids: Path, tmp_path: Path) -> None:
    check_int8(method, ids, tmp_path)


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("format", TYPES)
def test_gguf_types(format: str, method: str, ids: Path, tmp_path: Path) -> None:
    path = quantized(tmp_path / "q.gguf", ids, format, "--method", method)
    passes(compare_weights(sample_dir(), path), "W2", "C0")
    decodes_gguf(path)


@pytest.mark.llama
@every_method
@pytest.mark.parametrize("format", TYPES)
def test_gguf_types_in_llama_cpp(format: str, method: str, ids: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    served(quantized(tmp_path / "q.gguf", ids, format, "--method", method), "llama_cpp")


@pytest.mark.llama
@pytest.mark.parametrize("mix", sorted(set(MIXES) - set(TYPES)))
def test_gguf_mixes_in_llama_cpp(mix: str, ids: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = quantized(tmp_path / "q.gguf", ids, mix, "--method", "rtn")
    decodes_gguf(path)
    served(path, "llama_cpp")


# ---------------------------------------------------------------- MLX

MLX = [scheme for scheme, formats in UNIFORM.items() if "mlx" in formats]


@pytest.mark.mlx
@pytest.mark.parametrize("scheme", MLX)
def test_mlx_dequantizes_the_same(scheme: str, ids: Path, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    path = quantized(tmp_path / "q", ids, "mlx", *rows(scheme), "--method", "rtn")
    arrays = mx.load(str(path / "model.safetensors"))
    settings = json.loads((path / "config.json").read_text())["quantization"]
    with open_checkpoint(path) as opened:
        for name in canonical.linears(opened.tensors):
            prefix = name.removesuffix("weight")
            parts = [arrays[prefix + p] for p in ("weight", "scales", "biases")]
            wide = [parts[0], *(p.astype(mx.float32) for p in parts[1:])]
            got = mx.dequantize(*wide, group_size=settings["group_size"], bits=settings["bits"])
            want = opened.tensors[name].read()
            # it adds the bias to a rounded product, or fuses the two
            assert np.allclose(np.array(got), want, rtol=0, atol=2.0**-22 * np.abs(want).max())


@pytest.mark.mlx
@every_method
@pytest.mark.parametrize("scheme", MLX)
def test_mlx_lm_computes_the_dequantized_weights(
    scheme: str, method: str, ids: Path, tmp_path: Path
) -> None:
    """Inside the sliding window, which mlx-lm does not have; scales widened, so that it computes in float32."""
    mx, loader = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    path = quantized(tmp_path / "q", ids, "mlx", *rows(scheme), "--method", method)
    passes(compare_weights(sample_dir(), path), "W2", "C0")
    tokens = np.concatenate([[2], np.load(ids)[:62]]).astype(np.int64)
    model, _ = loader.load_model(path)
    model.set_dtype(mx.float32)
    theirs = torch.from_numpy(np.array(model(mx.array(tokens[None]))[0].astype(mx.float32)))
    with open_checkpoint(path) as opened, TorchRunner(opened) as runner:
        runner.start(tokens)
        ours = torch.from_numpy(np.concatenate([t for *_, t in logits_of(runner)], -1)[0])
        found = [probe("P2/0", tokens)]
        limit = measure_floor(opened, found).threshold("kl_max")
    p, q = (torch.log_softmax(x.double(), -1) for x in (ours, theirs))
    assert float((p.exp() * (p - q)).sum(-1).max()) <= limit


def logits_of(runner: TorchRunner) -> Iterator[tuple[int, int, Array]]:
    runner.finish()
    return runner.logit_tiles()
