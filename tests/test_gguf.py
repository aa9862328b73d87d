"""GGUF against llama.cpp's own Python package, and against files that lie."""

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf as official
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

from g2kit.formats import gguf
from g2kit.formats.base import Slot, Source
from g2kit.formats.errors import (
    DtypeError,
    FileIOError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    TruncatedError,
)
from g2kit.formats.packed import ggml_blocks

from .plan_writer import materialise, random_array

FIXTURE = Path(__file__).parent / "data" / "gguf" / "bf16.gguf"
BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype("f2"), np.dtype("f4")
Q4_0, Q8_0 = 2, 8


# -- a plain builder of files, true and false ------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, code: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + payload


def info(name: str, ne: tuple[int, ...] = (4,), code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, code, offset)


def build(
    kv: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    payload: bytes = b"",
    *,
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    n_tensors = len(infos) if n_tensors is None else n_tensors
    n_kv = len(kv) if n_kv is None else n_kv
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(kv + infos)
    return head + bytes(-len(head) % alignment) + payload


def opened(directory: Path, data: bytes, name: str = "m.gguf") -> Source:
    path = directory / name
    path.write_bytes(data)
    return gguf.open_source(path)


# -- reading what the official writers wrote -------------------------------------------------------


def test_official_file() -> None:
    source, reader = gguf.open_source(FIXTURE), official.GGUFReader(FIXTURE)
    assert list(source.tensors) == [t.name for t in reader.tensors]
    for theirs in reader.tensors:
        ours = source.tensors[theirs.name]
        assert ours.stored == theirs.tensor_type.name
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.read().tobytes() == theirs.data.tobytes()
        assert ours.quantized is None
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(source.metadata["kv"]) == list(fields)
    for key, field in fields.items():
        found, expected = source.metadata["kv"][key], field.contents()
        assert (list(found) if isinstance(expected, list) else found) == expected, key
    assert source.metadata["kv_types"]["tokenizer.ggml.scores"] == "[f32]"
    assert source.metadata["kv"]["tokenizer.ggml.scores"].dtype == F32
    assert source.files == (FIXTURE,)
    assert source.notes == []
    embed = source.tensors["token_embd.weight"]
    assert embed.dtype == BF16
    np.testing.assert_array_equal(embed.read((slice(3, 5),)), embed.read()[3:5])
    source.check_unchanged()
    source.close()
    with pytest.raises((G2Error, OSError)):
        embed.read()


def test_planning_the_official_file_gives_its_bytes(tmp_path: Path) -> None:
    source = gguf.open_source(FIXTURE)
    slots = [Slot(t.name, t.dtype, t.shape) for t in source.tensors.values()]
    types = source.metadata["kv_types"]
    kv = [(key, types[key], value) for key, value in source.metadata["kv"].items()]
    plan = gguf.plan(slots, kv, file_name="again.gguf")
    materialise(plan, {n: t.read() for n, t in source.tensors.items()}, tmp_path)
    assert (tmp_path / "again.gguf").read_bytes() == FIXTURE.read_bytes()


def official_writer(path: Path, alignment: int | None) -> official.GGUFWriter:
    writer = official.GGUFWriter(path, "gemma2")
    writer.add_string("a.text", "Grüße\n")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"a.{name}", 7)
    writer.add_float32("a.f32", 1e-6)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.tokens", ["<pad>", "", "▁▁"])
    writer.add_array("a.scores", [0.0, -0.0, -1.5])
    writer.add_array("a.types", [1, -2, 3])
    writer.add_array("a.flags", [True, False])
    if alignment:
        writer.add_custom_alignment(alignment)
    return writer


OFFICIAL_KV = [
    ("general.architecture", "str", "gemma2"),
    ("a.text", "str", "Grüße\n"),
    *((f"a.{long}", short, 7) for long, short in (
        ("uint8", "u8"), ("int8", "i8"), ("uint16", "u16"), ("int16", "i16"),
        ("uint32", "u32"), ("int32", "i32"), ("uint64", "u64"), ("int64", "i64"))),
    ("a.f32", "f32", 1e-6),
    ("a.f64", "f64", 0.1),
    ("a.bool", "bool", True),
    ("a.tokens", "[str]", ["<pad>", "", "▁▁"]),
    ("a.scores", "[f32]", np.array([0.0, -0.0, -1.5])),
    ("a.types", "[i32]", [1, -2, 3]),
    ("a.flags", "[bool]", [True, False]),
]  # fmt: skip


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_same_bytes_as_the_official_writer(tmp_path: Path, alignment: int | None) -> None:
    arrays = {
        "matrix": random_array(1, F32, (3, 5)),
        "bf16": random_array(2, BF16, (2, 3, 7)),
        "f16": random_array(3, F16, (9,)),
        "i32": random_array(4, np.dtype("i4"), (1, 2, 3, 4)),
    }
    writer = official_writer(tmp_path / "official.gguf", alignment)
    for name, array in arrays.items():
        if array.dtype == BF16:
            raw = array.view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=official.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kv = OFFICIAL_KV + ([("general.alignment", "u32", alignment)] if alignment else [])
    plan = gguf.plan([Slot(n, a.dtype, a.shape) for n, a in arrays.items()], kv)
    assert plan == gguf.plan([Slot(n, a.dtype, a.shape) for n, a in arrays.items()], kv)
    materialise(plan, arrays, tmp_path)
    ours, theirs = tmp_path / "model.gguf", tmp_path / "official.gguf"
    assert ours.read_bytes() == theirs.read_bytes()
    assert official.GGUFReader(ours).alignment == (alignment or 32)
    source = gguf.open_source(ours)
    assert source.metadata["alignment"] == (alignment or 32)
    for name, array in arrays.items():
        assert source.tensors[name].read().tobytes() == array.tobytes()


def test_version_2_reads(tmp_path: Path) -> None:
    data = build((pair("a", 4, struct.pack("<I", 5)),), (info("w"),), bytes(range(32)), version=2)
    source = opened(tmp_path, data)
    assert source.metadata["kv"] == {"a": 5}
    assert source.tensors["w"].read().tobytes() == bytes(range(16))


def test_last_padding_may_be_absent_and_surplus_is_noted(tmp_path: Path) -> None:
    short = build((), (info("w", (3,)),), bytes(12))
    assert opened(tmp_path, short).notes == []
    assert opened(tmp_path, short + bytes(20)).notes == []
    (note,) = opened(tmp_path, short + bytes(25)).notes
    assert "5 bytes after the last tensor" in note


def test_scalar_and_empty_tensors(tmp_path: Path) -> None:
    data = build(
        (), (info("s", ()), info("none", (0, 3), offset=32)), struct.pack("<f", 2.5) + bytes(28)
    )
    source = opened(tmp_path, data)
    assert source.tensors["s"].read() == np.float32(2.5)
    assert source.tensors["none"].read().shape == (3, 0)


@st.composite
def key_values(draw: st.DrawFn) -> list[tuple[str, str, object]]:
    ints = {n: st.integers(-(1 << b - 1), (1 << b - 1) - 1) for n, b in
            (("i8", 8), ("i16", 16), ("i32", 32), ("i64", 64))}  # fmt: skip
    ints |= {f"u{b}": st.integers(0, (1 << b) - 1) for b in (8, 16, 32, 64)}
    scalars = ints | {
        "f32": st.floats(width=32),
        "f64": st.floats(),
        "bool": st.booleans(),
        "str": st.text(st.characters(exclude_categories=("Cs",))),
    }
    rows = []
    for key in draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, max_size=6)
    ):
        name = draw(st.sampled_from(sorted(scalars)))
        if draw(st.booleans()):
            rows.append((key, f"[{name}]", draw(st.lists(scalars[name], max_size=5))))
        else:
            rows.append((key, name, draw(scalars[name])))
    return rows


@settings(max_examples=150, deadline=None)
@given(kv=key_values())
def test_key_values_survive(tmp_path_factory: pytest.TempPathFactory, kv: list) -> None:
    directory = tmp_path_factory.mktemp("kv")
    if any(key == "general.alignment" for key, _, _ in kv):
        return
    materialise(gguf.plan([], kv), {}, directory)
    source = gguf.open_source(directory / "model.gguf")
    assert source.metadata["kv_types"] == {key: t for key, t, _ in kv}
    for key, _, value in kv:
        found = source.metadata["kv"][key]
        # repr: NaN equals NaN, -0.0 does not equal 0.0
        assert repr(found.tolist() if isinstance(found, np.ndarray) else found) == repr(value)


def test_a_large_vocabulary_opens(tmp_path: Path) -> None:
    tokens = [f"▁piece{i}" for i in range(256_000)]
    kv = [
        ("t", "[str]", tokens),
        ("s", "[f32]", -np.arange(256_000.0)),
        ("k", "[i32]", np.ones(256_000, np.int32)),
    ]
    plan = gguf.plan([], kv)
    materialise(plan, {}, tmp_path)
    source = gguf.open_source(tmp_path / "model.gguf")
    assert source.metadata["kv"]["t"] == tokens
    tracemalloc.start()
    source = gguf.open_source(tmp_path / "model.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * plan.nbytes
    assert source.metadata["kv"]["t"] == tokens


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from g2kit.formats import gguf; from pathlib import Path;"
        f"s = gguf.open_source(Path({str(FIXTURE)!r}));"
        "heavy = {'gguf', 'torch', 'jax', 'transformers', 'sentencepiece'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy or len(s.tensors) != 46 else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- quantized types -------------------------------------------------------------------------------


def finite_blocks(
    seed: int, kind: official.GGMLQuantizationType, rows: int, blocks: int
) -> np.ndarray:
    """Random blocks whose half-precision scales are finite: no byte has the bits of exponent 31."""
    nbytes = official.GGML_QUANT_SIZES[kind][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * nbytes), np.uint8) & 0xBB


DECODABLE = [
    official.GGMLQuantizationType[n]
    for n in ggml_blocks.known_types()
    if n not in ("F32", "F16", "BF16")
]


def test_known_types_are_those_the_package_decodes() -> None:
    names = {kind.name for kind in DECODABLE}
    assert {
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_XS",
    } <= names
    assert "Q8_K" not in names


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("Q4_0", 4), ("Q4_1", 4), ("Q5_1", 5), ("Q8_0", 8), ("Q2_K", 2), ("Q6_K", 6), ("IQ4_XS", 4), ("MXFP4", 4)],
)  # fmt: skip
def test_codes_have_the_bits_in_the_name(kind: str, bits: int) -> None:
    """Q4_1 and Q5_1 store five and six bits per weight, of which one is scale and minimum."""
    found = ggml_blocks.block_type(int(official.GGMLQuantizationType[kind]))
    assert found is not None
    assert found.code_bits == bits


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda k: k.name)
def test_every_type_dequantizes(
    tmp_path: Path, kind: official.GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, nbytes = official.GGML_QUANT_SIZES[kind]
    raw = finite_blocks(int(kind), kind, 6, 3)
    writer = official.GGUFWriter(tmp_path / "q.gguf", "gemma2")
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("w", raw, raw_dtype=kind)
    writer.add_tensor("cube", raw.reshape(2, 3, -1), raw_dtype=kind)
    writer.add_tensor("row", raw[0], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        expected = official.quants.dequantize(raw, kind)
    assert np.isfinite(expected).all()
    assert expected.any()
    monkeypatch.setattr(ggml_blocks, "_PIECE", 4 * weights)  # pieces that end within rows
    tensors = gguf.open_source(tmp_path / "q.gguf").tensors
    tensor = tensors["w"]
    assert (tensor.stored, tensor.dtype, tensor.shape) == (kind.name, F32, (6, 3 * weights))
    np.testing.assert_array_equal(tensor.read(), expected)
    for index in ((4,), (slice(1, 4),), (slice(2, 6), slice(5, 40)), (3, 7), (slice(6, 6),)):
        np.testing.assert_array_equal(tensor.read(index), expected[index])
    np.testing.assert_array_equal(tensors["cube"].read((1,)), expected.reshape(2, 3, -1)[1])
    np.testing.assert_array_equal(tensors["row"].read((slice(3, 9),)), expected[0, 3:9])
    packed = tensor.quantized
    assert isinstance(packed, ggml_blocks.GgmlBlocks)
    assert (packed.kind, packed.shape) == (f"ggml.{kind.name}", tensor.shape)
    assert packed.bits == 8 * nbytes / weights
    np.testing.assert_array_equal(packed.raw_rows(2, 5), raw[2:5])
    np.testing.assert_array_equal(packed.dequantize(2, 5), expected[2:5])
    with pytest.raises(IndexError):
        packed.raw_rows(2, 7)


def test_q4_0_and_q8_0_by_hand(tmp_path: Path) -> None:
    scale = struct.pack("<e", 0.5)
    codes = bytes(range(0, 160, 10))
    q8 = scale + np.arange(-16, 16, dtype=np.int8).tobytes()
    data = build(
        (), (info("a", (32,), Q4_0), info("b", (32,), Q8_0, 32)), scale + codes + bytes(14) + q8
    )
    tensors = opened(tmp_path, data).tensors
    nibbles = [c & 15 for c in codes] + [c >> 4 for c in codes]
    assert tensors["a"].read().tolist() == [(n - 8) * 0.5 for n in nibbles]
    assert tensors["b"].read().tolist() == [n * 0.5 for n in range(-16, 16)]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_found(tmp_path: Path, bad: float) -> None:
    blocks = finite_blocks(0, official.GGMLQuantizationType.Q8_0, 5, 2)
    blocks[3, 34:36] = np.frombuffer(struct.pack("<e", bad), np.uint8)
    tensor = opened(tmp_path, build((), (info("w", (64, 5), Q8_0),), blocks.tobytes())).tensors["w"]
    assert tensor.read((slice(0, 3),)).shape == (3, 64)
    for index in ((), (3,), (slice(2, 5), slice(0, 4))):
        with pytest.raises(NonFiniteError, match=r"m\.gguf: w: block 7 \(row 3, block 1 of it\)"):
            tensor.read(index)


def test_reading_few_rows_takes_little_memory(tmp_path: Path) -> None:
    rows, width = 4096, 1024
    raw = finite_blocks(1, official.GGMLQuantizationType.Q4_K, rows, width // 256)
    tensor = opened(tmp_path, build((), (info("w", (width, rows), 12),), raw.tobytes())).tensors[
        "w"
    ]
    tensor.read((0,))  # tables of the type
    tracemalloc.start()
    tensor.read((slice(8, 16),))
    few = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    tensor.read()
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert few < 1 << 20
    assert whole - 4 * rows * width < 16 << 20


# -- files that lie --------------------------------------------------------------------------------

U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack
ONE = (info("w"),)
DATA = bytes(32)
ALIGNMENT = "general.alignment"

BAD = {
    "empty": (b"", FormatError, "empty"),
    "three bytes": (b"GGU", TruncatedError, "magic number"),
    "magic": (b"FUGG" + build()[4:], FormatError, "begins with b'FUGG'"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", FormatError, "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(60), FormatError, "zip archive"),
    "version 1": (build(version=1), FormatError, "version 1"),
    "version 99": (build(version=99), FormatError, "version 99"),
    "byte-swapped": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), FormatError, "big-endian"),
    "no counts": (build()[:12], TruncatedError, "number of tensors"),
    "tensors 2**62": (build(n_tensors=1 << 62), LimitError, str(1 << 62)),
    "tensors absent": (build(n_tensors=3)[:24], TruncatedError, "name of tensor 0"),
    "kv 2**40": (build(n_kv=1 << 40), LimitError, str(1 << 40)),
    "key length 2**40": (build(n_kv=1)[:24] + U64(1 << 40), LimitError, "length of key 0"),
    "key length past the end": (build((U64(5) + b"abc",), n_kv=1)[:35], TruncatedError, "key 0"),
    "key not UTF-8": (build((pair(b"\xff", 4, U32(1)),)), FormatError, "UTF-8"),
    "key empty": (build((pair("", 4, U32(1)),)), FormatError, "key 0 is empty"),
    "key twice": (build((pair("a", 4, U32(1)),) * 2), FormatError, "'a' occurs twice"),
    "type 77": (build((pair("a", 77, U32(1)),)), FormatError, "type 77"),
    "bool 2": (build((pair("a", 7, b"\2"),)), FormatError, "boolean with value 2"),
    "string length": (build((pair("a", 8, U64(1 << 62)),)), LimitError, "value of 'a'"),
    "string past the end": (build((pair("a", 8, U64(1 << 20)),)), TruncatedError, "value of 'a'"),
    "string not UTF-8": (build((pair("a", 8, text(b"\xc3")),)), FormatError, "'a' at byte"),
    "array 2**40": (build((pair("a", 9, U32(4) + U64(1 << 40)),)), LimitError, "array 'a'"),
    "array past the end": (build((pair("a", 9, U32(4) + U64(1 << 23)),)), TruncatedError, "'a'"),
    "strings past the end": (build((pair("a", 9, U32(8) + U64(1 << 23)),)), TruncatedError, "'a'"),
    "strings not UTF-8": (
        build((pair("a", 9, U32(8) + U64(2) + text("x") + text(b"\xff")),)), FormatError, "'a'[1]"),
    "array of arrays": (
        build((pair("a", 9, (U32(9) + U64(1)) * 20_000 + U32(4) + U64(0)),)), FormatError, "arrays"),
    "array of type 13": (build((pair("a", 9, U32(13) + U64(0)),)), FormatError, "type 13"),
    **{
        f"alignment {n}": (build((pair(ALIGNMENT, 4, U32(n)),)), FormatError, f"is {n}")
        for n in (0, 3, 33, 1 << 31)
    },
    "alignment u64": (build((pair(ALIGNMENT, 10, U64(32)),)), FormatError, "u64"),
    "tensor name long": (build((), (info("w" * 5000),)), LimitError, "name of tensor 0"),
    "tensor name empty": (build((), (info(""),), DATA), FormatError, "is empty"),
    "tensor name with newline": (build((), (info("a\nb"),), DATA), FormatError, r"a\nb"),
    "tensor name as path": (build((), (info("../w"),), DATA), FormatError, "path"),
    "tensor twice": (build((), ONE * 2, DATA), FormatError, "w: the name occurs twice"),
    "dims 2**31": (build((), (text("w") + U32(1 << 31),)), LimitError, "dimensions of 'w'"),
    "dims 5": (build((), (info("w", (1,) * 5),), DATA), LimitError, "dimensions of 'w' is 5"),
    "dims overflow": (build((), (info("w", (1 << 33, 1 << 33)),), DATA), LimitError, "w: dim"),
    "dims overflow behind zero": (build((), (info("w", (0, 1 << 63)),)), LimitError, "w: dim"),
    "type 999": (build((), (info("w", (32,), 999),), DATA), DtypeError, "type 999"),
    "type removed": (build((), (info("w", (32,), 4),), DATA), DtypeError, "BF16"),
    "type without decoder": (build((), (info("w", (256,), 15),), bytes(292)), DtypeError, "Q4_K"),
    "ragged block": (build((), (info("w", (31,), Q4_0),), DATA), LayoutError, "31 weights"),
    "offset past the end": (build((), (info("w", offset=1 << 50),), DATA), TruncatedError, "w: "),
    "payload cut": (build((), (info("w", (9,)),), DATA), TruncatedError, "4 bytes are missing"),
    "block payload cut": (
        build((), (info("w", (64,), Q4_0),), bytes(35)), TruncatedError, "1 bytes are missing"),
    "unaligned": (build((), (info("w", (2,), offset=8),), DATA), LayoutError, "offset 8"),
    "overlap": (
        build((), (info("v", (9,)), info("w", offset=32)), bytes(64)), LayoutError, "overlap 'v'"),
    "same place": (build((), (info("v"), info("w")), DATA), LayoutError, "overlap"),
    "hole": (build((), (info("v"), info("w", offset=64)), bytes(96)), LayoutError, "32 bytes between"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(tmp_path: Path, name: str) -> None:
    data, error, part = BAD[name]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(error) as caught:
            gguf.open_source(tmp_path / "m.gguf")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert type(caught.value) is error
    assert part in str(caught.value)
    assert "m.gguf" in str(caught.value)
    assert peak < 32 << 20


def test_header_length_is_bounded(tmp_path: Path) -> None:
    rows = tuple(pair(f"k{i}", 8, text(bytes(16 << 20))) for i in range(4))
    with pytest.raises(LimitError, match="header is longer"):
        opened(tmp_path, build(rows, ONE, DATA))


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileIOError, match="No such file"):
        gguf.open_source(tmp_path / "absent.gguf")


def test_changes_while_reading_are_found(tmp_path: Path) -> None:
    source = opened(tmp_path, build((), ONE, DATA))
    (tmp_path / "m.gguf").write_bytes(build((), ONE, b"x" * 40))
    with pytest.raises(FileIOError, match="changed"):
        source.check_unchanged()


MIXED = build(
    (pair("s", 8, text("abc")), pair("t", 9, U32(8) + U64(2) + text("x") + text("yz")), pair("b", 7, b"\1"),
     pair(ALIGNMENT, 4, U32(32)), pair("f", 9, U32(6) + U64(2) + bytes(8))),
    (info("v", (3, 2)), info("w", (32, 2), Q8_0, 32), info("h", (4,), 1, 128)),
    bytes(i % 59 for i in range(136)),
)  # fmt: skip


def read_all(path: Path) -> None:
    source = gguf.open_source(path)
    for tensor in source.tensors.values():
        assert tensor.read().shape == tensor.shape
    source.close()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(MIXED)
    read_all(path)
    for size in range(len(MIXED)):
        path.write_bytes(MIXED[:size])
        with pytest.raises(FormatError if size == 0 else TruncatedError):
            read_all(path)


@settings(max_examples=400, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, len(MIXED) - 1),
            st.sampled_from([b"\0", b"\1", b"\xff", b"\x80", b"\7", b"\t", bytes(8), b"\xff" * 8])
            | st.binary(min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_files_never_crash(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]
) -> None:
    data = bytearray(MIXED)
    for at, new in changes:
        data[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(data)
    message = None
    try:
        read_all(path)
    except G2Error as e:
        message = str(e)
    assert message is None or "mutant.gguf" in message


# -- split files and directories -------------------------------------------------------------------


def write_split(directory: Path, stem: str = "m") -> dict[str, np.ndarray]:
    writer = official.GGUFWriter(directory / f"{stem}.gguf", "gemma2", split_max_tensors=2)
    arrays = {f"t{i}": random_array(i, F32, (i + 1, 3)) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def part(directory: Path, i: int, stem: str = "m") -> Path:
    return directory / f"{stem}-{i:05}-of-00003.gguf"


def test_split_set(tmp_path: Path) -> None:
    arrays = write_split(tmp_path)
    for path in (tmp_path, part(tmp_path, 1), part(tmp_path, 3)):
        source = gguf.open_source(path)
        assert list(source.tensors) == list(arrays)
        for name, array in arrays.items():
            assert source.tensors[name].read().tobytes() == array.tobytes()
        assert source.metadata["kv"] == {"general.architecture": "gemma2"}
        assert source.files == tuple(part(tmp_path, i) for i in (1, 2, 3))


def test_split_part_missing(tmp_path: Path) -> None:
    write_split(tmp_path)
    part(tmp_path, 2).unlink()
    for path in (tmp_path, part(tmp_path, 1)):
        with pytest.raises(MissingTensorError, match=r"1 of 3 parts are missing: m-00002-of-00003"):
            gguf.open_source(path)


def test_split_parts_in_wrong_order(tmp_path: Path) -> None:
    write_split(tmp_path)
    part(tmp_path, 1).rename(tmp_path / "x")
    part(tmp_path, 2).rename(part(tmp_path, 1))
    (tmp_path / "x").rename(part(tmp_path, 2))
    with pytest.raises(MissingTensorError, match="part 2 of 3, its name says part 1 of 3"):
        gguf.open_source(tmp_path)


def test_split_part_alone_under_another_name(tmp_path: Path) -> None:
    write_split(tmp_path)
    part(tmp_path, 2).rename(tmp_path / "model.gguf")
    with pytest.raises(MissingTensorError, match="part 2 of 3, its name says part 1 of 1"):
        gguf.open_source(tmp_path / "model.gguf")


def split_kv(no: int, count: int, total: int) -> tuple[bytes, ...]:
    return (
        pair("split.no", 2, struct.pack("<H", no)),
        pair("split.count", 2, struct.pack("<H", count)),
        pair("split.tensors.count", 5, struct.pack("<i", total)),
    )


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        (build(split_kv(1, 3, 2), (info("b"),), DATA), MissingTensorError, "part 2 of 3, its name"),
        (build((), (info("b"),), DATA), MissingTensorError, "part 1 of 1, its name says part 2"),
        (
            build(split_kv(1, 2, 9)),
            MissingTensorError,
            "hold 1 tensors, split.tensors.count says 2",
        ),
        (build(split_kv(1, 2, 2), (info("a"),), DATA), FormatError, "a: the tensor is in s-00001"),
        (build((pair("split.no", 8, text("1")),)), FormatError, "split.no is str"),
        (build((pair("split.count", 9, U32(4) + U64(2) + DATA[:8]),)), FormatError, r"is \[u32\]"),
    ],
    ids=["count", "no keys", "too few tensors", "doubled", "string", "array"],
)
def test_split_contradictions(
    tmp_path: Path, second: bytes, error: type[G2Error], message: str
) -> None:
    (tmp_path / "s-00001-of-00002.gguf").write_bytes(build(split_kv(0, 2, 2), (info("a"),), DATA))
    (tmp_path / "s-00002-of-00002.gguf").write_bytes(second)
    with pytest.raises(error, match=message):
        gguf.open_source(tmp_path)


def test_split_name_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="part 4 of 3"):
        opened(tmp_path, build(), "m-00004-of-00003.gguf")
    with pytest.raises(FileIOError, match="No such file"):
        gguf.open_source(tmp_path / "m-00001-of-00003.gguf")


def test_directories(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no \.gguf file"):
        gguf.open_source(tmp_path)
    opened(tmp_path, build((), ONE, DATA))
    (tmp_path / "config.json").write_text("{}")
    assert list(gguf.open_source(tmp_path).tensors) == ["w"]
    write_split(tmp_path, "other")
    with pytest.raises(FormatError, match=r"2 GGUF models: m\.gguf, other-0000\d-of-00003\.gguf"):
        gguf.open_source(tmp_path)


# -- what cannot be written ------------------------------------------------------------------------

W = Slot("w", F32, (2,))


@pytest.mark.parametrize(
    ("slots", "kv", "error", "message"),
    [
        ([], [("a", "u8", 256)], FormatError, "'a': 256 does not fit u8"),
        ([], [("a", "u32", -1)], FormatError, "does not fit u32"),
        ([], [("a", "u32", 1.0)], FormatError, "does not fit u32"),
        ([], [("a", "[i32]", np.array([1 << 31]))], FormatError, "does not fit i32"),
        ([], [("a", "[i32]", np.array([0.5]))], FormatError, "does not fit i32"),
        ([], [("a", "f32", 1e39)], FormatError, "does not fit f32"),
        ([], [("a", "[f32]", ["1"])], FormatError, "does not fit f32"),
        ([], [("a", "bool", 1)], FormatError, "does not fit bool"),
        ([], [("a", "str", 5)], FormatError, "'a': 5 is not a string"),
        ([], [("a", "str", "\ud800")], FormatError, "lone surrogate"),
        ([], [("a", "f16", 1.0)], FormatError, "type 'f16' is not one of u8"),
        ([], [("a", "u32", 1), ("a", "u32", 1)], FormatError, "key given twice: a"),
        ([], [(ALIGNMENT, "u32", 3)], FormatError, "power of two"),
        ([W, W], [], FormatError, "tensor given twice: w"),
        ([Slot("w" * 64, F32, (2,))], [], FormatError, "64 bytes"),
        ([Slot("w", F32, (1,) * 5)], [], ShapeError, "5 axes"),
        ([Slot("w", np.dtype("c8"), (1,))], [], DtypeError, "cannot hold complex64"),
    ],
)
def test_what_cannot_be_written(slots: list, kv: list, error: type[G2Error], message: str) -> None:
    with pytest.raises(error, match=message):
        gguf.plan(slots, kv)
