import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors as official
from hypothesis import HealthCheck, given, settings
from refusals import refusal
from safetensors.numpy import save, save_file

from g2kit.formats import safetensors, safetensors_header
from g2kit.formats.base import Slot
from g2kit.formats.dtypes import BF16, F32, TABLE
from g2kit.formats.errors import (
    DtypeError,
    FileIOError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    MissingTensorError,
    TruncatedError,
    UsageError,
)

from .plan_writer import materialise, random_array

OFFICIAL = Path(__file__).parent / "data" / "hf_sharded"
SUFFIX_INDEX = "model.safetensors.index.json"


def image(header: str | bytes | dict, payload: bytes = b"") -> bytes:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + payload


def entry(shape=(1,), begin=0, end=4, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def opened(tmp_path):
    """Opens bytes as a file of its own."""

    def open_bytes(data: bytes):
        path = tmp_path / "model-00033-of-00099.safetensors"
        path.write_bytes(data)
        return safetensors.open_source(path)

    return open_bytes


@pytest.fixture
def refused(tmp_path):
    """The message for refused bytes; checks class, file name, time and that nothing stays open."""

    def check(data: bytes, error: type[G2Error], *parts: str) -> str:
        path = tmp_path / "model-00033-of-00099.safetensors"
        path.write_bytes(data)
        start = time.process_time()
        name = "model-00033-of-00099.safetensors: "
        message = str(refusal(lambda: safetensors.open_source(path), error, name, *parts))
        assert time.process_time() - start < 2
        assert len(message) < 2000
        return message

    return check


# ---------------------------------------------------------------- damaged files


def test_empty_file(refused):
    refused(b"", TruncatedError, "0 B", "likely an interrupted download or Git LFS pointer")


def test_git_lfs_pointer(refused):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:61a7b147\nsize 4988025760\n"
    refused(pointer, FormatError, "Git LFS pointer", "git lfs pull")


def test_seven_bytes(refused):
    refused(bytes(7), TruncatedError, "the file has 7 B and a header needs 8")


def test_header_longer_than_file(refused):
    data = (1000).to_bytes(8, "little") + b"{}"
    refused(data, TruncatedError, "length says 1000 B, the file has 2 behind it")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_length_beyond_the_limit(refused, length):
    data = length.to_bytes(8, "little") + b"\0" * 8
    refused(data, LimitError, f"length says {length} B, at most 100000000")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\x03\x04", "zip archive"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"<!DOCTYPE html>", "HTML"),
        (b'{"a": 1}', "JSON"),
        (b"\x80\x02}q\x00X", "pickle"),
    ],
)
def test_other_formats_are_named(refused, start, what):
    refused(start + b"\x07" * 60, FormatError, what, "not safetensors")


def test_zeros(refused):
    refused(bytes(100), FormatError, "header of 0 B must begin with {")


def test_header_that_begins_with_space(refused):
    refused(image(b" {}"), FormatError, "must begin with {, found b' {}'")


def test_invalid_utf8(refused):
    refused(image(b'{"\xff": 1}'), FormatError, "not UTF-8: byte 0xff at byte 2")


def test_invalid_json(refused):
    refused(image('{"a":}'), FormatError, "not JSON", "line 1, column 6")
    refused(image("{} x"), FormatError, "Extra data at line 1, column 4")


def test_deep_json(refused):
    refused(image('{"a":' + "[" * 100_000), LimitError, "nests 100001 deep")


@pytest.mark.parametrize("second", [entry(), entry((2,), 4, 12)])
def test_doubled_tensor(refused, second):
    text = f'{{"a": {json.dumps(entry())}, "a": {json.dumps(second)}}}'
    refused(image(text, bytes(12)), FormatError, 'key "a" appears twice')


def test_doubled_metadata_and_doubled_field(refused):
    text = f'{{"__metadata__": {{"k": "1", "k": "2"}}, "a": {json.dumps(entry())}}}'
    refused(image(text, bytes(4)), FormatError, 'key "k" appears twice')
    text = '{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    refused(image(text, bytes(4)), FormatError, 'key "dtype" appears twice')


@pytest.mark.parametrize("metadata", ['{"k": 1}', "[]", "null", '{"k": {}}'])
def test_metadata_that_is_no_map_of_strings(refused, metadata):
    text = f'{{"__metadata__": {metadata}, "a": {json.dumps(entry())}}}'
    refused(image(text, bytes(4)), FormatError, "__metadata__ must be an object of strings")


def test_unknown_field_is_noted(opened):
    source = opened(image({"a": entry() | {"x\n": [1]}}, bytes(4)))
    assert source.notes == ["model-00033-of-00099.safetensors: unknown header fields: x\\n."]


@pytest.mark.parametrize("dtype", ["F7", "f32", "", "F4", "BF16\n"])
def test_unknown_dtype(refused, dtype):
    message = refused(image({"a": entry(dtype=dtype)}, bytes(4)), DtypeError, ": a: dtype ")
    assert all(row.safetensors in message for row in TABLE)


def test_dtype_that_is_no_string(refused):
    refused(image({"a": entry(dtype=["F32"])}, bytes(4)), FormatError, "found an array")


def test_shape_does_not_fit_range(refused):
    data = image({"a": entry((2, 3), 0, 20)}, bytes(20))
    refused(data, LayoutError, ": a: shape [2, 3] x 4 B = 24 B, but bytes 0 to 20 are 20 B")


@pytest.mark.parametrize(
    "shape",
    [(2**62, 4), (2**63,), (2**32, 2**32), (0, 2**62, 2**62), (10**39,), (1,) * 33],
)
def test_shape_overflow(refused, shape):
    refused(image({"a": entry(shape, 0, 0)}), LimitError, ": a: shape ", "larger than any file")


@pytest.mark.parametrize("axis", [-1, 1.0, "1", True, None, [1]])
def test_shape_of_something_else(refused, axis):
    text = f"shape must be whole numbers from 0, found {json.dumps([axis])}"
    refused(image({"a": entry((axis,))}, bytes(4)), FormatError, text)


@pytest.mark.parametrize("shape", [1, "1", None, {"0": 1}])
def test_shape_that_is_no_list(refused, shape):
    refused(image({"a": entry() | {"shape": shape}}, bytes(4)), FormatError, "shape must be")


@pytest.mark.parametrize("offsets", [[4, 0], [0], [0, 4, 8], []])
def test_offsets_that_are_no_range(refused, offsets):
    data = image({"a": entry() | {"data_offsets": offsets}}, bytes(8))
    refused(data, LayoutError, f"data_offsets must be [begin, end], found {offsets}")


def test_offsets_of_something_else(refused):
    for bad in (-4, 0.0, "0", None):
        data = image({"a": entry(begin=bad)}, bytes(4))
        refused(data, FormatError, "data_offsets must be whole numbers from 0")


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_missing_field(refused, field):
    info = entry()
    del info[field]
    refused(image({"a": info}, bytes(4)), FormatError, f": a: the tensor's entry lacks {field}")
    refused(image({"a": [1]}), FormatError, "must be an object, found an array")


def test_overlap(refused):
    data = image({"b": entry((2,), 4, 12), "a": entry((2,), 0, 8)}, bytes(12))
    refused(data, LayoutError, ': b: overlaps "a": it begins at byte 4, the other ends at 8')
    data = image({"a": entry((2,), 0, 8), "b": entry((2,), 0, 8)}, bytes(8))
    refused(data, LayoutError, ': b: overlaps "a"')


def test_hole(refused):
    data = image({"a": entry(), "b": entry((1,), 8, 12)}, bytes(12))
    refused(data, LayoutError, ': b: leaves a hole behind "a"', "begins at byte 8, the other ends")
    data = image({"a": entry((1,), 4, 8)}, bytes(8))
    refused(data, LayoutError, ": a: the first tensor begins at byte 4 of the data, not at 0")


def test_extra_bytes(refused):
    refused(image({"a": entry()}, bytes(7)), LayoutError, "3 extra bytes follow the last tensor")


@pytest.mark.parametrize("missing", [1, 3_000_000])
def test_truncated_payload(refused, missing):
    data = image({"a": entry((1_000_000,), 0, 4_000_000)}, bytes(4_000_000 - missing))
    text = f"missing {missing} B of model-00033-of-00099.safetensors", "describes 4000000 B"
    refused(data, TruncatedError, *text)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", 'tensor name "" is empty'),
        *((n, "path out of the directory") for n in ("../../x", "a/../b", "..\\x", "/x", "C:/x")),
        *((n, "has control characters") for n in ("a\0b", "a\nb", "a\x1b[2Jb", "a\u202eb")),
    ],
)
def test_unusable_names(refused, name, why):
    assert refused(image({name: entry()}, bytes(4)), FormatError, why).isprintable()


def test_name_of_a_megabyte(refused):
    data = image({"x" * 1_000_000: entry()}, bytes(4))
    refused(data, FormatError, "has 1000000 characters, at most 1024")


@pytest.mark.parametrize("count", [100_001, 1_500_000])
def test_too_many_tensors(refused, count):
    one = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    refused(image(b"{" + one * count + b"}"), LimitError, f"{count} tensors, at most 50000")


@pytest.mark.parametrize("one", [b'"a":1,', b'"a":{},', b'"a":[[]],'])
def test_too_many_values(refused, one):
    data = image(b"{" + one * 5_000_000 + b"}")
    refused(data, LimitError, "separators, at most 1000000")


def test_too_many_tensors_with_an_escaped_key(refused):
    one = b'"a%d":{"dtype":"U8","data\\u005foffsets":[0,0]},'
    header = b"{" + b"".join(one % i for i in range(100_002))[:-1] + b"}"
    refused(image(header), LimitError, "100002 tensors, at most 50000")


def test_as_many_tensors_as_allowed(opened, refused, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    for count in (3, 4):
        header = {f"t{i}": entry((1,), i, i + 1, "U8") for i in range(count)}
        data = image({"__metadata__": {}} | header, bytes(count))
        if count == 3:
            assert len(opened(data).tensors) == 3
        else:
            refused(data, LimitError, "4 tensors, at most 3")


def test_zero_size_tensors(opened):
    header = {"a": entry((0, 3), 0, 0), "b": entry(), "c": entry((0,), 4, 4), "d": entry((), 4, 8)}
    source = opened(image(header, np.float32([1, 2]).tobytes()))
    assert [t.read().shape for t in source.tensors.values()] == [(0, 3), (1,), (0,), ()]
    assert source.tensors["d"].read() == 2


@pytest.mark.parametrize("header", ["{}", '{"__metadata__": {}}'])
def test_no_tensors(refused, header):
    refused(image(header), MissingTensorError, "holds no tensors")


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "dir" / "x.safetensors").mkdir(parents=True)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(os.path.relpath(tmp_path / "socket.safetensors"))
    paths = ["/dev/zero", tmp_path / "fifo.safetensors", tmp_path / "socket.safetensors"]
    for path in [*paths, tmp_path / "dir"]:
        with pytest.raises(FileIOError, match="not a regular file"):
            safetensors.open_source(Path(path))
    with pytest.raises(FileIOError, match=r"gone\.safetensors: cannot open: No such file"):
        safetensors.open_source(tmp_path / "gone.safetensors")


def test_file_that_shrinks_while_open(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(100_000, np.float32)}, path)
    source = safetensors.open_source(path)
    os.truncate(path, 50_000)
    with pytest.raises(FileIOError, match=r"model\.safetensors: the file became shorter while"):
        source.tensors["a"].read()
    with pytest.raises(FileIOError, match="changed while it was read"):
        source.check_unchanged()


def test_file_replaced_while_open_is_still_the_old_one(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.arange(3)}, path)
    source = safetensors.open_source(path)
    save_file({"a": np.arange(2)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    np.testing.assert_array_equal(source.tensors["a"].read(), np.arange(3))
    source.check_unchanged()


# ---------------------------------------------------------------- which file of a directory


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        save_file({"a": np.zeros(1)}, directory / name)
    return directory


def test_directory_with_one_file(tmp_path):
    source = safetensors.open_source(fill(tmp_path, "consolidated.safetensors", "._x.safetensors"))
    assert source.path == tmp_path
    assert source.files == (tmp_path / "consolidated.safetensors",)
    assert source.notes == []


def test_directory_with_the_usual_name_and_others(tmp_path):
    source = safetensors.open_source(fill(tmp_path, "model.safetensors", "adapter.safetensors"))
    assert source.files == (tmp_path / "model.safetensors",)
    assert source.notes == ["not part of the checkpoint that was opened: adapter.safetensors."]


def test_directory_with_file_and_index(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True)
    fill(tmp_path, "model.safetensors")
    with pytest.raises(FormatError, match=r"ambiguous: .*model\.safetensors, model.*index\.json"):
        safetensors.open_source(tmp_path)
    assert len(safetensors.open_source(tmp_path / SUFFIX_INDEX).tensors) == 46


def test_directory_with_stale_shard(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True)
    fill(tmp_path, "model-00001-of-00009.safetensors")
    notes = safetensors.open_source(tmp_path).notes
    assert notes == [
        "not part of the checkpoint that was opened: model-00001-of-00009.safetensors."
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_directory_with_shards_but_no_index(tmp_path, count):
    fill(tmp_path, *(f"model-0000{i}-of-00002.safetensors" for i in range(1, count + 1)))
    with pytest.raises(FormatError, match="one of several shards and their index is missing"):
        safetensors.open_source(tmp_path)
    assert safetensors.open_source(tmp_path / "model-00001-of-00002.safetensors").tensors


def test_directory_with_two_or_none(tmp_path):
    with pytest.raises(FormatError, match=r"no \.safetensors file is here\. Fix: "):
        safetensors.open_source(tmp_path)
    fill(tmp_path, "x.safetensors", "y.safetensors")
    with pytest.raises(FormatError, match=r"ambiguous.*x\.safetensors, y\.safetensors\. Fix: "):
        safetensors.open_source(tmp_path)


def test_directory_that_may_not_be_listed(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)  # chmod does not stop root
    with pytest.raises(FileIOError, match="cannot list: Permission denied"):
        safetensors.open_source(tmp_path)


# ---------------------------------------------------------------- plans

OUTSIDE = re.compile(r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|^[^/\\]*:[/\\]")
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda n: n.isprintable() and not OUTSIDE.search(n) and n != "__metadata__"
)
SLOTS = st.lists(
    st.builds(
        Slot,
        NAMES,
        st.sampled_from([row.dtype for row in TABLE]),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda s: s.name,
)


def arrays_of(slots) -> dict[str, np.ndarray]:
    arrays = {s.name: random_array(i, s.dtype, s.shape) for i, s in enumerate(slots)}
    # NumPy may turn a bool of other bits into 1 when it copies
    bits = {n: np.asarray(a.view(np.uint8) % 2 == 1) for n, a in arrays.items() if a.dtype == bool}
    return arrays | bits


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@settings(max_examples=50, deadline=None)
@given(SLOTS, st.none() | st.integers(1, 300))
def test_plan_materialise_open(tmp_path_factory, slots, size):
    directory = tmp_path_factory.mktemp("plan")
    arrays = arrays_of(slots)
    plan = safetensors.plan(slots, max_shard_size=size)
    assert plan == safetensors.plan(slots, max_shard_size=size)
    assert list(plan.chunks) == [s.name for s in slots]
    materialise(plan, arrays, directory)
    source = safetensors.open_source(directory)
    assert [n for n in source.notes if "differ in dtype" not in n] == []
    assert source.metadata == {"format": "pt"}
    assert set(source.tensors) == set(arrays)
    assert [n for n, t in source.tensors.items() if not same(t.read(), arrays[n])] == []
    found: dict[str, str] = {}
    for path in source.files:
        data = path.read_bytes()
        held = {name: arrays[name] for name, _ in official.deserialize(data)}
        assert data == save(held, {"format": "pt"}), "differs from the official writer's file"
        found |= dict.fromkeys(held, path.name)
    assert found == {name: chunk.file for name, (chunk,) in plan.chunks.items()}
    source.close()


@given(SLOTS)
def test_plan_aligns_every_tensor(slots):
    plan = safetensors.plan(slots)
    for slot in slots:
        (chunk,) = plan.chunks[slot.name]
        assert chunk.offset % slot.dtype.itemsize == 0
        assert (chunk.start, chunk.shape) == ((0,) * len(slot.shape), slot.shape)


def model_order() -> list[str]:
    """Gemma 2's tensors in the order of transformers' state dict."""
    linear = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    norms = [
        f"{w}_layernorm" for w in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ]
    layers = [f"layers.{i}.{part}" for i in range(4) for part in linear + norms]
    return [f"model.{n}.weight" for n in ["embed_tokens", *layers, "norm"]]


def official_slots() -> tuple[list[Slot], dict[str, np.ndarray]]:
    source = safetensors.open_source(OFFICIAL)
    slots = [Slot(n, source.tensors[n].dtype, source.tensors[n].shape) for n in model_order()]
    arrays = {n: t.read() for n, t in source.tensors.items()}
    source.close()
    return slots, arrays


def test_single_file_equals_transformers(tmp_path):
    slots, arrays = official_slots()
    materialise(safetensors.plan(slots), arrays, tmp_path)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    # model.safetensors of the same weights, written by save_pretrained of transformers 5.23
    assert digest == "e8d0cc52e2041764071cd9efd342bbf6bb98f8b5b00a7f3a3d5a44a43ef6af03"


def test_shards_equal_transformers(tmp_path):
    slots, arrays = official_slots()
    materialise(safetensors.plan(slots, max_shard_size=150_000), arrays, tmp_path)
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    expected = {p.name: p.read_bytes() for p in OFFICIAL.iterdir() if p.name != "config.json"}
    assert written == expected


@pytest.mark.parametrize("size", [None, 100_000])
def test_transformers_loads_the_plan(tmp_path, size):
    import torch
    from transformers import Gemma2ForCausalLM

    slots, arrays = official_slots()
    random.Random(0).shuffle(slots)
    materialise(safetensors.plan(slots, max_shard_size=size), arrays, tmp_path)
    shutil.copy(OFFICIAL / "config.json", tmp_path)
    model, info = Gemma2ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for name, array in arrays.items():
        loaded = state[name].view(torch.uint16).numpy()
        np.testing.assert_array_equal(loaded, array.view(np.uint16))


@pytest.mark.parametrize(
    ("slots", "error", "part"),
    [
        ([], MissingTensorError, "no tensors to write"),
        ([Slot("a", F32, (1,))] * 2, FormatError, '"a" is given to two tensors'),
        ([Slot("__metadata__", F32, (1,))], FormatError, "is the format's own"),
        ([Slot("../a", F32, (1,))], FormatError, "path out of the directory"),
        ([Slot("a", np.dtype(">f4"), (1,))], DtypeError, "not supported; supported are bf16"),
        ([Slot("a", np.dtype("U3"), (1,))], DtypeError, "not supported"),
    ],
)
def test_plan_refuses(slots, error, part):
    with pytest.raises(error, match=re.escape(part)):
        safetensors.plan(slots)


def test_plan_options():
    slots = [Slot("a", BF16, (4,)), Slot("b", BF16, (4,))]
    with pytest.raises(UsageError, match="at least 1 byte"):
        safetensors.plan(slots, max_shard_size=0)
    plan = safetensors.plan(slots, max_shard_size=8, stem="weights", metadata={})
    assert [f.name for f in plan.files] == [
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
        "weights.safetensors.index.json",
    ]
    assert b"__metadata__" not in plan.files[0].fixed[0][1]
    two = safetensors.plan(slots, metadata={"z": "1", "a": "é"}).files[0].fixed[0][1]
    assert '{"__metadata__":{"a":"é","z":"1"},'.encode() in two


# ---------------------------------------------------------------- reading


def test_rows_from_many_threads(tmp_path):
    array = np.arange(4000, dtype=np.int32).reshape(100, 5, 8)
    save_file({"x": np.zeros(3), "a": array}, tmp_path / "model.safetensors")
    tensor = safetensors.open_source(tmp_path).tensors["a"]
    wrong: list[int] = []

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(50):
            a, b = sorted(chosen.choices(range(101), k=2))
            index = chosen.choice([(slice(a, b),), (slice(a, b), 3), (a % 100, slice(1, 4))])
            if not np.array_equal(tensor.read(index), array[index]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_import_is_light():
    code = (
        "import sys, g2kit.formats.safetensors;"
        "print([m for m in ('torch', 'jax', 'transformers', 'safetensors') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


VALID = save(
    {
        "emb": np.arange(6, dtype=np.float32).reshape(2, 3),
        "norm": np.arange(4, dtype=np.float16),
        "mask": np.array([True, False]),
    },
    {"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
NUMBERS = [b"0", b"1", b"-1", b"4", b"24", b"32", b"1e3", b"2.0", b"18446744073709551616", b"null"]


@st.composite
def mutants(draw) -> bytes:
    """A valid file with a few bytes, numbers or pieces of its header replaced; length kept right or not."""
    header = bytearray(VALID[8:HEADER_END])
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "insert", "delete", "number", "copy"]))
        at = draw(st.integers(0, max(len(header) - 1, 0)))
        if kind == "number":
            spans = [m.span() for m in re.finditer(rb"\d+", header)]
            if spans:
                a, b = draw(st.sampled_from(spans))
                header[a:b] = draw(st.sampled_from(NUMBERS))
        elif kind == "flip":
            header[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            piece = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"[", b",", b"\\u"]))
            header[at:at] = piece
        else:
            end = min(len(header), at + draw(st.integers(1, 40)))
            header[at:end] = header[at:end] * (2 if kind == "copy" else 0)
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1) | st.integers(0, 400))
    return length.to_bytes(8, "little") + bytes(header) + VALID[HEADER_END:]


@settings(
    max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(mutants())
def test_mutated_headers(tmp_path, data):
    """Only our own errors, and never accepting what the official reader refuses or reads otherwise."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    try:
        source = safetensors.open_source(path)
    except G2Error as e:
        assert str(e).startswith(str(path))  # noqa: PT017
        return
    theirs = {n: (i["dtype"], i["shape"], bytes(i["data"])) for n, i in official.deserialize(data)}
    ours = {t.name: (t.stored, list(t.shape), t.read().tobytes()) for t in source.tensors.values()}
    assert ours == theirs
    source.close()
