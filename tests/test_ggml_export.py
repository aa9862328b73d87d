"""Mixes against llama-quantize's rules, importance matrices, and GGUF files written and read back."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert import open_checkpoint
from g2kit.convert.open import Checkpoint
from g2kit.formats import gguf as container
from g2kit.formats.base import Slot
from g2kit.formats.dtypes import F32
from g2kit.formats.errors import (
    ConflictError,
    FormatError,
    G2Error,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from g2kit.formats.packed.ggml_blocks import GgmlBlocks
from g2kit.model import canonical
from g2kit.model.config import PRESETS
from g2kit.model.sample import sample_dir
from g2kit.quant.ggml import FORMATS, Blocks, Fields, block_format, encode, imatrix, layout
from g2kit.quant.ggml.export import export_gguf, require_mix
from g2kit.quant.ggml.mixes import MIXES, mix_of, tensor_types

V, DOWN, OUT = canonical.V, canonical.DOWN, canonical.O


@pytest.fixture(scope="module")
def sample() -> Checkpoint:
    return open_checkpoint(sample_dir())


def made(name: str, shape: tuple[int, int], seed: int) -> Blocks:
    """Random blocks whose scales are weights' usual ones; quicker than encoding."""
    f = block_format(name)
    rng = torch.Generator().manual_seed(seed)
    d = torch.full((shape[0], shape[1] // f.weights), 2.0**-12 if f.scale_range else 2.0**-7)
    subs = (shape[0], shape[1] // f.sub)
    sc = torch.randint(1, 32, subs, generator=rng, dtype=torch.int16) if f.scale_range else None
    m = sc if f.offset == "integer" else None
    codes = torch.randint(
        f.low - f.first if f.table is None else 0, len(f.levels), shape, generator=rng
    )
    dmin = d * 4 if f.offset else None
    return Blocks(f, layout.pack(Fields(f, codes.to(torch.uint8), d, sc, dmin, m)))


def blocks_for(checkpoint: Checkpoint, mix: str) -> dict[str, Blocks]:
    return {
        n: made(t, checkpoint.tensors[n].shape, i)
        for i, (n, t) in enumerate(require_mix(mix, checkpoint).items())
        if n != canonical.EMBED
    }


def encoded(checkpoint: Checkpoint, mix: str) -> dict[str, Blocks]:
    return {
        n: encode(torch.from_numpy(checkpoint.tensors[n].read().astype(np.float32)), t)
        for n, t in require_mix(mix, checkpoint).items()
        if n != canonical.EMBED
    }


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    return {n: t.shape for n, t in canonical.tensors(PRESETS[preset].config).items()}


# ---------------------------------------------------------------- mixes


def layers_with(types: dict[str, str], template: str, kind: str) -> list[int]:
    return [i for i in range(100) if types.get(template.format(i=i)) == kind]


def test_q4_k_m_of_26_layers_is_llama_quantizes() -> None:
    types = tensor_types(mix_of("gguf-Q4_K_M"), shapes("gemma2-2b"))
    more = [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]
    assert layers_with(types, V, "Q6_K") == more
    assert layers_with(types, DOWN, "Q6_K") == more
    assert types[canonical.EMBED] == "Q6_K"
    assert Counter(types.values()) == {"Q4_K": 26 * 7 - 26, "Q6_K": 27}


@pytest.mark.parametrize(
    ("mix", "template", "kind", "layers"),
    [
        ("q4_k_s", V, "Q5_K", [0, 1, 2, 3]),
        ("q4_k_s", DOWN, "Q5_K", [0, 1, 2]),
        ("q3_k_m", V, "Q5_K", [0, 1]),
        ("q3_k_m", DOWN, "Q5_K", [0]),
        ("q3_k_m", OUT, "Q4_K", list(range(26))),
        ("q3_k_l", DOWN, "Q5_K", list(range(26))),
        ("q3_k_s", V, "Q3_K", list(range(26))),
        ("q5_k_m", V, "Q6_K", [0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25]),
        ("iq4_xs", V, "IQ4_XS", list(range(26))),
    ],
)
def test_mixes_are_llama_quantizes(mix: str, template: str, kind: str, layers: list[int]) -> None:
    assert layers_with(tensor_types(MIXES[mix], shapes("gemma2-2b")), template, kind) == layers


def test_shared_value_heads_get_more_bits_in_iq4_xs() -> None:
    types = tensor_types(MIXES["iq4_xs"], shapes("gemma2-2b"), heads_per_kv=8)
    assert layers_with(types, V, "Q5_K") == list(range(26))


def test_file_types_are_llama_cpps() -> None:
    kinds = {
        m.lower().removeprefix("mostly_"): int(v) for m, v in gguf.LlamaFileType.__members__.items()
    }
    single = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}
    assert {n: m.file_type for n, m in MIXES.items()} == {n: kinds[single.get(n, n)] for n in MIXES}


def test_a_mix_that_does_not_fit_names_those_that_do() -> None:
    odd = {Q: (64, 96) for Q in (canonical.Q.format(i=0), V.format(i=0))} | {
        canonical.EMBED: (512, 96)
    }
    with pytest.raises(
        UsageError, match=r"2 weights .* needs a multiple of 256.*gguf-q8_0, gguf-q4_0"
    ) as e:
        tensor_types(MIXES["q4_k_m"], odd)
    assert "iq4_xs" not in str(e.value)
    assert tensor_types(MIXES["q4_0"], odd)[canonical.EMBED] == "Q8_0"
    with pytest.raises(UsageError, match=r"gguf-q9 is no GGUF mix.*gguf-q4_k_m"):
        mix_of("gguf-q9")


# ---------------------------------------------------------------- importance matrices


def matrix(checkpoint: Checkpoint) -> imatrix.ImportanceMatrix:
    rng = np.random.default_rng(0)
    names = canonical.linears(checkpoint.tensors)
    means = {n: rng.random(checkpoint.tensors[n].shape[1]).astype(np.float32) for n in names}
    return imatrix.ImportanceMatrix(means, dict.fromkeys(names, 4096), 512, ("calibration.txt",))


@pytest.mark.parametrize("name", ["x.dat", "x.gguf"])
def test_importance_survives_either_form(sample: Checkpoint, tmp_path: Path, name: str) -> None:
    given_ = matrix(sample)
    imatrix.write(imatrix.to_foreign(given_, sample.config), tmp_path / name)
    assert not list(tmp_path.glob("*.partial"))
    raw = imatrix.read(tmp_path / name)
    assert "blk.3.ffn_down.weight" in raw.means
    assert raw.datasets == ("calibration.txt",)
    back = imatrix.to_canonical(raw, sample.config)
    assert back.means.keys() == given_.means.keys()
    for n, x in given_.means.items():
        np.testing.assert_allclose(back.means[n], x, rtol=3e-7)
    assert set(back.counts.values()) == ({8} if name == "x.dat" else {4096})


def test_the_gguf_form_is_as_llama_imatrix_writes_it(sample: Checkpoint, tmp_path: Path) -> None:
    imatrix.write(imatrix.to_foreign(matrix(sample), sample.config), tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert [t.name for t in reader.tensors][:2] == [
        "blk.0.attn_k.weight.in_sum2",
        "blk.0.attn_k.weight.counts",
    ]
    assert [list(t.shape) for t in reader.tensors][:2] == [[256, 1], [1, 1]]
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 8
    assert reader.fields["imatrix.chunk_size"].contents() == 512


def test_the_old_form_to_the_byte(tmp_path: Path) -> None:
    found = imatrix.ImportanceMatrix(
        {"blk.0.a": np.array([0.5, 2.0], np.float32)}, {"blk.0.a": 3}, 1, ("t",)
    )
    expected = (
        struct.pack("<ii", 1, 7)
        + b"blk.0.a"
        + struct.pack("<iiff", 3, 2, 1.5, 6.0)
        + struct.pack("<ii", 3, 1)
        + b"t"
    )
    assert imatrix.write_dat(found) == expected


def test_an_unused_entry_weighs_all_alike(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iiff", 0, 2, 0.0, 0.0))
    assert imatrix.read(path).means["a"].tolist() == [1.0, 1.0]


def test_bad_importance_files_are_refused(sample: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(b"")
    with pytest.raises(G2Error, match="it ends in the number of entries"):
        imatrix.read(path)
    path.write_bytes(struct.pack("<ii", 1, 10**9))
    with pytest.raises(G2Error, match="the length of a name is 1000000000"):
        imatrix.read(path)
    path.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, -1.0))
    with pytest.raises(NonFiniteError, match="negative"):
        imatrix.read(path)
    entry = struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1.0)
    path.write_bytes(struct.pack("<i", 2) + entry + entry)
    with pytest.raises(FormatError, match="twice"):
        imatrix.read(path)
    small = imatrix.ImportanceMatrix(
        {"blk.0.attn_q.weight": np.ones(256, np.float32)}, {"blk.0.attn_q.weight": 1}
    )
    with pytest.raises(MissingTensorError, match="no entry for 27 of 28"):
        imatrix.to_canonical(small, sample.config)
    wide = imatrix.to_foreign(matrix(sample), sample.config)
    other = dict(wide.means) | {"blk.2.ffn_up.weight": np.ones(3, np.float32)}
    with pytest.raises(ShapeError, match="3 columns, the weight 256"):
        imatrix.to_canonical(imatrix.ImportanceMatrix(other, wide.counts), sample.config)


def test_a_model_is_no_importance_matrix(sample: Checkpoint, tmp_path: Path) -> None:
    plan = container.plan([Slot("a", F32, (2,))], [("general.type", "str", "model")])
    path = tmp_path / "m.gguf"
    path.write_bytes(plan.files[0].fixed[0][1].ljust(plan.files[0].size, b"\0"))
    with pytest.raises(FormatError, match="of type 'model', expected 'imatrix'"):
        imatrix.read(path)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_mutated_importance_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutants"
    folder.mkdir(exist_ok=True)
    found = imatrix.ImportanceMatrix(
        {"a.w": np.ones(4, np.float32), "b.w": np.ones(8, np.float32)},
        {"a.w": 5, "b.w": 7},
        1,
        ("t",),
    )
    path = folder / data.draw(st.sampled_from(["x.dat", "x.gguf"]))
    imatrix.write(found, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(
        raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    )
    with contextlib.suppress(G2Error):
        assert all(np.isfinite(x).all() for x in imatrix.read(path).means.values())


# ---------------------------------------------------------------- export


def test_a_mix_is_written_and_read_back(sample: Checkpoint, tmp_path: Path) -> None:
    blocks = blocks_for(sample, "q4_k_m")
    dst = tmp_path / "m.gguf"
    report = export_gguf(blocks, sample, dst, "gguf-q4_k_m")
    assert report["types"] == {"Q4_K": 24, "Q6_K": 5}
    assert report["bytes"] == dst.stat().st_size
    reader = gguf.GGUFReader(dst)
    assert reader.fields["general.file_type"].contents() == int(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    stored = {t.name: t for t in reader.tensors}
    for name, foreign in imatrix.foreign_names(sample.config).items():
        tensor = stored[foreign]
        assert tensor.tensor_type.name == blocks[name].format.name
        assert np.array_equal(tensor.data, blocks[name].data.numpy())
    with open_checkpoint(dst) as back:
        assert len(back.quantized) == 29
        assert (
            back.tensors[canonical.FINAL_NORM].read().tolist()
            == sample.tensors[canonical.FINAL_NORM].read().tolist()
        )
        name = canonical.Q.format(i=1)
        assert np.array_equal(back.tensors[name].read(), blocks[name].dequantize().numpy())
    with pytest.raises(ConflictError):
        export_gguf(blocks, sample, dst, "q4_k_m")


def test_the_same_blocks_give_the_same_bytes(sample: Checkpoint, tmp_path: Path) -> None:
    blocks = blocks_for(sample, "q8_0")
    for name in ("a.gguf", "b.gguf"):
        export_gguf(blocks, sample, tmp_path / name, "q8_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_tuned_norms_and_a_plain_embedding(sample: Checkpoint, tmp_path: Path) -> None:
    blocks = blocks_for(sample, "q4_0")
    gain = torch.full((256,), 0.25)
    report = export_gguf(
        {**blocks, canonical.FINAL_NORM: gain}, sample, tmp_path / "out", "q4_0", embedding=None
    )
    assert report["types"] == {"Q4_0": 28}
    with open_checkpoint(tmp_path / "out") as back:
        assert canonical.EMBED not in back.quantized
        assert (
            back.tensors[canonical.FINAL_NORM].read().astype(np.float32).tolist() == gain.tolist()
        )


def test_blocks_are_written_again_as_they_are(sample: Checkpoint, tmp_path: Path) -> None:
    """A quantized file as the source: its blocks go on byte for byte."""
    export_gguf(blocks_for(sample, "q6_k"), sample, tmp_path / "a.gguf", "q6_k")
    with open_checkpoint(tmp_path / "a.gguf") as again:
        kept = {}
        for name in again.quantized:
            packed = again.tensors[name].source.quantized
            assert isinstance(packed, GgmlBlocks)
            rows = torch.from_numpy(packed.raw_rows(0, packed.rows))
            kept[name] = Blocks(
                next(f for f in FORMATS.values() if f.code == packed.block.code), rows
            )
        export_gguf(kept, again, tmp_path / "b.gguf", "q6_k")
    a, b = (gguf.GGUFReader(tmp_path / n) for n in ("a.gguf", "b.gguf"))
    assert [(t.name, t.data.tobytes()) for t in a.tensors] == [
        (t.name, t.data.tobytes()) for t in b.tensors
    ]


def test_bad_blocks_are_refused_before_anything_is_written(
    sample: Checkpoint, tmp_path: Path
) -> None:
    name = canonical.Q.format(i=0)
    small = encode(torch.ones(2, 256), "Q4_K")
    dst = tmp_path / "m.gguf"
    with pytest.raises(ShapeError, match=r"\[2, 256\], the checkpoint's \[512, 256\]"):
        export_gguf({name: small}, sample, dst, "q4_k")
    with pytest.raises(UsageError, match="1 names are no tensors"):
        export_gguf({"model.other": small}, sample, dst, "q4_k")
    with pytest.raises(UsageError, match="nothing is quantized"):
        export_gguf({}, sample, dst, "q4_k")
    bad = encode(torch.ones(512, 256), "Q4_K")
    bad.data[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite scale
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        export_gguf({name: bad}, sample, dst, "q4_k")
    assert not dst.exists()


def test_slots_of_blocks_are_checked() -> None:
    u8 = np.dtype(np.uint8)
    with pytest.raises(ShapeError, match="not rows of blocks of 144 bytes"):
        container.plan([container.BlockSlot("a", u8, (2, 100), 12, 256, 144)], [])
    plan = container.plan([container.BlockSlot("a", u8, (2, 288), 12, 256, 144)], [])
    assert plan.files[0].size >= 576


@pytest.mark.llama
@pytest.mark.parametrize("mix", ["q4_k_m", "iq4_xs", "q3_k_l", "q4_0", "q4_1", "q5_k_m", "q8_0"])
def test_llama_cpp_computes_what_the_blocks_say(
    sample: Checkpoint, tmp_path: Path, mix: str
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    blocks = encoded(sample, mix)
    export_gguf(blocks, sample, tmp_path / "m.gguf", mix)
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False)
    ids = [2, 100, 200, 300, 400, 500]
    model.eval(ids)
    logits = torch.from_numpy(model.scores[: len(ids)].copy())
    from g2kit.model import torch_gemma

    with open_checkpoint(tmp_path / "m.gguf") as back, torch.no_grad():
        w = {n: torch.from_numpy(t.read().astype(np.float32)) for n, t in back.tensors.items()}
        ours = torch_gemma.forward(torch.tensor([ids]), w, back.config)[0]
    p = torch.log_softmax(ours.double(), -1)
    kl = (p.exp() * (p - torch.log_softmax(logits.double(), -1))).sum(-1)
    assert float(kl.max()) < 2e-3  # llama.cpp rounds activations to 8 bits
