"""Opening PyTorch checkpoints: official files, every way of being damaged or hostile, and what is refused."""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from refusals import open_files, refusal

from g2kit.formats import torch_pickle
from g2kit.formats.errors import (
    ChecksumError,
    DtypeError,
    ExtraTensorError,
    FileIOError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    MissingTensorError,
    TruncatedError,
    UnsafeError,
    UnsafePathError,
)

from .torch_files import (
    ORDERED_DICT,
    archive,
    call,
    glob,
    pickled,
    plain,
    save,
    storage,
    table,
    tensor,
    text,
)

DATA = Path(__file__).parent / "data"
OFFICIAL = [
    DATA / "gemma_pytorch" / "model.ckpt",
    DATA / "gemma_pytorch" / "model-quant.ckpt",
    DATA / "gemma_pytorch_sharded",
]
SIX = np.arange(6, dtype=np.float32)
W = {"w": tensor()}
RECORDS = {"0": SIX.tobytes()}


@pytest.fixture
def opened(tmp_path):
    """Opens bytes as a file; closes it after the test."""
    sources = []

    def open_bytes(data: bytes, name: str = "pytorch_model.bin"):
        path = tmp_path / name
        path.write_bytes(data)
        sources.append(torch_pickle.open_source(path))
        return sources[-1]

    yield open_bytes
    for source in sources:
        source.close()


def refused(opened, data: bytes, error: type[G2Error], *words: str) -> G2Error:
    """Opening raises exactly this error, which names the file and holds the words, and leaks no file."""
    return refusal(lambda: opened(data), error, "pytorch_model.bin", *words)


# ---------------------------------------------------------------- good files


@pytest.mark.parametrize("path", OFFICIAL, ids=lambda p: p.name)
def test_official_files_agree_with_torch(path):
    torch = pytest.importorskip("torch")
    source = torch_pickle.open_source(path)
    expected = {}
    for file in source.files:
        loaded = torch.load(file, weights_only=True)
        expected |= loaded.get("model_state_dict", loaded)
    assert list(source.tensors) == list(expected)
    for name, t in source.tensors.items():
        want = expected[name]
        assert t.shape == tuple(want.shape)
        assert f"torch.{t.stored}" == str(want.dtype)
        raw = want.contiguous().view(torch.uint8).numpy().tobytes()
        assert t.read().tobytes() == raw, name
        if len(t.shape) > 1:
            assert t.read((slice(1, 3), slice(0, 2))).tolist() == want[1:3, 0:2].tolist()
            assert t.read((2,)).shape == t.shape[1:]
    source.check_unchanged()
    source.close()


def test_what_a_source_says():
    source = torch_pickle.open_source(OFFICIAL[0])
    assert source.format == "torch_pickle"
    assert source.metadata == {"wrapper": "model_state_dict", "extra": [], "prefix": ""}
    assert source.files == (OFFICIAL[0],)
    assert source.notes == []
    assert source.tensors["freqs_cis"].dtype == np.complex64
    sharded = torch_pickle.open_source(OFFICIAL[2])
    assert sharded.path == OFFICIAL[2]
    assert [f.name for f in sharded.files] == [
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
    ]  # fmt: skip
    assert sharded.notes == []
    source.close()
    sharded.close()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("order", ["little", None])
def test_hand_made(opened, streamed, order):
    source = opened(archive(pickled(table(W)), RECORDS, streamed=streamed, order=order))
    assert source.tensors["w"].read().tolist() == SIX.reshape(2, 3).tolist()
    assert source.tensors["w"].read((1, slice(1, 3))).tolist() == [4, 5]
    assert source.tensors["w"].read((1, 2)).shape == ()


def test_dtypes_scalars_and_empty(opened):
    untyped = call(
        glob("torch._utils", "_rebuild_tensor_v3"),
        storage("2", 4, "UntypedStorage", module="torch.storage"),
        *map(plain, (1, (3,), (1,), False, None)),
        glob("torch", "float8_e4m3fn"),
    )
    items = {
        "bf16": tensor(storage("0", 3, "BFloat16Storage"), 0, (3,), (1,)),
        "scalar": tensor(storage("1", 1, "LongStorage"), 0, (), ()),
        "f8": untyped,
        "empty": tensor(storage("3", 0), 0, (0, 5), (5, 1)),
    }
    raw = {"0": b"\x80\x3f" * 3, "1": struct.pack("<q", -7), "2": b"\0\x38\x40\xc0", "3": b""}
    source = opened(archive(pickled(table(items)), raw))
    read = {n: t.read() for n, t in source.tensors.items()}
    assert [t.stored for t in source.tensors.values()] == [
        "bfloat16", "int64", "float8_e4m3fn", "float32",
    ]  # fmt: skip
    assert read["bf16"].tolist() == [1, 1, 1]
    one = source.tensors["bf16"].read((1,))
    assert (one.shape, one.dtype) == ((), source.tensors["bf16"].dtype)
    assert (read["scalar"].shape, int(read["scalar"])) == ((), -7)
    assert read["f8"].astype(np.float32).tolist() == [1, 2, -2]
    assert read["empty"].shape == (0, 5)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((4, 5), (1, 0)), ((2, 3, 4), (0, 2, 1)), ((2, 3, 4), (2, 0, 1)), ((2, 3, 4), (1, 0, 2)),
     ((1, 3, 4), (0, 2, 1)), ((3, 1, 4), (2, 1, 0)), ((3, 1), (1, 0))],
)  # fmt: skip
def test_transposed_views(opened, monkeypatch, shape, axes):
    monkeypatch.setattr("g2kit.formats.torch_tensor._BLOCK", 40)  # several blocks
    base = np.arange(np.prod(shape) + 3, dtype=np.float32)
    inside = base[2:-1].reshape(shape)
    want = inside.transpose(axes)
    strides = tuple(s // 4 for s in want.strides)
    view = tensor(storage("0", base.size), 2, want.shape, strides)
    t = opened(archive(pickled(table({"t": view})), {"0": base.tobytes()})).tensors["t"]
    assert t.read().tolist() == want.tolist()
    assert t.read().flags.c_contiguous
    for a in range(want.shape[0]):
        assert t.read((a,)).tolist() == want[a].tolist()
        assert t.read((slice(a, a + 2), slice(0, 1))).tolist() == want[a : a + 2, :1].tolist()


def test_strides_of_axes_of_one_are_arbitrary(opened):
    view = tensor(storage(), 0, (1, 6, 1), (999, 1, 0))
    assert opened(archive(pickled(table({"t": view})), RECORDS)).tensors["t"].read().tolist() == (
        SIX.reshape(1, 6, 1).tolist()
    )


# ---------------------------------------------------------------- 50: nested state dicts


TREES = {
    "bare": (table(W), None, []),
    "ordered": (ORDERED_DICT + b"(" + text("w") + tensor() + b"u", None, []),
    "gemma_pytorch": (table({"model_state_dict": table(W)}), "model_state_dict", []),
    "lightning": (
        table({"epoch": plain(3), "state_dict": table(W), "optimizer_states": plain([])}),
        "state_dict", ["epoch", "optimizer_states"],
    ),
    "tensors beside": (table({"model": table(W), "rng": tensor()}), "model", ["rng"]),
    "two deep": (
        table({"state_dict": table({"model": table(W), "lr": plain(1.0)}), "step": plain(1)}),
        "state_dict.model", ["step", "state_dict.lr"],
    ),
    "counters inside": (table({**W, "step": plain(5)}), None, ["step"]),
    "wrapper without tensors": (table({**W, "model": plain({"a": 1})}), None, ["model"]),
    "optimizer's tensors": (
        table({"model": table(W), "optimizer": table({"state": b"}(" + plain(0) + tensor() + b"u"})}),
        "model", ["optimizer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TREES)
def test_unwrapped(opened, case):
    tree, wrapper, extra = TREES[case]
    source = opened(archive(pickled(tree), RECORDS))
    assert list(source.tensors) == ["w"]
    assert source.metadata == {"wrapper": wrapper, "extra": extra, "prefix": ""}
    assert source.tensors["w"].read().tolist() == SIX.reshape(2, 3).tolist()


def test_prefix_of_training_wrappers_is_cut_only_when_all_have_it(opened):
    tree = {f"module._orig_mod.{n}": tensor() for n in ("model.a", "model.b")}
    source = opened(archive(pickled(table({"state_dict": table(tree)})), RECORDS))
    assert list(source.tensors) == ["model.a", "model.b"]
    assert source.metadata["prefix"] == "module._orig_mod."
    assert "module._orig_mod. was cut off every name." in source.notes
    assert "the state dict is under state_dict." in source.notes
    kept = {"module.a": tensor(), "b": tensor()}
    assert list(opened(archive(pickled(table(kept)), RECORDS)).tensors) == list(kept)


def test_a_name_that_is_only_a_prefix(opened):
    refused(
        opened, archive(pickled(table({"module.": tensor()})), RECORDS), FormatError, "is empty"
    )


def test_unusable_trees(opened):
    for tree, error, *words in (
        (plain([1]), FormatError, "found a list"),
        (call(glob("torch", "device"), text("cpu")), FormatError, "found a torch.device"),
        (plain({}), MissingTensorError, "holds nothing"),
        (plain({"epoch": 1, "lr": 2}), MissingTensorError, "epoch, lr"),
        (table({"model": table(W), "state_dict": table(W)}), FormatError, "several state dicts", "state_dict, model"),
        (b"}(" + plain(0) + tensor() + text("w") + tensor() + b"u", FormatError, ""),
        (table({"../../x": tensor()}), FormatError, "path out of"),
        (table({"a\nb": tensor()}), FormatError, "control characters"),
        (table({"": tensor()}), FormatError, "is empty"),
        (table({"m": call(glob("torch._utils", "_rebuild_sparse_tensor"), plain(1))}), FormatError, "not a plain tensor"),
        (b"}(" + (text("w") + tensor()) * 2 + b"u", FormatError, '"w" is stored twice'),
    ):  # fmt: skip
        if words == [""]:  # a key that is no string is listed under its type
            assert list(opened(archive(pickled(tree), RECORDS)).tensors) == ["<int>", "w"]
            continue
        refused(opened, archive(pickled(tree), RECORDS), error, *words)


# ---------------------------------------------------------------- 39 to 41: code


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def nothing_ran(tmp_path: Path) -> bool:
    return {p.name for p in tmp_path.iterdir()} <= {"pytorch_model.bin"}


@pytest.mark.parametrize("protocol", range(6))
def test_39_40_hostile_pickles(opened, tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    name = f"{os.system.__module__}.system"
    data = pickle.dumps(Evil(), protocol)
    refused(opened, archive(data, RECORDS), UnsafeError, name)
    e = refused(opened, data, UnsafeError, name)
    assert e.exit_code == 5
    assert nothing_ran(tmp_path)


def test_39_beside_good_tensors(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = table({**W, "extra": call(glob("builtins", "exec"), text("1/0"))})
    refused(opened, archive(pickled(body), RECORDS), UnsafeError, "builtins.exec")


def test_40_bare_pickle_of_plain_data(opened):
    refused(opened, pickle.dumps({"w": [1.0]}, 2), FormatError, "bare Python pickle", "torch.save")


@pytest.mark.parametrize("keep", [0.7, 0.9])
def test_41_payload_before_a_corrupt_tail(opened, tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    whole = pickled(
        b"(" + call(glob("os", "system"), text("touch executed")) + plain([0] * 99) + b"t"
    )
    cut = whole[: int(len(whole) * keep)]
    refused(opened, cut, UnsafeError, "os.system")
    refused(opened, archive(cut, RECORDS), UnsafeError, "os.system")
    image = archive(whole, RECORDS)
    at = image.index(whole) + len(cut)
    wrong_sum = image[:at] + b"\xff" * 4 + image[at + 4 :]
    refused(opened, wrong_sum, UnsafeError, "os.system")
    assert nothing_ran(tmp_path)


# ---------------------------------------------------------------- 42 to 44: views and records


UNTYPED = storage("0", 24, "UntypedStorage", module="torch.storage")
CONJUGATE = call(
    glob("torch._utils", "_rebuild_tensor_v2"),
    storage("0", 3, "ComplexFloatStorage"),
    *map(plain, (0, (3,), (1,), False, None, {"conj": True})),
)
VIEWS = {
    "offset past the end": (tensor(None, 1), LayoutError, "elements 1 to 7 of a storage that has 6"),
    "negative offset": (tensor(None, -1), LayoutError, "not negative"),
    "negative stride": (tensor(None, 0, (2, 3), (-3, 1)), LayoutError, "not negative"),
    "strides too few": (tensor(None, 0, (2, 3), (1,)), LayoutError, "one stride per axis"),
    "shape of text": (tensor(None, 0, "23", (3, 1)), LayoutError, "a str"),
    "columns of a matrix": (tensor(None, 0, (2, 2), (3, 1)), LayoutError, "leaves out"),
    "every other": (tensor(None, 0, (3,), (2,)), LayoutError, "leaves out"),
    "stride 0": (tensor(None, 0, (10**11,), (0,)), LimitError, "more than once"),
    "overlapping rows": (tensor(None, 0, (4, 3), (1, 1)), LimitError, "more than once"),
    "larger than its storage": (tensor(None, 0, (10**6, 10**6), (10**6, 1)), LimitError, "needs 1000000000000 elements"),
    "astronomic": (tensor(None, 0, (1 << 62,) * 3, (1 << 61, 1 << 61, 1)), LimitError, ""),
    "storage too large": (tensor(storage("0", 10**11)), LimitError, "claims 400000000000 bytes", "has 24"),
    "storage too small": (tensor(storage("0", 5), 0, (5,), (1,)), LimitError, "claims 20 bytes", "has 24"),
    "no record": (tensor(storage("7")), MissingTensorError, "data/7"),
    "record's name is a path": (tensor(storage("../data.pkl")), MissingTensorError, "data/../data.pkl"),
    "meta": (tensor(storage(location="meta")), MissingTensorError, "meta device"),
    "complex128": (tensor(storage("0", 1, "ComplexDoubleStorage"), 0, (1,), (1,)), DtypeError, "ComplexDouble", "bfloat16"),
    "untyped without dtype": (tensor(UNTYPED, 0, (6,), (1,)), FormatError, "nowhere"),
    "conjugate": (CONJUGATE, FormatError, "pending conj", "resolve_conj"),
}  # fmt: skip


@pytest.mark.parametrize("case", VIEWS)
def test_42_43_views(opened, case):
    view, error, *words = VIEWS[case]
    start = time.process_time()
    image = archive(pickled(table({"model.w": view})), RECORDS)
    assert len(image) < 1600
    e = refused(opened, image, error, *words)
    assert e.tensor in ("model.w", None)
    assert time.process_time() - start < 2


def test_two_types_for_one_storage(opened):
    items = {**W, "v": tensor(storage("0", 24, "CharStorage"), 0, (6,), (1,))}
    e = refused(opened, archive(pickled(table(items)), RECORDS), FormatError, "6 x FloatStorage")
    assert e.tensor == "v"


def test_44_deflated_records_and_bombs(opened):
    for name in ("data/0", "data.pkl", "version"):
        image = archive(pickled(table(W)), RECORDS, method={name: zipfile.ZIP_DEFLATED})
        refused(opened, image, LimitError, f"{name} is compressed (method 8")
    bomb = {"0": bytes(4_000_000)}
    body = table({"w": tensor(storage("0", 10**6), 0, (10**6,), (1,))})
    image = archive(pickled(body), bomb, method={"data/0": zipfile.ZIP_DEFLATED})
    assert len(image) < 10_000
    refused(opened, image, LimitError, "claim to become 4000000")


def test_44_huge_pickle(opened):
    refused(opened, archive(bytes((16 << 20) + 1), {}), LimitError, "data.pkl has 16777217 bytes")


def test_byte_order(opened):
    image = archive(pickled(table(W)), RECORDS, order="big")
    refused(opened, image, FormatError, "byte order 'big'", "little-endian machine")
    refused(opened, archive(pickled(table(W)), RECORDS, order="middle"), FormatError, "'middle'")


# ---------------------------------------------------------------- 45: checksums


ROWS = np.arange(4096, dtype=np.float32).reshape(64, 64)


def flipped(at: int, bit: int = 4) -> bytes:
    """An archive of one matrix with one bit of its payload changed."""
    rows = ROWS.tobytes()
    view = tensor(storage("0", 4096), 0, (64, 64), (64, 1))
    image = bytearray(archive(pickled(table({"w": view})), {"0": rows}, streamed=True))
    image[image.index(rows) + at] ^= bit
    return bytes(image)


@pytest.mark.parametrize("at", [0, 1, 8191, 16383])
def test_45_payload_flip_is_found_with_the_last_row(opened, at):
    whole = opened(flipped(at)).tensors["w"]
    for _ in range(2):  # it stays an error
        with pytest.raises(ChecksumError, match="data/0 have CRC-32") as e:
            whole.read()
    assert "pytorch_model.bin" in str(e.value)
    last_only = opened(flipped(at)).tensors["w"]
    with pytest.raises(ChecksumError):
        last_only.read((63,))
    in_order = opened(flipped(at)).tensors["w"]
    for a in range(63):
        assert in_order.read((a,)).shape == (64,)
    with pytest.raises(ChecksumError):
        in_order.read((63,))


def test_45_any_order_and_no_second_pass(opened, monkeypatch):
    t = opened(flipped(0, bit=0)).tensors["w"]
    read = []
    inner = type(t.record._file).read_into
    monkeypatch.setattr(
        type(t.record._file), "read_into",
        lambda self, offset, out: (read.append(len(out)), inner(self, offset, out))[1],
    )  # fmt: skip
    order = list(range(0, 64, 4))
    random.Random(1).shuffle(order)
    order.remove(60)
    for a in [*order, 60]:
        assert t.read((slice(a, a + 4),)).tolist() == ROWS[a : a + 4].tolist()
    assert sum(read) == ROWS.nbytes
    assert t.read().tolist() == ROWS.tolist()
    assert sum(read) == 2 * ROWS.nbytes


def test_45_threads(opened):
    t = opened(flipped(5000)).tensors["w"]
    errors = []

    def work(rows) -> None:
        for a in rows:
            try:
                t.read((a,))
            except ChecksumError as e:
                errors.append((a, e))

    threads = [threading.Thread(target=work, args=(range(k, 64, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a for a, _ in errors] == [63]


def test_45_transposed_and_partial_views(opened):
    rows = ROWS.tobytes()
    views = {
        "t": tensor(storage("0", 4096), 0, (64, 64), (1, 64)),
        "part": tensor(storage("0", 4096), 0, (4,), (1,)),
    }
    image = bytearray(archive(pickled(table(views)), {"0": rows}))
    image[image.index(rows) + 16000] ^= 1
    for name in views:
        with pytest.raises(ChecksumError):
            opened(bytes(image)).tensors[name].read()


def test_45_damaged_pickle(opened):
    image = archive(pickled(table(W)), RECORDS)
    at = image.index(b"FloatStorage") + 30
    bad = image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]
    refused(opened, bad, ChecksumError, "data.pkl")


def test_archives_saved_without_checksums_say_so(opened, tmp_path):
    image = archive(pickled(table(W)), RECORDS)
    with zipfile.ZipFile(io.BytesIO(image)) as z:
        sums = {struct.pack("<I", i.CRC) for i in z.infolist()}
    for crc in sums:
        image = image.replace(crc, bytes(4))
    source = opened(image)
    assert "saved without checksums" in source.notes[0]
    assert source.tensors["w"].read().tolist() == SIX.reshape(2, 3).tolist()


# ---------------------------------------------------------------- 46, 47: the zip around it


def central(image: bytes, name: str) -> int:
    """Where the directory's entry of a record begins."""
    end = image.rindex(b"PK\x05\x06")
    at = image.index(b"PK\x01\x02", struct.unpack_from("<I", image, end + 16)[0])
    while not image.startswith(f"archive/{name}".encode(), at + 46):
        at = image.index(b"PK\x01\x02", at + 1)
    return at


def changed(image: bytes, at: int, new: bytes) -> bytes:
    return image[:at] + new + image[at + len(new) :]


GOOD = archive(pickled(table(W)), RECORDS)
LOCAL_0 = GOOD.index(b"archive/data/0") - 30
DIRECTORY = struct.unpack_from("<I", GOOD, len(GOOD) - 6)[0]


def repeated(*names: str) -> bytes:
    out = io.BytesIO(GOOD)
    with zipfile.ZipFile(out, "a") as z, contextlib.suppress(UserWarning):
        for name in names:
            z.writestr(name, b"x")
    return out.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data/0", "archive/DATA/0", "archive/data.pkl"])
def test_46_duplicate_entries(opened, name):
    refused(opened, repeated(name), FormatError, "more than once", name.split("/", 1)[1])


def test_46_second_folder(opened):
    refused(opened, repeated("other/data.pkl"), FormatError, "outside", "other/data.pkl")
    refused(opened, repeated("../x"), FormatError, "outside", "../x")


HEADERS = {
    "local name": (LOCAL_0 + 30 + 13, b"7", FormatError, "the names of the record"),
    "local method": (LOCAL_0 + 8, b"\x08", FormatError, "two headers of archive/data/0"),
    "local checksum": (LOCAL_0 + 14, b"\x01\x02\x03\x04", FormatError, "two headers"),
    "local size": (LOCAL_0 + 22, struct.pack("<I", 8), FormatError, "two headers"),
    "local signature": (LOCAL_0, b"PKXX", FormatError, "no local header"),
    "local extra field": (LOCAL_0 + 28, b"\x04", LayoutError, "overlaps"),
    "directory: checksum": (central(GOOD, "data/0") + 16, b"\x01\x02\x03\x04", FormatError, "two headers"),
    "directory: both sizes": (central(GOOD, "data/0") + 20, struct.pack("<2I", 20, 20), FormatError, "two headers"),
    "directory: one size": (central(GOOD, "data/0") + 24, struct.pack("<I", 1 << 30), LimitError, "compressed"),
    "directory: too large": (central(GOOD, "data/0") + 20, struct.pack("<2I", 1 << 30, 1 << 30), LayoutError, "overlaps"),
    "directory: offset": (central(GOOD, "data/0") + 42, struct.pack("<I", 7), LayoutError, "overlaps"),
    "directory: offset of another": (central(GOOD, "data/0") + 42, bytes(4), LayoutError, "overlaps"),
    "directory: encrypted": (central(GOOD, "data/0") + 8, b"\x01", FormatError, "encrypted"),
    "directory: not UTF-8": (central(GOOD, "data/0") + 46, b"\xff", FormatError, "not UTF-8"),
    "directory: 64-bit size missing": (central(GOOD, "data/0") + 20, b"\xff" * 8, FormatError, "64-bit"),
    "directory: signature": (central(GOOD, "data/0"), b"PKXX", FormatError, "directory is damaged"),
    "end: count": (len(GOOD) - 14, b"\x03\x00\x03\x00", FormatError, "in no entry"),
    "end: larger count": (len(GOOD) - 14, b"\x05\x00\x05\x00", FormatError, "ends inside an entry"),
    "end: huge count": (len(GOOD) - 14, b"\xfe\xff\xfe\xff", LimitError, "65534 records"),
    "end: two counts": (len(GOOD) - 14, b"\x03", FormatError, "several files"),
    "end: disk": (len(GOOD) - 18, b"\x01", FormatError, "several files"),
    "end: place": (len(GOOD) - 6, struct.pack("<I", DIRECTORY + 1), LayoutError, "zip directory"),
    "end: size": (len(GOOD) - 10, struct.pack("<I", 1 << 31), LimitError, "2147483648 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_46_headers_that_disagree(opened, case):
    at, new, error, word = HEADERS[case]
    image = changed(GOOD, at, new)
    assert image != GOOD
    refused(opened, image, error, word)


def test_46_record_hidden_between_others(opened):
    """A local entry that the directory does not list: other tools would see it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled(table(W)))
        z.writestr("archive/hidden", b"x" * 20)
        z.writestr("archive/data/0", RECORDS["0"])
        z.filelist = [i for i in z.filelist if i.filename != "archive/hidden"]
    refused(opened, out.getvalue(), LayoutError, "data.pkl leaves a hole")


def test_46_bytes_around_the_archive(opened):
    refused(opened, GOOD + b"MZ program", FormatError, "10 bytes follow")
    refused(opened, GOOD + GOOD, LayoutError, "directory")
    commented = GOOD[:-2] + b"\x05\x00hello"
    refused(opened, commented, FormatError, "5 bytes follow")
    in_front = bytearray(b"PK\x03\x04 hidden" + GOOD)
    struct.pack_into("<I", in_front, len(in_front) - 6, DIRECTORY + 11)
    refused(opened, bytes(in_front), LayoutError)


def test_46_bytes_in_front_that_the_directory_knows(opened):
    front = b"PK\x03\x04 hidden"
    moved = bytearray(front + GOOD)
    struct.pack_into("<I", moved, len(moved) - 6, DIRECTORY + len(front))
    for name in ("data.pkl", "byteorder", "data/0", "version"):
        place = central(GOOD, name) + 42
        offset = struct.unpack_from("<I", GOOD, place)[0]
        struct.pack_into("<I", moved, place + len(front), offset + len(front))
    refused(opened, bytes(moved), LayoutError, f"{len(front)} bytes are in front")


def test_64_bit_size_behind_another_extra_field(opened):
    """Such as time stamps, which zip tools add."""
    place = central(GOOD, "data/0")
    extra = struct.pack("<2H2s", 0x5855, 2, b"ab") + struct.pack("<2H2Q", 1, 16, 24, 24)
    image = bytearray(changed(GOOD, place + 20, b"\xff" * 8))
    struct.pack_into("<H", image, place + 30, len(extra))
    struct.pack_into("<I", image, len(image) - 10, len(GOOD) - 22 - DIRECTORY + len(extra))
    image[place + 60 : place + 60] = extra
    assert opened(bytes(image)).tensors["w"].read().tolist() == SIX.reshape(2, 3).tolist()


END64 = {
    "signature": (0, b"XX", FormatError, "wrong signature"),
    "count": (24, b"\x01", FormatError, "two end records differ"),
    "directory": (48, b"\x01\x01", FormatError, "two end records differ"),
    "locator: offset": (56 + 8, b"\x01\x01", LayoutError, "64 end record is said to be at"),
    "locator: disk": (56 + 4, b"\x01", LayoutError, "of disk 1"),
}


@pytest.mark.parametrize("case", END64)
def test_46_end_records_that_disagree(opened, case):
    image = OFFICIAL[2].joinpath("pytorch_model-00001-of-00002.bin").read_bytes()
    at, new, error, word = END64[case]
    refused(opened, changed(image, image.rindex(b"PK\x06\x06") + at, new), error, word)


def test_46_data_descriptor(opened):
    image = archive(pickled(table(W)), RECORDS, streamed=True)
    at = image.index(RECORDS["0"]) + 24
    assert image[at : at + 4] == b"PK\x07\x08"
    for offset in (0, 4, 8, 12):
        bad = changed(image, at + offset, bytes([image[at + offset] ^ 0x55]))
        refused(opened, bad, FormatError, "data descriptor of archive/data/0")


def test_47_every_truncation(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for image in (GOOD, OFFICIAL[2].joinpath("pytorch_model-00001-of-00002.bin").read_bytes()):
        lengths = [
            *range(0, len(image), max(1, len(image) // 150)),
            *range(len(image) - 100, len(image)),
        ]
        for length in lengths:
            path.write_bytes(image[:length])
            with pytest.raises(TruncatedError) as e:
                torch_pickle.open_source(path)
            assert str(path) in str(e.value)


# ---------------------------------------------------------------- 48, 49 and other files


def test_48_legacy_formats(opened, tmp_path):
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    torch.save({"w": torch.ones(3)}, out, _use_new_zipfile_serialization=False)
    refused(opened, out.getvalue(), FormatError, "before 1.6", "weights_only=True")
    refused(opened, out.getvalue()[:200], FormatError, "before 1.6")
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        tar.add(__file__, "tensors")
    refused(opened, (tmp_path / "old.tar").read_bytes(), FormatError, "tar archive", "torch.save")


def test_48_hostile_legacy(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    head = magic + pickled(plain(1001)) + pickled(plain({"little_endian": True}))
    body = table({"w": tensor(), "x": call(glob("os", "system"), text("touch executed"))})
    refused(opened, head + pickled(body), UnsafeError, "os.system")
    assert nothing_ran(tmp_path)


def test_49_programs(opened):
    for names in (
        ["archive/data.pkl", "archive/code/__torch__.py", "archive/constants.pkl"],
        ["e/archive_format", "e/models/model.json", "e/data/weights/weight_0"],
        ["m/data.pkl", "m/bytecode.pkl"],
    ):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name in names:
                z.writestr(name, pickled(table(W)))
        refused(opened, out.getvalue(), UnsafeError, "program", "state_dict")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_49_real_torchscript(opened):
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), out)
    refused(opened, out.getvalue(), UnsafeError, "TorchScript")


def test_whole_module(opened):
    torch = pytest.importorskip("torch")
    out = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), out)
    refused(opened, out.getvalue(), UnsafeError, "torch.nn.modules.linear.Linear")


FOREIGN = {
    "empty": (b"", TruncatedError, "0 B"),
    "short": (b"\0\1\2", TruncatedError, "3 B"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", FormatError, "git lfs pull"),
    "GGUF": (b"GGUF" + bytes(60), FormatError, "a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), FormatError, "HDF5"),
    "safetensors": (struct.pack("<Q", 50) + b'{"__metadata__":{}}' + bytes(50), FormatError, "safetensors"),
    "page": (b"<!DOCTYPE html><html>404</html>", FormatError, "failed download"),
    "gzip": (b"\x1f\x8b" + bytes(60), FormatError, "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(60), FormatError, "7-Zip"),
    "zeros": (bytes(4096), FormatError, "begins with"),
    "text": (b"config\nis here\nand more of it to read", FormatError, "begins with"),
    "empty zip": (b"PK\x05\x06" + bytes(18), FormatError, "no data.pkl"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files(opened, case):
    data, error, word = FOREIGN[case]
    refused(opened, data, error, word)


def test_zip_of_a_directory(opened):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("gemma/pytorch_model.bin", b"x" * 100)
    refused(opened, out.getvalue(), FormatError, "no data.pkl", "unpack it first")


def test_not_a_regular_file(tmp_path):
    fifo = tmp_path / "model.ckpt"
    os.mkfifo(fifo)
    with pytest.raises(FileIOError, match="not a regular file"):
        torch_pickle.open_source(fifo)
    with pytest.raises(FileIOError, match="cannot open"):
        torch_pickle.open_source(tmp_path / "absent.ckpt")


def test_changed_while_read(opened, tmp_path):
    source = opened(flipped(0))
    source.check_unchanged()
    os.truncate(tmp_path / "pytorch_model.bin", 4000)
    with pytest.raises(FileIOError):
        source.check_unchanged()
    with pytest.raises(FileIOError, match="became shorter"):
        source.tensors["w"].read()


# ---------------------------------------------------------------- 51: shared storage


def test_51_tied_tensors_are_aliases(opened):
    both = storage("0", 6)
    items = {
        "model.embed_tokens.weight": tensor(both),
        "lm_head.weight": tensor(both),
        "transposed": tensor(both, 0, (3, 2), (1, 3)),
        "part": tensor(both, 4, (2,), (1,)),
    }
    source = opened(archive(pickled(table(items)), RECORDS))
    read = {n: t.read().tolist() for n, t in source.tensors.items()}
    assert read["lm_head.weight"] == read["model.embed_tokens.weight"] == [[0, 1, 2], [3, 4, 5]]
    assert read["transposed"] == [[0, 3], [1, 4], [2, 5]]
    assert read["part"] == [4, 5]
    assert source.notes == [
        "lm_head.weight is the same storage as model.embed_tokens.weight.",
        "transposed overlaps in storage with lm_head.weight.",
        "part overlaps in storage with transposed.",
    ]


def test_51_slices_side_by_side_are_not_worth_a_note(opened):
    items = {"a": tensor(None, 0, (3,), (1,)), "b": tensor(None, 3, (3,), (1,))}
    source = opened(archive(pickled(table(items)), RECORDS))
    assert source.notes == []
    assert [t.read().tolist() for t in source.tensors.values()] == [[0, 1, 2], [3, 4, 5]]


# ---------------------------------------------------------------- directories and indices


def test_directories(tmp_path):
    image = GOOD
    with pytest.raises(FormatError, match="no PyTorch checkpoint is here"):
        torch_pickle.open_source(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(image)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    source = torch_pickle.open_source(tmp_path)
    assert (source.path, source.files) == (tmp_path, (tmp_path / "model.ckpt",))
    source.close()
    (tmp_path / "second.ckpt").write_bytes(image)
    with pytest.raises(FormatError, match=r"ambiguous.*model\.ckpt, second\.ckpt"):
        torch_pickle.open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(image)
    source = torch_pickle.open_source(tmp_path)
    assert source.files == (tmp_path / "pytorch_model.bin",)
    source.close()
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(FormatError, match="ambiguous"):  # case 38
        torch_pickle.open_source(tmp_path)


def test_shards_without_index(tmp_path):
    shutil.copy(OFFICIAL[2] / "pytorch_model-00001-of-00002.bin", tmp_path)
    with pytest.raises(FormatError, match=r"index is missing.*pytorch_model\.bin\.index\.json"):
        torch_pickle.open_source(tmp_path)


def sharded(
    directory: Path, weight_map: dict, files: dict[str, dict[str, float]], **metadata
) -> Path:
    for file, tensors in files.items():
        items = {n: tensor(storage(str(k))) for k, n in enumerate(tensors)}
        values = {
            str(k): np.full(6, v, np.float32).tobytes() for k, v in enumerate(tensors.values())
        }
        save(directory / file, items, values)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return index


AB = {"a.bin": {"x": 1.0, "y": 2.0}, "b.bin": {"z": 3.0}}
MAP = {"x": "a.bin", "y": "a.bin", "z": "b.bin"}


def test_index(tmp_path):
    for path in (sharded(tmp_path, MAP, AB, total_size=72), tmp_path):
        source = torch_pickle.open_source(path)
        assert {n: t.read()[0, 0] for n, t in source.tensors.items()} == {"x": 1, "y": 2, "z": 3}
        assert (source.path, source.format, source.notes) == (path, "torch_pickle", [])
        assert source.metadata == {"wrapper": None, "extra": [], "prefix": ""}
        source.close()


@pytest.mark.parametrize(
    ("weight_map", "files", "error", "word"),
    [
        ({**MAP, "z": "../b.bin"}, AB, UnsafePathError, "../b.bin"),
        ({**MAP, "z": "/tmp/b.bin"}, AB, UnsafePathError, "absolute"),
        ({**MAP, "z": "c:b.bin"}, AB, UnsafePathError, "drive"),
        ({**MAP, "z": "https://x.org/b.bin"}, AB, UnsafePathError, "URL"),
        ({**MAP, "z": "c.bin"}, AB, MissingTensorError, "c.bin (z)"),
        ({**MAP, "v": "b.bin"}, AB, MissingTensorError, "v (b.bin)"),
        ({"x": "a.bin", "z": "b.bin"}, AB, ExtraTensorError, "y (a.bin)"),
        (MAP, {**AB, "b.bin": {"z": 3.0, "x": 9.0}}, FormatError, "different values"),
    ],
)
def test_27_to_34_index_and_shards_disagree(tmp_path, weight_map, files, error, word):
    before = open_files()
    with pytest.raises(error) as e:
        torch_pickle.open_source(sharded(tmp_path, weight_map, files))
    assert word in str(e.value)
    assert open_files() == before


def test_29_30_links(tmp_path):
    index = sharded(tmp_path, MAP, AB)
    outside = tmp_path.parent / f"{tmp_path.name}-outside.bin"
    (tmp_path / "b.bin").rename(outside)
    (tmp_path / "b.bin").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="outside its directory"):
        torch_pickle.open_source(index)
    (tmp_path / "b.bin").unlink()
    (tmp_path / "b.bin").symlink_to("b.bin")
    with pytest.raises(UnsafePathError, match="loop"):
        torch_pickle.open_source(index)


def test_34_to_36_odd_but_harmless(tmp_path):
    index = sharded(tmp_path, MAP, {**AB, "b.bin": {"z": 3.0, "x": 1.0}}, total_size=1)
    source = torch_pickle.open_source(index)
    assert any("x is in a.bin and again, equal, in b.bin" in n for n in source.notes)
    assert any("total_size is 1, the shards hold 72" in n for n in source.notes)
    source.close()
    save(tmp_path / "b.bin", {"module.z": tensor()}, RECORDS)
    source = torch_pickle.open_source(sharded(tmp_path, MAP, {"a.bin": AB["a.bin"]}))
    assert any("two revisions" in n for n in source.notes)
    source.close()


def test_37_index_that_is_none(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    for content in ("not json", '{"weight_map": {"x": "a", "x": "b"}}', "[]"):
        index.write_text(content)
        with pytest.raises(FormatError):
            torch_pickle.open_source(index)


# ---------------------------------------------------------------- fuzz


def try_all(path: Path) -> None:
    """Only documented errors, or a source whose tensors are what it says."""
    with contextlib.suppress(G2Error):
        source = torch_pickle.open_source(path)
        try:
            for t in source.tensors.values():
                assert t.nbytes <= path.stat().st_size
                with contextlib.suppress(G2Error):
                    read = t.read()
                    assert (read.shape, read.dtype) == (t.shape, t.dtype)
        finally:
            source.close()


FUZZ = settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = [
    GOOD,
    archive(pickled(table({"model": table(W), "s": plain(1)})), RECORDS, streamed=True),
    archive(pickled(table({"t": tensor(None, 0, (3, 2), (1, 3)), "u": tensor(None, 3, (3,), (1,))})), RECORDS),
]  # fmt: skip


@FUZZ
@given(data=st.data())
def test_mutated_archives(tmp_path, data):
    image = bytearray(data.draw(st.sampled_from(SEEDS)))
    # most of the bytes that matter are in the directory at the end
    for _ in range(data.draw(st.integers(1, 4))):
        back = data.draw(st.integers(1, len(image)) | st.integers(1, min(330, len(image))))
        at = len(image) - back
        cut = data.draw(st.sampled_from([0, 1, 2, 4, 8]))
        new = data.draw(
            st.binary(max_size=8) | st.sampled_from([bytes(4), b"\xff" * 4, b"\xff" * 8])
        )
        image[at : at + cut] = new
        if not image:
            break
    path = tmp_path / "fuzz.bin"
    path.write_bytes(image)
    try_all(path)


@FUZZ
@given(data=st.data())
def test_mutated_pickles_in_good_archives(tmp_path, data):
    tree = bytearray(pickled(table({"a": tensor(), "b": tensor(None, 0, (3, 2), (1, 3))})))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(tree) - 1))
        tree[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
        if not tree:
            break
    path = tmp_path / "fuzz.bin"
    path.write_bytes(archive(bytes(tree), RECORDS))
    try_all(path)


@FUZZ
@given(
    offset=st.integers(0, 12), shape=st.lists(st.integers(0, 5), max_size=4),
    strides=st.lists(st.integers(0, 13), min_size=4, max_size=4), count=st.integers(10, 13),
)  # fmt: skip
def test_views_agree_with_numpy_or_are_refused(tmp_path, offset, shape, strides, count):
    """as_strided is the meaning of a view; refused ones repeat, leave out or lack elements."""
    base = np.arange(12, dtype=np.float32)
    strides = strides[: len(shape)]
    view = tensor(storage("0", count), offset, tuple(shape), tuple(strides))
    path = save(tmp_path / "v.bin", {"v": view}, {"0": base.tobytes()})
    size = int(np.prod(shape, dtype=int))
    touched = [offset]
    for n, s in zip(shape, strides, strict=True):
        touched = [t + k * s for t in touched for k in range(n)]
    dense = not size or len(set(touched)) == size == max(touched) - min(touched) + 1
    if count != 12 or not dense or (size and max(touched) >= 12):
        with pytest.raises((LayoutError, LimitError)):
            torch_pickle.open_source(path)
        return
    source = torch_pickle.open_source(path)
    want = np.array([base[t] for t in touched], np.float32).reshape(shape)
    assert np.array_equal(source.tensors["v"].read(), want)
    source.close()


def test_loads_no_torch():
    code = (
        "import sys; from g2kit.formats import torch_pickle; from g2kit.formats.packed import torch_int8;"
        f"torch_pickle.open_source({str(OFFICIAL[0])!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_seed_is_a_good_zip_archive():
    with zipfile.ZipFile(io.BytesIO(GOOD)) as z:
        assert z.testzip() is None
