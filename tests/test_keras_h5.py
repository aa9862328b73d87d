"""Keras weights: files of Keras itself, files of ours, files that lie."""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import h5py
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from plan_writer import materialise, random_array

from g2kit.formats import hdf5_process, hdf5_skeleton, keras_h5
from g2kit.formats.base import RowTensor, Slot
from g2kit.formats.dtypes import BF16, F16, F32, F64, I8
from g2kit.formats.errors import (
    DependencyError,
    DtypeError,
    ExtraTensorError,
    FileIOError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    MissingTensorError,
    TruncatedError,
    UnsafePathError,
    UsageError,
)
from g2kit.formats.hdf5_process import Hdf5Process

DATA = Path(__file__).parent / "data" / "keras"
PRESET = DATA / "preset"
FUZZ = 120  # mutations of every kind of file
BLOCK = (
    "pre_attention_norm", "post_attention_norm", "attention/query_dense", "attention/key_dense",
    "attention/value_dense", "attention/output_dense", "pre_ffw_norm", "post_ffw_norm",
    "gating_ffw", "gating_ffw_2", "ffw_linear",
)  # fmt: skip


def keras_order(layers: int) -> list[str]:
    """Variables in the order of ``GemmaBackbone.weights``, by which the data files were filled."""
    blocks = ["layers/gemma_decoder_block" + (f"_{i}" if i else "") for i in range(layers)]
    names = [f"{block}/{leaf}" for block in blocks for leaf in BLOCK]
    return [
        f"{n}/vars/0" for n in ("layers/reversible_embedding", *names, "layers/rms_normalization")
    ]


def filled(k: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What variable number k of the data files was set to."""
    return (
        (((np.arange(np.prod(shape)) * 7 + k * 31) % 251 - 125) / 64).reshape(shape).astype(dtype)
    )


def assert_official(source, layers: int, dtype: np.dtype) -> None:
    assert set(source.tensors) == set(keras_order(layers))
    for k, name in enumerate(keras_order(layers)):
        tensor = source.tensors[name]
        assert (tensor.name, tensor.dtype) == (name, dtype)
        assert tensor.read().tobytes() == filled(k, tensor.shape, dtype).tobytes(), name


@pytest.fixture(scope="module")
def process():
    """One child for many files: starting it is the expensive part."""
    process = Hdf5Process(cpu_seconds=1)
    yield process
    process.close()


@pytest.fixture
def hand_made(tmp_path, process):
    """Opens a file that a function writes with h5py."""

    def make(fill, name="x.weights.h5", **options):
        path = tmp_path / name
        with h5py.File(path, "w", **options) as f:
            fill(f)
        return keras_h5.open_source(path, process=process)

    return make


def children() -> set[str]:
    task = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return set(task.read_text().split())


# ---------------------------------------------------------------- official files


def test_preset(process):
    source = keras_h5.open_source(PRESET, process=process)
    assert_official(source, 2, BF16)
    assert source.format == "keras_h5"
    assert source.metadata["prefix"] == ""
    assert source.metadata["extra"] == {}
    assert source.metadata["config"]["config"]["intermediate_dim"] == 24
    assert source.metadata["metadata"]["keras_hub_version"] == "0.32.0"
    assert source.files == (PRESET / "model.weights.h5",)
    assert source.notes == []
    assert all(isinstance(t, RowTensor) for t in source.tensors.values())
    assert source.tensors["layers/rms_normalization/vars/0"].stored == "bf16"


def test_file_of_a_preset_has_its_config(process, tmp_path):
    source = keras_h5.open_source(PRESET / "model.weights.h5", process=process)
    assert source.metadata["config"]["class_name"] == "GemmaBackbone"
    alone = tmp_path / "mine.weights.h5"
    shutil.copy(PRESET / "model.weights.h5", alone)
    (tmp_path / "config.json").write_text("not json")
    source = keras_h5.open_source(alone, process=process)
    assert "config" not in source.metadata
    assert_official(source, 2, BF16)


def test_config_of_another_library_is_not_the_presets(process, tmp_path):
    shutil.copy(PRESET / "model.weights.h5", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    assert "config" not in keras_h5.open_source(tmp_path, process=process).metadata


def test_task_with_optimizer(process):
    source = keras_h5.open_source(DATA / "task.weights.h5", process=process)
    assert_official(source, 1, F32)
    assert source.metadata["prefix"] == "layers/gemma_backbone/"
    extra = source.metadata["extra"]
    assert len(extra) == 28
    assert extra["optimizer/vars/0"] == "i32 []"
    assert extra["optimizer/vars/20"] == "f32 [8, 12]"
    assert source.notes == [
        "no weights of the model, left out: optimizer/vars/0, optimizer/vars/1, optimizer/vars/10, "
        "optimizer/vars/11 and 24 more."
    ]


@pytest.mark.parametrize("path", [DATA, DATA / "model.weights.json"])
def test_sharded(process, path):
    source = keras_h5.open_source(path, process=process)
    assert_official(source, 2, BF16)
    assert source.path == path
    assert [f.name for f in source.files] == [f"model_0000{n}.weights.h5" for n in range(3)]
    assert source.notes == []


def test_process_ends_with_the_source(tmp_path):
    before = children()
    source = keras_h5.open_source(PRESET)
    assert children() == before, "contiguous data need no process"
    assert_official(source, 2, BF16)
    source.check_unchanged()
    source.close()
    source.close()

    path = tmp_path / "packed.weights.h5"
    with h5py.File(path, "w") as f:
        f.create_dataset("layers/a/vars/0", data=np.arange(12.0, dtype="f4"), chunks=(5,))
    source = keras_h5.open_source(path)
    assert len(children() - before) == 1
    assert source.tensors["layers/a/vars/0"].read()[11] == 11
    source.close()
    assert children() == before
    for broken in (path.with_name("none.weights.h5"), tmp_path / "bad.weights.h5"):
        broken.write_bytes(b"\x89HDF\r\n\x1a\n") if broken.name.startswith("bad") else None
        with pytest.raises(G2Error):
            keras_h5.open_source(broken)
    assert children() == before


def test_changed_file_is_noticed(process, tmp_path):
    path = tmp_path / "x.weights.h5"
    shutil.copy(PRESET / "model.weights.h5", path)
    source = keras_h5.open_source(path, process=process)
    source.check_unchanged()
    with path.open("ab") as f:
        f.write(b"more")
    with pytest.raises(FileIOError, match="changed"):
        source.check_unchanged()


def test_reading_does_not_load_the_library():
    code = (
        "import sys; from pathlib import Path; from g2kit.formats import keras_h5;"
        f"s = keras_h5.open_source(Path({str(PRESET)!r}));"
        "[t.read() for t in s.tensors.values()]; assert 'h5py' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["mit Leer zeichen", "\u00fcml\u00e4ut", "odd\udcff\n"])
def test_any_path(process, tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    with h5py.File(os.fsencode(directory / "model.weights.h5"), "w") as f:
        f.create_dataset("layers/a/vars/0", data=np.ones(4, "f4"), chunks=(2,))
    source = keras_h5.open_source(directory, process=process)
    assert source.tensors["layers/a/vars/0"].read().tolist() == [1] * 4


# ---------------------------------------------------------------- other ways to store the same


def keras_save(group: h5py.Group, array: np.ndarray, **options) -> None:
    d = group.create_dataset("0", data=array, **options)
    if array.dtype == BF16:
        d.attrs["dtype"] = "bfloat16"


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64, np.dtype(np.int8)])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunks": (3, 4)}, {"chunks": (4, 2), "compression": "gzip", "shuffle": True}],
    ids=["contiguous", "chunked", "gzip"],
)
def test_storage_kinds(hand_made, libver, dtype, options):
    array = random_array(1, dtype, (11, 9))
    source = hand_made(
        lambda f: keras_save(f.create_group("layers/a/vars"), array, **options), libver=libver
    )
    tensor = source.tensors["layers/a/vars/0"]
    assert isinstance(tensor, RowTensor) == (not options)
    for index in ((), (slice(2, 7),), (3,), (slice(4, 4),), (slice(1, 9), slice(2, 5)), (10, 3)):
        found = tensor.read(index)
        assert found.flags.c_contiguous
        assert found.dtype == dtype
        assert found.tobytes() == np.ascontiguousarray(array[index]).tobytes()


def test_scalar_empty_and_compact(hand_made):
    def fill(f):
        g = f.create_group("layers/a/vars")
        g.create_dataset("0", data=np.float32(2.5))
        g.create_dataset("1", shape=(0, 4), dtype="f4")
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        d = h5py.h5d.create(g.id, b"2", h5py.h5t.IEEE_F32LE, space, plist)
        d.write(space, space, np.array([1, 2, 3], "f4"))

    tensors = hand_made(fill).tensors
    assert tensors["layers/a/vars/0"].read() == 2.5
    assert tensors["layers/a/vars/0"].shape == ()
    assert tensors["layers/a/vars/1"].read().shape == (0, 4)
    assert tensors["layers/a/vars/2"].stored == "f32 compact"
    assert tensors["layers/a/vars/2"].read((slice(1, 3),)).tolist() == [2, 3]


def test_bfloat16_as_an_hdf5_float_type(hand_made):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    array = random_array(2, BF16, (5,))

    def fill(f):
        space = h5py.h5s.create_simple((5,))
        d = h5py.h5d.create(f.create_group("layers/a/vars").id, b"0", kind, space)
        d.write(space, space, array.view("V2"), kind)

    tensor = hand_made(fill).tensors["layers/a/vars/0"]
    assert tensor.dtype == BF16
    assert tensor.read().tobytes() == array.tobytes()


def test_packed_reads_in_blocks_and_from_threads(hand_made, monkeypatch):
    from g2kit.formats import hdf5_reader

    monkeypatch.setattr(hdf5_reader, "BLOCK_BYTES", 100)
    array = np.arange(240, dtype="f4").reshape(40, 6)
    source = hand_made(
        lambda f: f.create_dataset("layers/a/vars/0", data=array, chunks=(7, 6), compression="gzip")
    )
    tensor = source.tensors["layers/a/vars/0"]
    failures = []

    def read(start):
        if not np.array_equal(tensor.read((slice(start, start + 20),)), array[start : start + 20]):
            failures.append(start)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(0, 20, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


@pytest.mark.parametrize("prefix", ["", "backbone/", "layers/gemma_backbone/"])
@pytest.mark.parametrize("layers", ["layers", "_layer_checkpoint_dependencies"])
def test_prefixes(hand_made, prefix, layers):
    def fill(f):
        keras_save(f.create_group(f"{prefix}{layers}/a/vars"), np.ones(3, "f4"))
        keras_save(f.create_group(f"{prefix}{layers}/b/vars"), np.ones(3, "f4"))
        keras_save(f.create_group(f"{prefix}{layers}/b/seed_generator/vars"), np.ones(2, "u4"))
        keras_save(f.create_group("head/vars"), np.ones(2, "f4"))
        f.create_group("_layer_checkpoint_dependencies/unused/vars")
        f.create_dataset("optimizer/vars/0", data="text")

    source = hand_made(fill)
    assert list(source.tensors) == ["layers/a/vars/0", "layers/b/vars/0"]
    assert source.metadata["prefix"] == prefix
    assert set(source.metadata["extra"]) == {
        "head/vars/0", f"{prefix}{layers}/b/seed_generator/vars/0", "optimizer/vars/0",
    }  # fmt: skip
    json.dumps(source.metadata)


def test_no_layers_at_all(hand_made):
    source = hand_made(lambda f: keras_save(f.create_group("vars"), np.ones(3, "f4")))
    assert list(source.tensors) == ["vars/0"]
    assert source.metadata["extra"] == {}


# ---------------------------------------------------------------- files that lie


def refused(kind, match, open_, *, tensor=None):
    with pytest.raises(kind, match=match) as e:
        open_()
    assert type(e.value) is kind
    assert e.value.where is not None
    if tensor:
        assert e.value.tensor == tensor
    assert "\n" not in str(e.value)


A = "layers/a/vars/0"


@pytest.mark.parametrize(
    ("content", "kind", "match"),
    [
        (b"", TruncatedError, "empty; likely an interrupted download"),
        (b"\x89HDF", FormatError, "not an HDF5 file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            FormatError,
            "git lfs pull",
        ),
        (b"PK\x03\x04" + bytes(60), FormatError, "zip archive .*unpack it"),
        (b"GGUF" + bytes(60), FormatError, "begins with b'GGUF"),
        (b"\x89HDF\r\n\x1a\n", FormatError, "HDF5 cannot read it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(500), FormatError, "HDF5 cannot read it"),
    ],
)
def test_not_hdf5(process, tmp_path, content, kind, match):
    path = tmp_path / "model.weights.h5"
    path.write_bytes(content)
    refused(kind, match, lambda: keras_h5.open_source(path, process=process))


@pytest.mark.parametrize("cut", [1, 500, 60_000])
def test_truncated(process, tmp_path, cut):
    path = tmp_path / "model.weights.h5"
    path.write_bytes((PRESET / "model.weights.h5").read_bytes()[:-cut])
    refused(
        TruncatedError,
        "ends before its data do.*download or copy",
        lambda: keras_h5.open_source(path, process=process),
    )


def test_not_a_file(process, tmp_path):
    os.mkfifo(tmp_path / "fifo.weights.h5")
    for path in (tmp_path / "none.weights.h5", tmp_path / "fifo.weights.h5", Path("/dev/zero")):
        refused(
            FileIOError,
            "not a regular|No such",
            lambda p=path: keras_h5.open_source(p, process=process),
        )


def test_links(hand_made, tmp_path):
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as f:
        f["x"] = np.ones(3, "f4")
    refused(
        UnsafePathError,
        "links to other files, which are not followed: layers/a/vars/0",
        lambda: hand_made(lambda f: f.__setitem__(A, h5py.ExternalLink(str(other), "x"))),
    )

    def soft(f):
        f["real"] = np.ones(3, "f4")
        f[A] = h5py.SoftLink("/real")

    refused(UnsafePathError, "symbolic links, which are not followed", lambda: hand_made(soft))

    def hard(f):
        f[A] = np.ones(3, "f4")
        f["layers/b/vars/0"] = f[A]

    refused(LayoutError, "linked more than once: layers/b/vars/0", lambda: hand_made(hard))
    refused(
        LayoutError,
        "linked more than once: layers/loop",
        lambda: hand_made(lambda f: f.create_group("layers").__setitem__("loop", f["/"])),
    )


def test_data_elsewhere(hand_made, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(12))
    refused(
        UnsafePathError,
        "data kept in other files",
        lambda: hand_made(
            lambda f: f.create_dataset(A, (3,), "f4", external=[(str(secret), 0, 12)])
        ),
    )

    def virtual(f):
        layout = h5py.VirtualLayout(shape=(3,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=(3,))
        f.create_virtual_dataset(A, layout)

    refused(UnsafePathError, "virtual datasets", lambda: hand_made(virtual))


def test_types(hand_made):
    for array, match in (
        (np.ones(3, ">f4"), "stored as float of 4 bytes"),
        (np.zeros(3, "V2"), "stored as opaque of 2 bytes"),
        (np.ones(3, "c8"), "stored as compound of 8 bytes"),
        (np.array([b"abc"]), "stored as string of 3 bytes"),
        (np.ones(3, "?"), "stored as enumeration of 1 bytes"),
    ):
        refused(
            DtypeError,
            f"{match}.*supported are bf16",
            lambda a=array: hand_made(lambda f: f.__setitem__(A, a)),
            tensor=A,
        )

    def wrong_note(f):
        f[A] = np.ones(3, "f2")
        f[A].attrs["dtype"] = "bfloat16"

    refused(DtypeError, "float of 2 bytes|f16", lambda: hand_made(wrong_note), tensor=A)
    refused(
        DtypeError, "stored as", lambda: hand_made(lambda f: f.__setitem__(A, h5py.Empty("f4")))
    )
    refused(
        FormatError,
        "neither groups nor datasets: layers/kind",
        lambda: hand_made(lambda f: f.create_group("layers").__setitem__("kind", np.dtype("f4"))),
    )
    for note in (np.arange(3), "x" * 100_000, np.array(["bfloat16"] * 3, dtype=object)):

        def odd_note(f, note=note):
            f[A] = np.zeros(3, "V2")
            f[A].attrs["dtype"] = note

        with pytest.raises(G2Error):
            hand_made(odd_note, libver="latest")


def test_absent_data(hand_made):
    refused(
        TruncatedError,
        "has no data, expected 12 bytes: it was never written",
        lambda: hand_made(lambda f: f.create_dataset(A, (3,), "f4")),
        tensor=A,
    )

    def one_of_four(f):
        f.create_dataset(A, (8,), "f4", chunks=(2,))[:2] = 1

    refused(
        TruncatedError, "1 of 4 chunks are in the file", lambda: hand_made(one_of_four), tensor=A
    )


def test_bombs(hand_made):
    def declared(f):
        d = f.create_dataset(A, (1 << 40,), "f4", chunks=(1 << 10,), compression="gzip")
        d[:10] = 1

    refused(LimitError, "said to be packed into", lambda: hand_made(declared), tensor=A)

    def one_chunk(f):
        f.create_dataset(A, (1 << 29, 2), "f4", chunks=(1 << 28, 2), compression="gzip")

    refused(LimitError, "said to be packed into", lambda: hand_made(one_chunk), tensor=A)


def test_many_objects(hand_made, process, monkeypatch, tmp_path):
    refused(
        LimitError,
        "a path longer than 1024",
        lambda: hand_made(lambda f: f.create_group("a/" * 600)),
    )

    def many(f):
        for n in range(300):
            f.create_group(f"g{n}")

    script = (
        Path(hdf5_process._SCRIPT).read_text().replace("MAX_OBJECTS = 50_000", "MAX_OBJECTS = 99")
    )
    assert "= 99" in script
    (tmp_path / "child.py").write_text(script)
    monkeypatch.setattr(hdf5_process, "_SCRIPT", tmp_path / "child.py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as f:
        many(f)
    refused(
        LimitError, "more than 99 objects", lambda: keras_h5.open_source(tmp_path / "m.weights.h5")
    )
    refused(MissingTensorError, "holds no weights", lambda: hand_made(many))


@pytest.mark.parametrize("name", [b"a\x1b[31m", b"..", b"a\nb", b"a\xff"])
def test_names(hand_made, name):
    def fill(f):
        space = h5py.h5s.create_simple((1,))
        d = h5py.h5d.create(f.create_group("layers").id, name, h5py.h5t.IEEE_F32LE, space)
        d.write(space, space, np.ones(1, "f4"))

    refused(FormatError, "tensor name .*(control|path out)", lambda: hand_made(fill))


def test_overlap(process, tmp_path):
    slots = [Slot(f"layers/{n}/vars/0", F32, (4,)) for n in "ab"]
    plan = keras_h5.plan(slots)
    materialise(plan, {s.name: np.ones(4, F32) for s in slots}, tmp_path)
    path = tmp_path / "model.weights.h5"
    data = bytearray(path.read_bytes())
    a, b = (plan.chunks[s.name][0].offset for s in slots)
    at = data.index(b.to_bytes(8, "little") + (16).to_bytes(8, "little"))
    data[at : at + 8] = (a + 8).to_bytes(8, "little")
    path.write_bytes(data)
    refused(
        LayoutError,
        f"its bytes {a + 8} to {a + 24} overlap those of layers/a/vars/0, which end at {a + 16}",
        lambda: keras_h5.open_source(path, process=process),
        tensor="layers/b/vars/0",
    )
    data[at : at + 8] = (len(data) - 8).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(G2Error):
        keras_h5.open_source(path, process=process)
    data[at : at + 16] = b.to_bytes(8, "little") + (12).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(G2Error):
        keras_h5.open_source(path, process=process)


# ---------------------------------------------------------------- directories and indices


@pytest.fixture
def shards(tmp_path):
    directory = tmp_path / "shards"
    directory.mkdir()
    for path in DATA.glob("model*"):
        shutil.copy(path, directory)
    return directory


def edit_index(directory: Path, change) -> None:
    path = directory / "model.weights.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


NORM = "/layers/rms_normalization/vars"


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (lambda i: i["weight_map"].update({NORM: "../x"}), UnsafePathError, "leaves the directory"),
        (lambda i: i["weight_map"].update({NORM: "/etc/passwd"}), UnsafePathError, "absolute"),
        (
            lambda i: i["weight_map"].update({NORM: "model_00003.weights.h5"}),
            MissingTensorError,
            "1 of 4 files are missing: model_00003",
        ),
        (
            lambda i: i["weight_map"].update({NORM: "model_00000.weights.h5"}),
            MissingTensorError,
            r"not where the index says: layers/rms_normalization/vars \(model_00000",
        ),
        (lambda i: i["weight_map"].pop(NORM), ExtraTensorError, "1 groups are not in the index"),
        (lambda i: i["weight_map"].update({NORM: 3}), FormatError, "a file name or a list of them"),
        (
            lambda i: i["weight_map"].update({NORM: []}),
            FormatError,
            "a file name or a list of them",
        ),
        (lambda i: i.update(weight_map=[1]), FormatError, "found an array"),
        (lambda i: i.pop("weight_map"), FormatError, "found null"),
    ],
)
def test_bad_index(process, shards, change, kind, match):
    edit_index(shards, change)
    refused(kind, match, lambda: keras_h5.open_source(shards, process=process))


def test_shard_gone_and_wrong_total(process, shards):
    edit_index(shards, lambda i: i["metadata"].update(total_size=1.0))
    source = keras_h5.open_source(shards, process=process)
    assert source.notes == ["the index's total_size is 1, the files hold 2320 bytes."]
    (shards / "model_00001.weights.h5").unlink()
    refused(
        MissingTensorError,
        "1 of 3 files are missing: model_00001.weights.h5",
        lambda: keras_h5.open_source(shards, process=process),
    )


def test_two_files_hold_it(process, shards):
    shutil.copy(shards / "model_00002.weights.h5", shards / "copy.weights.h5")
    edit_index(
        shards,
        lambda i: [
            i["weight_map"].update({k: [v, "copy.weights.h5"]})
            for k, v in i["weight_map"].items()
            if "00002" in v
        ],
    )
    refused(
        FormatError,
        "two files hold it: copy.weights.h5 and model_00002",
        lambda: keras_h5.open_source(shards, process=process),
    )


def test_index_with_two_equal_keys(process, shards):
    path = shards / "model.weights.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{NORM}": "x",'))
    refused(FormatError, NORM, lambda: keras_h5.open_source(shards, process=process))


def test_directories(process, tmp_path):
    refused(FormatError, "neither model.weights.h5", lambda: keras_h5.open_source(tmp_path))
    shutil.copy(PRESET / "model.weights.h5", tmp_path / "mine.weights.h5")
    assert_official(keras_h5.open_source(tmp_path, process=process), 2, BF16)
    shutil.copy(PRESET / "model.weights.h5", tmp_path / "yours.weights.h5")
    refused(
        FormatError, "ambiguous.*mine.weights.h5, yours", lambda: keras_h5.open_source(tmp_path)
    )
    shutil.copy(PRESET / "model.weights.h5", tmp_path / "model.weights.h5")
    (tmp_path / "config.json").write_text("{")
    refused(FormatError, "JSON", lambda: keras_h5.open_source(tmp_path, process=process))
    (tmp_path / "model.weights.json").write_text("{}")
    refused(FormatError, "ambiguous", lambda: keras_h5.open_source(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.weights.h5").symlink_to(PRESET / "model.weights.h5")
    refused(UnsafePathError, "symbolic link", lambda: keras_h5.open_source(elsewhere))


# ---------------------------------------------------------------- the child process


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the HDF5 library crashes on it .SIGSEGV"),
        ("raise SystemExit(3)", "the process that reads HDF5 ended with status 3"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass",
            "comes to no end with it .stopped after 7 s",
        ),
        ("print('{\"datasets\":', end='')", "ended with status 0"),
    ],
)
def test_child_dies(monkeypatch, tmp_path, script, match):
    (tmp_path / "child.py").write_text(script)
    monkeypatch.setattr(hdf5_process, "_SCRIPT", tmp_path / "child.py")
    before = children()
    process = Hdf5Process(cpu_seconds=7)
    refused(FormatError, match, lambda: keras_h5.open_source(PRESET, process=process))
    assert children() == before
    monkeypatch.undo()
    assert_official(keras_h5.open_source(PRESET, process=process), 2, BF16)  # starts again
    process.close()


def test_child_dies_while_reading(hand_made, process):
    source = hand_made(
        lambda f: f.create_dataset(A, data=np.ones((4, 4), "f4"), chunks=(1, 4)),
        name="r.weights.h5",
    )
    path = source.path
    os.truncate(path, path.stat().st_size - 20)
    refused(
        TruncatedError, "ends before its data do", lambda: source.tensors[A].read(), tensor=None
    )


def test_no_h5py(monkeypatch):
    monkeypatch.setattr(hdf5_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install h5py"):
        keras_h5.open_source(PRESET)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DependencyError, match="pip install h5py"):
        keras_h5.plan([Slot(A, F32, (2,))])


def test_no_python(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(DependencyError, match="cannot start '/nonexistent/python'"):
        keras_h5.open_source(PRESET)


# ---------------------------------------------------------------- damaged files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few damaged bytes, preferably numbers that matter."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 8])):
        at = rng.randrange(len(out))
        kind = rng.randrange(5)
        if kind == 0:
            out[at] = rng.choice([0, 1, 2, 127, 128, 255])
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            numbers = [0, 8, 96, 2**31 - 1, 2**32, 2**63, 2**64 - 1, len(data), rng.randrange(9999)]
            at -= at % 8
            out[at : at + 8] = rng.choice(numbers).to_bytes(8, "little")
        elif kind == 3:
            other, size = rng.randrange(len(out)), rng.choice([1, 8, 64])
            out[at : at + size] = out[other : other + size]
        elif rng.random() < 0.2:
            del out[at:]
        if not out:
            break
    return bytes(out)


def small_file(path: Path, libver: str, options: dict) -> bytes:
    with h5py.File(path, "w", libver=libver) as f:
        for n in ("reversible_embedding", "gemma_decoder_block/attention/query_dense", "norm"):
            g = f.create_group(f"layers/{n}/vars")
            g.attrs["name"] = n
            keras_save(g, np.ones((8, 12), BF16), **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("libver", "options"),
    [
        ("earliest", {}),
        ("latest", {}),
        ("earliest", {"chunks": (4, 4), "compression": "gzip"}),
        ("latest", {"chunks": (4, 4)}),
    ],
    ids=["earliest", "latest", "gzip", "latest-chunked"],
)
def test_fuzz(process, tmp_path, libver, options):
    data = small_file(tmp_path / "valid.h5", libver, options)
    path = tmp_path / "x.weights.h5"
    rng = random.Random(libver + str(options))
    outcomes = {"read": 0}  # or error code -> how often, with a message of one line
    for _ in range(FUZZ):
        path.write_bytes(mutate(data, rng))
        try:
            source = keras_h5.open_source(path, process=process)
            for tensor in source.tensors.values():
                assert tensor.read().nbytes == tensor.nbytes
                assert tensor.nbytes <= 1100 * len(data)
            source.close()
            outcomes["read"] += 1
        except G2Error as e:
            outcomes[e.code] = outcomes.get(e.code, 0) + str(e).isprintable()
    assert outcomes["read"] > FUZZ // 20
    assert outcomes["E_FORMAT"] > FUZZ // 20
    assert sum(outcomes.values()) == FUZZ


def test_damaged_global_heap_comes_to_an_end(process, tmp_path):
    """The HDF5 library loops for ever over some of these; the data file's strings are kept there."""
    data = (PRESET / "model.weights.h5").read_bytes()
    heap = data.index(b"GCOL")
    path = tmp_path / "x.weights.h5"
    ended = 0
    for at, value in ((24, 0), (24, 2**63), (16 + 8, 2**64 - 1)):
        changed = bytearray(data)
        changed[heap + at : heap + at + 8] = value.to_bytes(8, "little")
        path.write_bytes(changed)
        try:
            assert_official(keras_h5.open_source(path, process=process), 2, BF16)
        except (FormatError, DtypeError):
            ended += 1
    assert ended > 0


# ---------------------------------------------------------------- writing

names = st.lists(
    st.text("abz_019", min_size=1, max_size=6), min_size=1, max_size=4, unique=True
).map(lambda parts: "/".join(["layers", *parts, "vars"]))
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def slot_lists(draw):
    groups = draw(st.lists(names, min_size=1, max_size=6, unique=True))
    dtypes = st.sampled_from([BF16, F16, F32, F64])
    return [Slot(f"{g}/{n}", draw(dtypes), draw(shapes)) for n, g in enumerate(groups)]


def written(slots, directory: Path, **options):
    plan = keras_h5.plan(slots, **options)
    arrays = {s.name: random_array(n, s.dtype, s.shape) for n, s in enumerate(slots)}
    materialise(plan, arrays, directory)
    return plan, arrays


@given(slot_lists(), st.none() | st.integers(1, 2000))
@settings(max_examples=60)
def test_inverse(tmp_path_factory, process, slots, limit):
    directory = tmp_path_factory.mktemp("inverse")
    _, arrays = written(slots, directory, max_shard_size=limit)
    source = keras_h5.open_source(directory, process=process)
    assert {n: (t.dtype, t.shape) for n, t in source.tensors.items()} == {
        s.name: (s.dtype, s.shape) for s in slots
    }
    for name, array in arrays.items():
        assert source.tensors[name].read().tobytes() == array.tobytes()
    assert source.notes == []
    source.close()
    shutil.rmtree(directory)


def test_structure_is_keras_own(process, tmp_path):
    """Groups, attributes, types and values equal those of the official file, as h5py sees them."""
    official = keras_h5.open_source(PRESET, process=process)
    slots = [Slot(t.name, t.dtype, t.shape) for t in official.tensors.values()]
    with h5py.File(PRESET / "model.weights.h5") as f:
        groups = {}
        f.visititems(
            lambda n, o: groups.__setitem__(n, dict(o.attrs)) if n.endswith("vars") else None
        )
        plan = keras_h5.plan(slots, groups=groups)
        materialise(plan, {n: t.read() for n, t in official.tensors.items()}, tmp_path)
        with h5py.File(tmp_path / "model.weights.h5") as g:
            assert described(g) == described(f)
            d = g["layers/rms_normalization/vars/0"]
            assert d.dtype == np.dtype("V2")
            assert d.id.get_type().get_tag() == b""
            note = h5py.h5a.open(d.id, b"dtype").get_type()
            assert note.is_variable_str()
            assert note.get_cset() == h5py.h5t.CSET_UTF8
            assert d.chunks is None
    assert 0.9 < plan.nbytes / (PRESET / "model.weights.h5").stat().st_size < 1.1


def described(file: h5py.File) -> dict:
    found = {}

    def note(name, item):
        value = (item.dtype, item.shape, item[()].tobytes()) if hasattr(item, "dtype") else None
        found[name] = (type(item), dict(item.attrs), value)

    file.visititems(note)
    return found


def test_h5py_reads_ours(tmp_path):
    slots = [
        Slot("layers/a/vars/0", F32, (3, 4)),
        Slot("layers/a/vars/1", F16, (5,)),
        Slot("layers/b/vars/0", BF16, (2, 2, 2)),
        Slot("vars/0", F64, ()),
        Slot("empty", F32, (0, 3)),
    ]
    _, arrays = written(slots, tmp_path, file_name="x.weights.h5", groups={"c/vars": {"name": "c"}})
    with h5py.File(tmp_path / "x.weights.h5") as f:
        assert f["c/vars"].attrs["name"] == "c"
        assert len(f["c/vars"]) == 0
        for name, array in arrays.items():
            stored = f[name][()]
            if array.dtype == BF16:
                assert f[name].attrs["dtype"] == "bfloat16"
                stored = np.array(f[name], dtype=ml_dtypes.bfloat16)  # as Keras reads it
            else:
                assert "dtype" not in f[name].attrs
                assert stored.dtype == array.dtype
            assert np.asarray(stored).tobytes() == array.tobytes()


def test_plan_is_deterministic():
    code = (
        "import hashlib, sys, numpy as np; from g2kit.formats import keras_h5;"
        "from g2kit.formats.base import Slot; from g2kit.formats.dtypes import BF16;"
        "import h5py, io; h5py.File(io.BytesIO(), 'w').create_dataset('x', data=np.ones(int(sys.argv[1])));"
        "slots = [Slot(f'layers/l{n}/vars/0', BF16, (n, 9)) for n in range(40)];"
        "plan = keras_h5.plan(slots, groups={f'layers/l{n}/vars': {'name': f'n{n}'} for n in range(50)},"
        "                     max_shard_size=3000);"
        "print(len(plan.files), hashlib.sha256(repr(plan).encode()).hexdigest())"
    )
    outputs = set()
    for seed, size in (("1", "1000"), ("2", "30000")):
        done = subprocess.run(
            [sys.executable, "-c", code, size],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        outputs.add(done.stdout)
        if len(outputs) == 1:
            time.sleep(1.1)  # a time stamp would differ
    assert len(outputs) == 1, outputs


def test_plan_of_a_large_model_costs_its_headers():
    slots = [Slot(f"layers/l{n}/vars/0", BF16, (1 << 20, 1 << 10)) for n in range(24)]
    tracemalloc.start()
    try:
        plan = keras_h5.plan(slots)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert plan.nbytes > 51_000_000_000
    assert sum(len(data) for _, data in plan.files[0].fixed) < 100_000
    offsets = [plan.chunks[s.name][0].offset for s in slots]
    assert offsets == sorted(offsets)


def test_shards_are_named_as_keras_names_them(process, tmp_path):
    slots = [Slot(f"layers/l{n}/vars/{k}", F32, (100,)) for n in range(3) for k in range(2)]
    plan, _ = written(slots, tmp_path, max_shard_size=1200, groups={"vars": {"name": "m"}})
    assert [f.name for f in plan.files] == [
        "model_00000.weights.h5", "model_00001.weights.h5", "model.weights.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "model.weights.json").read_text())
    assert index == {
        "metadata": {"total_size": 2400.0},
        "weight_map": {
            "/layers/l0/vars": "model_00000.weights.h5",
            "/layers/l1/vars": ["model_00000.weights.h5", "model_00001.weights.h5"],
            "/layers/l2/vars": "model_00001.weights.h5",
        },
    }
    assert len(keras_h5.open_source(tmp_path, process=process).tensors) == 6
    with h5py.File(tmp_path / "model_00000.weights.h5") as f:
        assert f["vars"].attrs["name"] == "m"


def test_plan_refuses():
    slot = Slot(A, F32, (2,))
    for kind, match, slots, options in (
        (MissingTensorError, "no tensors", [], {}),
        (FormatError, "two tensors have one name: layers/a/vars/0", [slot, slot], {}),
        (FormatError, "must end in .weights.h5", [slot], {"file_name": "model.h5"}),
        (FormatError, "must end in .weights.h5", [slot], {"file_name": ".weights.h5"}),
        (FormatError, "tensor name", [Slot("../a", F32, (2,))], {}),
        (FormatError, "a part of its path is empty", [Slot("a//b", F32, (2,))], {}),
        (FormatError, "a part of its path is empty", [Slot("a/./b", F32, (2,))], {}),
        (DtypeError, "bf16, f16, f32 or f64, found i8", [Slot(A, I8, (2,))], {}),
        (LayoutError, "groups at once: a", [Slot("a", F32, (2,)), Slot("a/b", F32, ())], {}),
        (LayoutError, "groups at once: a", [Slot("a", F32, (2,))], {"groups": {"a/vars": {}}}),
        (UsageError, "at least 1 byte", [slot], {"max_shard_size": 0}),
    ):
        with pytest.raises(kind, match=match):
            keras_h5.plan(slots, **options)


# ---------------------------------------------------------------- the memory file


@given(
    st.lists(
        st.tuples(st.sampled_from("wtr"), st.integers(0, 20_000), st.binary(max_size=200)),
        max_size=12,
    )
)
def test_sparse_buffer_is_a_file(steps):
    import io

    ours, real = hdf5_skeleton.SparseBuffer(), io.BytesIO()
    for kind, at, data in steps:
        ours.seek(at)
        real.seek(at)
        if kind == "w":
            assert ours.write(data) == real.write(data)
        elif kind == "t":
            ours.truncate(at)
            real.truncate(at)
            if len(real.getvalue()) < at:  # BytesIO does not grow
                real.seek(0, io.SEEK_END)
                real.write(bytes(at - len(real.getvalue())))
        else:
            out = bytearray(300)
            n = ours.readinto(out)
            assert bytes(out[:n]) == real.read(300)
        assert ours.seek(0, io.SEEK_END) == len(real.getvalue())
    assert ours.read_at(0, ours.size) == real.getvalue()
