import json
import os
import shutil
from pathlib import Path
from typing import cast

import hypothesis.strategies as st
import numpy as np
import pytest
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from refusals import refusal
from safetensors.numpy import save_file

from g2kit.formats import safetensors, sharded
from g2kit.formats.base import QuantizedWeight, Slot, Source
from g2kit.formats.dtypes import BF16, F32
from g2kit.formats.errors import (
    ExtraTensorError,
    FileIOError,
    FormatError,
    G2Error,
    LimitError,
    MissingTensorError,
    UnsafePathError,
    UsageError,
)

OFFICIAL = Path(__file__).parent / "data" / "hf_sharded"
INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
TENSORS = {
    A: {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float32)},
    B: {"c": np.array(7, np.float32), "d": np.ones((1, 2), np.float32)},
}


def write(directory: Path, shards=TENSORS, weight_map=None, metadata=None, tag="pt") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, directory / file, {"format": tag})
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": metadata or {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return directory / INDEX


def refused(path: Path, error: type[G2Error], *parts: str) -> None:
    refusal(lambda: safetensors.open_source(path), error, *parts)


def test_join(tmp_path):
    source = safetensors.open_source(write(tmp_path, metadata={"total_size": 13 * 4}))
    assert list(source.tensors) == ["a", "b", "c", "d"]
    for tensors in TENSORS.values():
        for name, array in tensors.items():
            np.testing.assert_array_equal(source.tensors[name].read(), array)
    assert source.files == (tmp_path / A, tmp_path / B)
    assert source.path == tmp_path / INDEX
    assert source.metadata == {"format": "pt"}
    assert source.notes == []
    assert source.tensors["c"].where == tmp_path / B
    source.check_unchanged()
    (tmp_path / B).write_bytes(b"")
    with pytest.raises(FileIOError, match=r"00002-of-00002.*changed while it was read"):
        source.check_unchanged()
    with pytest.raises(FileIOError, match=r"00002-of-00002.*became shorter"):
        source.tensors["d"].read()
    source.close()
    with pytest.raises(FileIOError, match="read failed"):
        source.tensors["a"].read()


def test_directory_and_official_index():
    source = safetensors.open_source(OFFICIAL)
    assert source.notes == []  # totals included
    assert len(source.tensors) == 46
    assert sharded.load_index(OFFICIAL / INDEX) == {
        name: t.where.name for name, t in source.tensors.items()
    }
    source.close()


# ---------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x.safetensors", "leaves the directory"),
        ("..\\x.safetensors", "leaves the directory"),
        ("..", "leaves the directory"),
        (".", "leaves the directory"),
        ("", "is empty"),
        ("sub/../../x.safetensors", "has a path separator"),
        ("sub/x.safetensors", "has a path separator"),
        ("sub\\x.safetensors", "has a path separator"),
        ("/etc/passwd", "is an absolute path"),
        ("\\\\host\\share\\x", "is an absolute path"),
        ("C:\\x.safetensors", "has a path separator"),
        ("C:x.safetensors", "names a drive"),
        ("https://example.org/x.safetensors", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("x\0.safetensors", "has control characters"),
        ("x\n.safetensors", "has control characters"),
        ("é" * 128, "is longer than 255 bytes"),
    ],
)
def test_unsafe_file_names(tmp_path, name, why):
    save_file({"out": np.zeros(1)}, tmp_path / "x.safetensors")  # what ../x would find
    index = write(tmp_path / "in", weight_map={"a": A, "out": name})
    refused(index, UnsafePathError, f"{INDEX}: file name ", why, "Fix: ")
    refused(index.parent, UnsafePathError, why)
    with pytest.raises(UnsafePathError):
        sharded.load_index(index)


def test_link_out_of_the_directory(tmp_path):
    index = write(tmp_path / "in")
    (index.parent / B).replace(tmp_path / B)
    (index.parent / B).symlink_to(tmp_path / B)
    refused(index, UnsafePathError, f"in/{B}: this symbolic link leads to {tmp_path / B}", "Fix: ")


def test_link_inside_the_directory(tmp_path):
    index = write(tmp_path)
    (tmp_path / "stored").mkdir()
    (tmp_path / B).replace(tmp_path / "stored" / "x")
    (tmp_path / B).symlink_to("stored/x")
    assert safetensors.open_source(index).tensors["c"].read() == 7


def test_link_loop(tmp_path):
    index = write(tmp_path)
    (tmp_path / B).unlink()
    (tmp_path / B).symlink_to("loop")
    (tmp_path / "loop").symlink_to(B)
    refused(index, UnsafePathError, f"{B}: symbolic links form a loop")


def test_link_that_cannot_be_followed(tmp_path):
    index = write(tmp_path)
    (tmp_path / B).unlink()
    (tmp_path / B).symlink_to(f"{A}/x")
    refused(index, FileIOError, f"{B}: cannot follow the link: Not a directory")


def cached(root: Path, subfolder: str = "") -> Path:
    """A repository in Hugging Face's cache: snapshots/<revision>/ of links into blobs/."""
    snapshot = root / "snapshots" / "0123abcd" / subfolder
    write(snapshot)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = root / "blobs" / f"{number:064x}"
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / INDEX


@pytest.mark.parametrize("subfolder", ["", "part"])
def test_hugging_face_cache(tmp_path, subfolder, monkeypatch):
    index = cached(tmp_path / "models--google--gemma-2-2b", subfolder)
    assert list(safetensors.open_source(index.parent).tensors) == ["a", "b", "c", "d"]
    monkeypatch.chdir(index.parent)
    assert list(safetensors.open_source(Path(INDEX)).tensors) == ["a", "b", "c", "d"]


def test_hugging_face_cache_of_another_repository(tmp_path):
    index = cached(tmp_path / "mine")
    other = cached(tmp_path / "other")
    shard = index.parent / B
    shard.unlink()
    shard.symlink_to((other.parent / B).resolve())
    refused(index, UnsafePathError, "outside its directory")


def test_blobs_that_are_a_link_themselves(tmp_path):
    index = cached(tmp_path / "mine")
    shutil.move(tmp_path / "mine" / "blobs", tmp_path / "elsewhere")
    (tmp_path / "mine" / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(index, UnsafePathError, "outside its directory")


# ---------------------------------------------------------------- shards against index


def test_missing_shards_are_listed_together(tmp_path):
    index = write(tmp_path)
    (tmp_path / A).unlink()
    (tmp_path / B).unlink()
    (tmp_path / B).symlink_to("pruned")
    parts = "2 of 2 shards are missing, with 4 tensors", f"{A} (a, b)", f"{B} (c, d)", "Fix: "
    refused(index, MissingTensorError, *parts)


def test_a_hundred_missing_shards(tmp_path):
    index = write(tmp_path, weight_map={f"t{i}": f"f{i:03}" for i in range(100)} | {"a": A})
    refused(index, MissingTensorError, "100 of 101 shards", "f019 (t19); and 80 more shards.")


def test_tensor_in_map_but_not_in_shard(tmp_path):
    weight_map = {"a": A, "b": A, "c": B, "d": B, "e": B, "f": A}
    index = write(tmp_path, weight_map=weight_map)
    refused(index, MissingTensorError, "2 tensors are not in", f"e ({B}), f ({A})", "Fix: ")


def test_tensor_in_shard_but_not_in_map(tmp_path):
    index = write(tmp_path, weight_map={"a": A, "c": B})
    refused(index, ExtraTensorError, "2 tensors are in the shards", f"b ({A}), d ({B})", "Fix: ")


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (np.arange(4, dtype=np.float32), True),
        (np.arange(4, dtype=np.float32) + 1, False),
        (np.arange(4, dtype=np.float32).reshape(4, 1), False),
        (np.arange(4, dtype=np.float32).view(np.int32), False),
    ],
)
def test_tensor_in_two_shards(tmp_path, monkeypatch, other, equal):
    monkeypatch.setattr(sharded, "_COMPARE_BYTES", 8)  # in blocks of two rows
    shards = {A: TENSORS[A], B: {**TENSORS[B], "b": other}}
    weight_map = {"a": A, "b": A, "c": B, "d": B}
    index = write(tmp_path, shards, weight_map)
    if not equal:
        refused(index, FormatError, f"{B}: b: two shards hold different values", "F32 [4]")
        return
    source = safetensors.open_source(index)
    assert source.notes == [f"b is in {A} and again, equal, in {B}."]
    assert source.tensors["b"].where == tmp_path / A


def test_nan_in_two_shards_is_compared_as_bytes(tmp_path):
    nan = np.array([np.nan, -0.0], np.float32)
    index = write(tmp_path, {A: {"a": nan}, B: {"a": nan, "b": nan}}, {"a": A, "b": B})
    assert len(safetensors.open_source(index).notes) == 1
    other = np.array([np.nan, 0.0], np.float32)
    index = write(tmp_path, {A: {"a": nan}, B: {"a": other, "b": nan}}, {"a": A, "b": B})
    refused(index, FormatError, "different values")


@pytest.mark.parametrize("total", [1, "52", None, 52.5])
def test_wrong_totals(tmp_path, total):
    index = write(tmp_path, metadata={"total_size": total, "total_parameters": 13})
    notes = safetensors.open_source(index).notes
    assert notes == [f"the index's total_size is {total}, the shards hold 52."]


def test_totals_of_quantized_tensors_are_not_checked(tmp_path):
    def opened(path: Path) -> Source:
        source = safetensors.open_source(path)
        source.tensors["a"].quantized = cast(QuantizedWeight, object())
        return source

    index = write(tmp_path, {A: TENSORS[A]}, metadata={"total_size": 1})
    assert sharded.join(index, opened, "torch").notes == []
    assert sharded.join(index, safetensors.open_source, "torch").notes != []


def test_signs_of_mixed_revisions(tmp_path):
    write(tmp_path)
    save_file(TENSORS[B], tmp_path / B, {"format": "np"})
    notes = safetensors.open_source(tmp_path).notes
    assert notes == [f"{A} and {B} differ in metadata; they may be of two revisions."]
    halves = {n: t.astype(np.float16) for n, t in TENSORS[B].items()}
    save_file(halves, tmp_path / B, {"format": "pt"})
    notes = safetensors.open_source(tmp_path).notes
    assert notes == [f"{A} and {B} differ in dtype (F32, F16); they may be of two revisions."]
    other = "model-00002-of-00003.safetensors"
    index = write(tmp_path / "x", {A: TENSORS[A], other: TENSORS[B]})
    notes = safetensors.open_source(index).notes
    assert notes == ["shards number themselves of 00002 and of 00003 files."]


# ---------------------------------------------------------------- the index itself


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        ("", FormatError, "not JSON"),
        ("[]", FormatError, "must be a JSON object, found an array"),
        ("{}", FormatError, "needs an object under weight_map, found nothing"),
        ('{"weight_map": [1]}', FormatError, "under weight_map, found an array"),
        ('{"weight_map": {}}', MissingTensorError, "names no tensor"),
        ('{"weight_map": {"a": 1}}', FormatError, "a: weight_map must name a file, found a number"),
        ('{"weight_map": {"a": "x", "a": "y"}}', FormatError, 'key "a" appears twice'),
        ('{"weight_map": {"a\\nb": "x"}}', FormatError, 'name "a\\nb" has control characters'),
        ("[" * 100_000, LimitError, "nests 100000 deep"),
    ],
)
def test_damaged_index(tmp_path, text, error, part):
    index = tmp_path / INDEX
    index.write_text(text)
    refused(index, error, f"{INDEX}: ", part)


def test_index_of_a_gigabyte(tmp_path):
    with (tmp_path / INDEX).open("wb") as f:
        f.truncate(1 << 30)
    refused(tmp_path, LimitError, "has 1073741824 bytes")


def test_index_or_shard_that_is_no_file(tmp_path):
    index = write(tmp_path)
    (tmp_path / B).unlink()
    os.mkfifo(tmp_path / B)
    refused(index, FileIOError, f"{B}: not a regular file")
    refused(tmp_path / "absent.index.json", FileIOError, "cannot open: No such file")


FILE_NAMES = st.text("ab./\\:\0é", max_size=6) | st.none() | st.lists(st.integers(), max_size=1)
INDICES = st.fixed_dictionaries(
    {}, optional={"weight_map": st.dictionaries(st.text(max_size=4), FILE_NAMES) | st.none()}
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(INDICES)
def test_any_index_gives_plain_names_or_an_error(tmp_path, content):
    path = tmp_path / INDEX
    path.write_text(json.dumps(content))
    try:
        weight_map = sharded.load_index(path)
    except G2Error:
        return
    assert weight_map == content["weight_map"]
    assert all((tmp_path / f).resolve().parent == tmp_path for f in weight_map.values())


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 << 20),
        ("2.5 GB", 2_500_000_000),
        ("1", 1),
        ("1234567B", 1234567),
        (" 3tib ", 3 << 40),
        ("0.5kB", 500),
        ("9007199254740993", 2**53 + 1),
        ("0.1GB", 10**8),
    ],
)
def test_parse_size(text, size):
    assert sharded.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5G", "-5GB", "5 XB", "1e9", "0", "0.0001B", "5GBs", "nan", "٣GB", "1.MB"]
)
def test_parse_size_refuses(text):
    with pytest.raises(UsageError, match=r"is not a size\. Fix: .* such as 5GB"):
        sharded.parse_size(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=30), st.integers(1, 60))
def test_assign_shards_splits_as_the_official_library(sizes, limit):
    import torch

    slots = [Slot(f"t{i}", F32, (n,)) for i, n in enumerate(sizes)]
    ours = sharded.assign_shards(slots, limit)
    assert sorted(s.name for shard in ours for s in shard) == sorted(s.name for s in slots)
    assert all(len(x) == 1 or sum(s.nbytes for s in x) <= limit for x in ours)
    state = {s.name: torch.zeros(s.shape) for s in slots if s.nbytes}  # empty ones share storage
    official = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    ours = sharded.assign_shards([s for s in slots if s.nbytes], limit)
    files = sharded.shard_names("model", len(ours), ".safetensors") if ours else []
    expected = {f: [s.name for s in x] for f, x in zip(files, ours, strict=True)}
    assert expected == official.filename_to_tensors


def test_shard_size_of_nothing():
    with pytest.raises(UsageError, match="at least 1 byte, found 0"):
        sharded.assign_shards([], 0)


def test_shard_names():
    assert sharded.shard_names("model", 1, ".safetensors") == ["model.safetensors"]
    assert sharded.shard_names("model", 2, ".safetensors") == [A, B]
    assert sharded.shard_names("pytorch_model", 3, ".bin")[2] == "pytorch_model-00003-of-00003.bin"


def test_index_file_equals_the_official_one():
    source = safetensors.open_source(OFFICIAL)
    held: dict[str, list[Slot]] = {f.name: [] for f in reversed(source.files)}
    for t in reversed(source.tensors.values()):
        held[t.where.name].append(Slot(t.name, t.dtype, t.shape))
    plan = sharded.index_file(INDEX, held)
    assert plan.fixed == ((0, (OFFICIAL / INDEX).read_bytes()),)
    assert plan.size == (OFFICIAL / INDEX).stat().st_size
    source.close()


def test_index_file_counts_scalars():
    plan = sharded.index_file("i", {"f": [Slot("s", BF16, ()), Slot("z", BF16, (0, 3))]})
    content = json.loads(plan.fixed[0][1])
    assert content["metadata"] == {"total_parameters": 1, "total_size": 2}
    assert content["weight_map"] == {"s": "f", "z": "f"}
