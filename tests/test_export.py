"""Exports of the bundled sample: every format re-opens to the codes that went in, and real programs compute what we do."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2kit.convert import convert, fingerprint, open_checkpoint
from g2kit.convert.api import check
from g2kit.formats.errors import (
    ConflictError,
    FormatError,
    G2Error,
    LossyError,
    MissingTensorError,
    NonFiniteError,
    NotFoundError,
    ParityError,
    ShapeError,
    UsageError,
)
from g2kit.model import canonical
from g2kit.model.sample import sample_dir
from g2kit.quant import export as export_module
from g2kit.quant.codes_file import CodesFile, CodesWriter, write_codes
from g2kit.quant.export import export, require_format
from g2kit.quant.gptq import rtn
from g2kit.quant.grid import plain_grid, quantize_to
from g2kit.quant.rows import CheckpointCodes, Rows, read_rows
from g2kit.quant.scheme import Codes, Scheme

Q0, DOWN3 = "model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def sample():
    with open_checkpoint(sample_dir()) as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def dense(sample):
    return {
        n: torch.from_numpy(sample.tensors[n].read().astype(np.float32))
        for n in canonical.linears(sample.tensors)
    }


@pytest.fixture(scope="module")
def best(dense):
    """4 bits, groups of 128, symmetric, by the search (scales of both signs)."""
    return {n: rtn(w, Scheme(4, 128)) for n, w in dense.items()}


def plain(weights: dict[str, torch.Tensor], scheme: Scheme) -> dict[str, Codes]:
    """Codes on the textbook grid: fast."""
    out = {}
    for name, w in weights.items():
        scales, zeros = plain_grid(w, scheme)
        if zeros is not None:
            zeros = zeros.clamp(1)  # GPTQ has no 0
        out[name] = Codes(scheme, quantize_to(w, scales, zeros, scheme), scales, zeros)
    return out


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


CASES = (
    ("compressed-tensors", Scheme(4, 128)), ("compressed-tensors", Scheme(8, -1)), ("compressed-tensors", Scheme(3, 32)),
    ("compressed-tensors", Scheme(2, 32, False)), ("int-quantized", Scheme(8, -1)), ("gptq", Scheme(4, 128)),
    ("gptq", Scheme(3, 32, False)), ("gptq", Scheme(8, -1)), ("awq", Scheme(4, 64, False)), ("awq", Scheme(4, -1)),
    ("mlx", Scheme(4, 64)), ("mlx", Scheme(3, 32, False)), ("torch-int8", Scheme(8, -1)),
)  # fmt: skip


@pytest.mark.parametrize(("format", "scheme"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_every_format_holds_the_codes(format, scheme, sample, dense, best, tmp_path):
    codes = best if scheme == Scheme(4, 128) else plain(dense, scheme)
    dst = tmp_path / "out"
    report = export(codes, sample, dst, format)
    embedded = format == "torch-int8"
    assert report["quantized"] == len(codes) + embedded
    assert report["source_fingerprint"] == fingerprint(sample_dir())
    assert report["fingerprint"] == fingerprint(dst)
    assert report["schemes"] == {str(scheme): len(codes) + embedded}
    low, high = scheme.bits, scheme.bits + (3.5 if format == "mlx" else 1.1)
    assert low < report["bits_per_weight"] < high
    assert check(dst)["tensors"] == len(sample.tensors)
    assert (dst / "tokenizer.model").read_bytes() == (sample_dir() / "tokenizer.model").read_bytes()
    with open_checkpoint(dst) as back:
        assert set(back.quantized) == set(codes) | ({canonical.EMBED} if embedded else set())
        for name, c in codes.items():
            rows = back.tensors[name].shape[0]
            assert Rows.of(c, 0, rows).same(read_rows(back.tensors[name], 0, rows)), name
            assert np.array_equal(back.tensors[name].read(), c.dequantize().numpy()), name
        for name in sample.tensors.keys() - set(back.quantized):
            assert np.array_equal(back.tensors[name].read(), sample.tensors[name].read()), name
            assert back.tensors[name].dtype == sample.tensors[name].dtype
        assert canonical.LM_HEAD not in back.source.tensors


def test_same_codes_same_fingerprint_and_same_bytes_again(sample, best, tmp_path):
    """One set of codes is one model, in whatever format; and one command is one set of bytes."""
    prints = {
        f: export(best, sample, tmp_path / f, f)["fingerprint"] for f in ("gptq", "awq", "mlx")
    }
    first = export(best, sample, tmp_path / "a")
    again = export(best, sample, tmp_path / "b")
    assert {*prints.values(), first["fingerprint"]} == {again["fingerprint"]}
    assert first["files"] == again["files"]
    manifests = [(tmp_path / d / "g2kit.manifest.json").read_bytes() for d in "ab"]
    assert manifests[0] == manifests[1]


def test_formats_convert_into_each_other_without_quantizing(sample, dense, tmp_path):
    codes = plain(dense, Scheme(4, 64, False))
    export(codes, sample, tmp_path / "a", "awq")
    way = ("compressed-tensors", "gptq", "mlx", "awq")
    for i, format in enumerate(way):
        with open_checkpoint(tmp_path / ("a" if i == 0 else f"b{i - 1}")) as back:
            export(CheckpointCodes(back), back, tmp_path / f"b{i}", format)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "b3" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("to", ["flax", "gguf", "keras"])
def test_the_source_may_be_of_any_format(to, sample, best, tmp_path):
    """Transposed storage, norms plus one: what is written is what Hugging Face's files give."""
    export(best, sample, tmp_path / "want")
    convert(sample_dir(), tmp_path / to, to=to)
    with open_checkpoint(tmp_path / to) as other:
        report = export(best, other, tmp_path / "got")
    assert report["source_fingerprint"] == fingerprint(sample_dir())
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("got", "want")]
    assert weights[0] == weights[1]


def test_a_quantized_source_needs_a_dtype_for_what_stays_dense(sample, best, dense, tmp_path):
    embedding = torch.from_numpy(sample.tensors[canonical.EMBED].read().astype(np.float32))
    codes = plain(dense | {canonical.EMBED: embedding}, Scheme(8, 64))
    export(codes, sample, tmp_path / "q", "mlx")
    with open_checkpoint(tmp_path / "q") as source:
        with pytest.raises(LossyError, match="1 tensors are quantized"):
            export(best, source, tmp_path / "x")
        export(best, source, tmp_path / "y", dtype="bf16")
    manifest = json.loads((tmp_path / "y" / "g2kit.manifest.json").read_text())
    assert "to bfloat16" in {s["name"] for s in manifest["lossy"]}
    with open_checkpoint(tmp_path / "y") as back:
        want = codes[canonical.EMBED].dequantize().to(torch.bfloat16)
        assert np.array_equal(
            back.tensors[canonical.EMBED].read().astype(np.float32), want.float().numpy()
        )


def test_converting_dequantizes_and_says_so(sample, best, tmp_path):
    export(best, sample, tmp_path / "q", "gptq")
    with pytest.raises(LossyError, match=r"28 tensors are quantized \(gptq int4 g128\)"):
        convert(tmp_path / "q", tmp_path / "x", to="flax")
    report = convert(tmp_path / "q", tmp_path / "flax", to="flax", dtype="f32")
    assert {"step": "dequantize", "tensors": 28, "elements": 3145728, "changed": 0} in report[
        "lossy"
    ]
    with open_checkpoint(tmp_path / "flax") as back:
        assert np.array_equal(back.tensors[Q0].read(), best[Q0].dequantize().numpy())
    report = convert(tmp_path / "q", tmp_path / "hf", to="safetensors", dtype="bf16")
    assert "quantization_config" not in settings_of(tmp_path / "hf")
    assert any("quantization_config (the weights are written unq" in n for n in report["notes"])


# ---------------------------------------------------------------- configuration


def mixed(dense: dict[str, torch.Tensor]) -> dict[str, Codes]:
    """Three schemes, one layer's up_proj left as it is."""
    codes = plain(dense, Scheme(4, 64))
    some = {n: w for n, w in dense.items() if n.endswith("down_proj.weight")}
    codes |= plain(some, Scheme(8, 128)) | plain({Q0: dense[Q0]}, Scheme(3, 32))
    del codes["model.layers.2.mlp.up_proj.weight"]
    return codes


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "mlx"])
def test_mixed_precision(format, sample, dense, tmp_path):
    codes = mixed(dense)
    report = export(codes, sample, tmp_path / "q", format)
    assert report["schemes"] == {"int4 g64 sym": 22, "int8 g128 sym": 4, "int3 g32 sym": 1}
    with open_checkpoint(tmp_path / "q") as back:
        assert set(back.quantized) == set(codes)
        for name, c in codes.items():
            assert np.array_equal(back.tensors[name].read(), c.dequantize().numpy()), name
    config = settings_of(tmp_path / "q")["quantization_config"]
    if format == "mlx":
        assert config["model.layers.3.mlp.down_proj"] == {"bits": 8, "group_size": 128}
        assert config["model.layers.0.self_attn.q_proj"] == {"bits": 3, "group_size": 32}
        assert (config["bits"], config["group_size"], len(config)) == (4, 64, 3 + 5)
    elif format == "gptq":
        dynamic = config["dynamic"]
        assert dynamic[r"+:^model\.layers\.3\.mlp\.down_proj$"]["bits"] == 8
        assert dynamic[r"-:^model\.layers\.2\.mlp\.up_proj$"] == {}
        assert len(dynamic) == 6
        assert json.loads((tmp_path / "q" / "quantize_config.json").read_text()) == config
    else:
        groups = config["config_groups"].values()
        assert sorted(len(g["targets"]) for g in groups) == [1, 4, 22]
        assert config["ignore"] == ["lm_head", "model.layers.2.mlp.up_proj"]
        assert {g["weights"]["num_bits"] for g in groups} == {3, 4, 8}


def test_settings_that_readers_require(sample, dense, best, tmp_path):
    export(best, sample, tmp_path / "g", "gptq")
    config = settings_of(tmp_path / "g")["quantization_config"]
    required = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
    }
    assert config.items() >= (required | {"checkpoint_format": "gptq"}).items()
    assert "dynamic" not in config
    export(plain(dense, Scheme(4, -1, False)), sample, tmp_path / "a", "awq")
    config = settings_of(tmp_path / "a")["quantization_config"]
    assert config == {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm",
                      "modules_to_not_convert": None}  # fmt: skip
    export(plain(dense, Scheme(8, -1)), sample, tmp_path / "i", "int-quantized")
    group = settings_of(tmp_path / "i")["quantization_config"]["config_groups"]["group_0"]
    assert group["weights"]["strategy"] == "channel"
    assert "group_size" not in group["weights"]
    assert group["input_activations"]["strategy"] == "token"
    export(best, sample, tmp_path / "m", "mlx")
    config = settings_of(tmp_path / "m")
    assert config["quantization"] == {"bits": 4, "group_size": 128, "mode": "affine"}
    with open_checkpoint(tmp_path / "m") as back:
        assert back.source.metadata == {"format": "mlx"}


# ---------------------------------------------------------------- what is refused


def test_what_a_format_cannot_hold(sample, dense, best, tmp_path):
    for format, codes, words, able in (
        ("awq", plain({Q0: dense[Q0]}, Scheme(3, 32)), "4 bits only", "compressed-tensors or gptq or mlx"),
        ("mlx", plain({Q0: dense[Q0]}, Scheme(4, -1)), "groups are 32, 64, 128", "compressed-tensors or gptq or awq"),
        ("torch-int8", plain({Q0: dense[Q0]}, Scheme(8, -1)), "27 are not", "compressed-tensors"),
        ("int-quantized", best, "8 bits only", "compressed-tensors or gptq or awq or mlx"),
        ("gguf-q9", best, "not a format this export writes", "compressed-tensors, int-quantized, gptq"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as e:
            export(codes, sample, tmp_path / "q", format)
        assert words in str(e.value)
        assert able in e.value.fix
        assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="awq has one group size for all modules, found 32, 128"):
        export(best | plain({Q0: dense[Q0]}, Scheme(4, 32)), sample, tmp_path / "q", "awq")
    grids = require_format("gptq", {Q0: Scheme(4, 128)}, sample)
    assert grids[Q0].groups == 2
    with pytest.raises(UsageError, match=r"group size -1"):
        require_format("torch-int8", {Q0: Scheme(8, 32)}, sample)


def test_bad_codes(sample, best, dense, tmp_path):
    dst = tmp_path / "q"
    one = best[Q0]
    with pytest.raises(UsageError, match="1 names are no tensors of this model: nobody"):
        export({"nobody": one}, sample, dst)
    with pytest.raises(UsageError, match="nothing is quantized"):
        export({}, sample, dst)
    with pytest.raises(ShapeError, match=r"it is \[512, 256\], the checkpoint's \[256, 512\]"):
        export({DOWN3: one}, sample, dst)
    with pytest.raises(UsageError, match="code or zero 16 in int4 g128 sym"):
        export({Q0: replace(one, codes=one.codes.clone().fill_(16))}, sample, dst)
    with pytest.raises(UsageError, match="1024 of 1024 scales are zero or not finite"):
        export({Q0: replace(one, scales=one.scales * 0)}, sample, dst)
    with pytest.raises(LossyError, match="scales are not exact in bf16") as e:
        export({Q0: replace(one, scales=one.scales + 1e-4)}, sample, dst)
    assert e.value.tensor == Q0
    with pytest.raises(UsageError, match="want the embedding unquantized"):
        export_embedding(sample, dst)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        export({**best, canonical.FINAL_NORM: torch.full((256,), torch.nan)}, sample, dst)
    with pytest.raises(UsageError, match="name a directory"):
        export(best, sample, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def export_embedding(sample, dst):
    embedding = torch.from_numpy(sample.tensors[canonical.EMBED].read().astype(np.float32))
    export(plain({canonical.EMBED: embedding}, Scheme(8, -1)), sample, dst, "gptq")


def test_an_export_that_reads_back_differently_is_not_put_in_place(
    sample, best, tmp_path, monkeypatch
):
    pack = export_module.FORMATS["gptq"].pack

    def faulty(grid, codes, scales, zeros):
        arrays = pack(grid, codes, scales, zeros)
        arrays[".qweight"][0, 0] ^= 1 << 8
        return arrays

    bad = replace(export_module.FORMATS["gptq"], pack=faulty)
    monkeypatch.setitem(export_module.FORMATS, "gptq", bad)
    with pytest.raises(ParityError, match="28 of 46 tensors read back differently"):
        export(best, sample, tmp_path / "q", "gptq")
    assert not list(tmp_path.iterdir())


def test_destination_rules(sample, best, tmp_path):
    export(best, sample, tmp_path / "q")
    with pytest.raises(ConflictError):
        export(best, sample, tmp_path / "q")
    export(best, sample, tmp_path / "q", "gptq", overwrite=True)
    assert settings_of(tmp_path / "q")["quantization_config"]["quant_method"] == "gptq"


def test_tuned_norms_and_quantized_embeddings(sample, best, tmp_path):
    gain = torch.linspace(-1, 1, 256).to(torch.bfloat16)
    embedding = torch.from_numpy(sample.tensors[canonical.EMBED].read().astype(np.float32))
    codes = best | plain({canonical.EMBED: embedding}, Scheme(8, 64))
    report = export(
        {**codes, canonical.FINAL_NORM: gain}, sample, tmp_path / "q", "mlx", max_shard_size=1 << 20
    )
    assert len(report["files"]) > 4
    with open_checkpoint(tmp_path / "q") as back:
        assert np.array_equal(
            back.tensors[canonical.FINAL_NORM].read().astype(np.float32), gain.float().numpy()
        )
        assert np.array_equal(
            back.tensors[canonical.EMBED].read(), codes[canonical.EMBED].dequantize().numpy()
        )
    manifest = json.loads((tmp_path / "q" / "g2kit.manifest.json").read_text())
    assert {s["name"]: sum(s["counts"].values()) for s in manifest["lossy"]}["tune"] == 256
    assert manifest["source_fingerprint"] == fingerprint(sample_dir())
    rounded = export({**best, canonical.FINAL_NORM: gain.float() + 1e-4}, sample, tmp_path / "r")
    assert "model.norm.weight is rounded to bfloat16" in rounded["notes"]


# ---------------------------------------------------------------- reading what is damaged


def test_a_checkpoint_without_its_parts(sample, best, tmp_path):
    export(best, sample, tmp_path / "q", "gptq")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    quantization = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="no quantization_config says how"):
        open_checkpoint(tmp_path / "q")
    path.write_text(
        json.dumps(config | {"quantization_config": quantization | {"quant_method": "vptq"}})
    )
    with pytest.raises(
        FormatError, match="quantized by vptq; known are compressed-tensors, gptq, awq, mlx"
    ):
        open_checkpoint(tmp_path / "q")
    path.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    )
    with pytest.raises(G2Error, match="do not fit each other"):
        open_checkpoint(tmp_path / "q")


def test_only_quantized_checkpoints_have_codes(sample):
    with pytest.raises(UsageError, match="nothing in this checkpoint is quantized"):
        CheckpointCodes(sample)


# ---------------------------------------------------------------- the codes file


def test_codes_file(sample, dense, tmp_path):
    codes = mixed(dense) | plain({DOWN3: dense[DOWN3]}, Scheme(2, 128, False))
    everything = {**codes, canonical.FINAL_NORM: torch.linspace(0, 1, 256)}
    write_codes(tmp_path / "c", everything, sample, source_fingerprint=fingerprint(sample_dir()))
    with CodesFile(tmp_path / "c") as read:
        assert set(read) == set(everything)
        assert len(read) == len(everything)
        for name, want in codes.items():
            got = read[name]
            assert read.scheme_of(name) == got.scheme == want.scheme
            assert torch.equal(got.codes, want.codes)
            assert torch.equal(got.scales, want.scales)
            assert (got.zeros is None) == (want.zeros is None)
            assert got.zeros is None or torch.equal(got.zeros, want.zeros)
        assert torch.equal(read[canonical.FINAL_NORM], everything[canonical.FINAL_NORM])
        a = export(read, sample, tmp_path / "a")
    b = export(everything, sample, tmp_path / "b")
    assert a["files"] == b["files"]


def test_codes_are_no_checkpoint(sample, best, tmp_path):
    write_codes(tmp_path / "c", best, sample)
    with pytest.raises(G2Error, match="g2quant export"):
        open_checkpoint(tmp_path / "c")


def test_codes_of_other_weights_are_not_exported(sample, best, tmp_path):
    write_codes(tmp_path / "c", best, sample, source_fingerprint="g2:sha256:" + "1" * 64)
    with (
        CodesFile(tmp_path / "c") as read,
        pytest.raises(ConflictError, match="made from other weights"),
    ):
        export(read, sample, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_codes_are_continued_after_an_interruption(sample, best, tmp_path):
    schemes = {n: c.scheme for n, c in best.items()}
    identity = {"--bits": "4"}

    def interrupted() -> None:
        with CodesWriter(tmp_path / "c", schemes, sample, identity=identity) as w:
            w.add(Q0, best[Q0], {"method": "rtn"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "c").exists()
    with (
        pytest.raises(G2Error, match="--bits"),
        CodesWriter(tmp_path / "c", schemes, sample, identity={"--bits": "3"}),
    ):
        pass
    with CodesWriter(tmp_path / "c", schemes, sample, identity=identity) as w:
        assert w.done == {Q0}
        assert w.record(Q0) == {"method": "rtn"}
        for name in best.keys() - w.done:
            w.add(name, best[name])
        w.finish()
    write_codes(tmp_path / "d", best, sample)
    assert (tmp_path / "c" / "codes.safetensors").read_bytes() == (
        tmp_path / "d" / "codes.safetensors"
    ).read_bytes()


def test_bad_codes_directories(sample, best, tmp_path):
    with pytest.raises(NotFoundError, match=r"no g2kit\.codes\.json here"):
        CodesFile(tmp_path)
    write_codes(tmp_path / "c", {Q0: best[Q0]}, sample)
    path = tmp_path / "c" / "g2kit.codes.json"
    document = json.loads(path.read_text())
    entry = document["tensors"][Q0]
    for change, error, words in (
        ({"version": 2}, FormatError, "not codes of version 1"),
        ({"tensors": {}}, FormatError, "lists no tensors"),
        ({"tensors": {Q0: entry | {"bits": 5}}}, FormatError, "are no scheme"),
        ({"tensors": {Q0: entry | {"shape": [-1, 2]}}}, FormatError, "not a list of sizes"),
        ({"tensors": {Q0: entry | {"bits": 8}}}, ShapeError, "of another type or shape"),
        ({"tensors": {Q0: entry | {"symmetric": False}}}, FormatError, f"{Q0}.zeros"),
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(error, match=words.replace(".", r"\.")):
            CodesFile(tmp_path / "c")
    with (
        CodesWriter(tmp_path / "e", {Q0: Scheme(4, 128)}, sample) as w,
        pytest.raises(UsageError, match="announced as int4 g128 sym, got floats"),
    ):
        w.add(Q0, best[Q0].dequantize())


# ---------------------------------------------------------------- real programs


@pytest.fixture
def transformers(monkeypatch):
    pytest.importorskip("compressed_tensors")
    monkeypatch.setitem(os.environ, "TRANSFORMERS_VERBOSITY", "error")
    library = pytest.importorskip("transformers")
    library.utils.logging.disable_progress_bar()
    return library


def consumer_and_reference(library, path: Path, dtype: torch.dtype, **options: Any):
    """Logits of transformers with compressed-tensors, and of transformers on our dequantized weights."""
    load = library.AutoModelForCausalLM
    consumer = load.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", **options
    ).eval()
    config = library.AutoConfig.from_pretrained(sample_dir())
    plain_model = load.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    with open_checkpoint(path) as c:
        weights = {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in c.tensors.items()}
    weights["lm_head.weight"] = weights[canonical.EMBED]
    plain_model.load_state_dict({n: w.to(dtype) for n, w in weights.items()})
    ids = torch.randint(3, 3000, (2, 80), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    with torch.no_grad():
        return consumer(ids).logits.float(), plain_model(ids).logits.float(), consumer, weights


@pytest.mark.parametrize(
    ("scheme", "dequantize"),
    [(Scheme(4, 128), False), (Scheme(8, -1), False), (Scheme(3, 32), False), (Scheme(2, 64), False),
     (Scheme(4, 32, False), True)],
    ids=str,
)  # fmt: skip
def test_transformers_computes_the_dequantized_weights(
    transformers, scheme, dequantize, sample, dense, best, tmp_path
):
    codes = best if scheme == Scheme(4, 128) else plain(dense, scheme)
    export(codes, sample, tmp_path / "q")
    options = {}
    if dequantize:  # what the export's note says of asymmetric weights
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    got, want, _, _ = consumer_and_reference(
        transformers, tmp_path / "q", torch.bfloat16, **options
    )
    assert torch.equal(got, want)  # the same bfloat16 weights, so the same arithmetic


def test_transformers_with_mixed_precision(transformers, sample, dense, tmp_path):
    export(mixed(dense), sample, tmp_path / "q")
    got, want, _, _ = consumer_and_reference(transformers, tmp_path / "q", torch.bfloat16)
    assert torch.equal(got, want)


def test_transformers_in_float32(transformers, sample, best, tmp_path):
    export(best, sample, tmp_path / "q")
    got, want, consumer, weights = consumer_and_reference(
        transformers, tmp_path / "q", torch.float32
    )
    # compressed-tensors multiplies in the scales' type, so its weights are ours rounded to bfloat16 at worst
    for name in (Q0, DOWN3):
        module = consumer.get_submodule(name.removesuffix(".weight"))
        assert torch.allclose(module.weight, weights[name], rtol=2**-8, atol=0)
    assert float((got - want).square().mean().sqrt()) < 0.005 * float(want.std())


def test_transformers_reads_int_quantized(transformers, sample, dense, tmp_path):
    export(plain(dense, Scheme(8, -1)), sample, tmp_path / "q", "int-quantized")
    got, want, consumer, weights = consumer_and_reference(
        transformers, tmp_path / "q", torch.bfloat16
    )
    for name in (Q0, DOWN3):
        module = consumer.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight.float(), weights[name].to(torch.bfloat16).float())
    # it rounds the inputs of every layer to 8 bits as well
    assert float((got - want).square().mean().sqrt()) < 0.03 * float(want.std())
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.95


def test_missing_parts_of_an_int8_checkpoint(sample, dense, tmp_path):
    """gemma_pytorch loads with strict=False, so what it would not notice must be found here."""
    report = export(plain(dense, Scheme(8, -1)), sample, tmp_path / "q.ckpt", "torch-int8")
    assert list(report["files"]) == ["q.ckpt"]
    state = torch.load(tmp_path / "q.ckpt", weights_only=True)["model_state_dict"]
    assert state["model.layers.0.self_attn.qkv_proj.weight"].dtype == torch.int8
    assert state["embedder.weight_scaler"].shape == (3072,)
    w = (
        state["model.layers.1.mlp.up_proj.weight"]
        * state["model.layers.1.mlp.up_proj.weight_scaler"][:, None]
    )
    with open_checkpoint(tmp_path / "q.ckpt", config=sample.config) as back:
        got = torch.from_numpy(back.tensors["model.layers.1.mlp.up_proj.weight"].read())
    assert torch.equal(w, got)
    del state["model.layers.1.mlp.up_proj.weight_scaler"]
    torch.save({"model_state_dict": state}, tmp_path / "r.ckpt")
    with pytest.raises(MissingTensorError, match="have no scaler"):
        open_checkpoint(tmp_path / "r.ckpt", config=sample.config)
