"""Planned PyTorch files: torch, zip tools and our reader read them; the same slots give the same bytes."""

import hashlib
import json
import struct
import zipfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from g2kit.formats import torch_pickle
from g2kit.formats.base import Slot
from g2kit.formats.dtypes import BF16, F32, I8, TABLE
from g2kit.formats.errors import DtypeError, FormatError, MissingTensorError, UsageError
from g2kit.formats.files import InputFile
from g2kit.formats.output import Output
from g2kit.formats.torch_plan import plan
from g2kit.formats.torch_zip import read_archive

from .plan_writer import materialise, random_array

NAMES = st.text("abcxyz.0159_üΩ", min_size=1, max_size=20).filter(
    lambda n: n != ".." and n[0] != "/"
)
SLOTS = st.dictionaries(
    NAMES,
    st.tuples(
        st.sampled_from([row.dtype for row in TABLE]), st.lists(st.integers(0, 6), max_size=4)
    ),
    min_size=1,
    max_size=9,
).map(lambda d: [Slot(n, dtype, tuple(shape)) for n, (dtype, shape) in d.items()])
QUICK = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays_of(slots: list[Slot]) -> dict[str, np.ndarray]:
    arrays = {s.name: random_array(k, np.dtype(s.dtype), s.shape) for k, s in enumerate(slots)}
    return {  # a byte that is neither 0 nor 1 is no bool
        n: (a.view(np.uint8) & 1).view(np.bool_) if a.dtype == np.bool_ else a
        for n, a in arrays.items()
    }


def write(
    slots: list[Slot], directory: Path, **options
) -> tuple[dict[str, np.ndarray], list[Path]]:
    planned = plan(slots, **options)
    arrays = arrays_of(slots)
    directory.mkdir(exist_ok=True)
    materialise(planned, arrays, directory)
    return arrays, [directory / f.name for f in planned.files]


def torch_bytes(t) -> bytes:
    torch = pytest.importorskip("torch")
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


@QUICK
@given(
    slots=SLOTS,
    wrapper=st.sampled_from([None, "model_state_dict"]),
    size=st.none() | st.integers(1, 900),
)
def test_what_is_written_is_read(tmp_path_factory, slots, wrapper, size):
    torch = pytest.importorskip("torch")
    directory = tmp_path_factory.mktemp("p")
    arrays, files = write(slots, directory, wrapper=wrapper, max_shard_size=size)
    weights = [f for f in files if f.suffix != ".json"]
    source = torch_pickle.open_source(files[-1])
    assert sorted(source.tensors) == sorted(arrays)
    for name, t in source.tensors.items():
        assert (t.dtype, t.shape) == (arrays[name].dtype, arrays[name].shape)
        assert t.read().tobytes() == arrays[name].tobytes()
    assert source.metadata["wrapper"] == (wrapper if len(files) == 1 else None)
    if len(files) == 1:
        assert list(source.tensors) == list(arrays)
        assert source.notes == []
    source.close()
    loaded = {}
    for file in weights:
        for options in ({"mmap": True}, {"mmap": False}):
            tree = torch.load(file, weights_only=True, **options)
            loaded |= tree[wrapper] if wrapper and len(files) == 1 else tree
    assert sorted(loaded) == sorted(arrays)
    for name, t in loaded.items():
        assert str(t.dtype) == f"torch.{arrays[name].dtype.name}"
        assert tuple(t.shape) == arrays[name].shape
        assert torch_bytes(t) == arrays[name].tobytes()
    for file in weights:
        with zipfile.ZipFile(file) as z:
            assert z.testzip() is None


SMALL = [
    Slot("embedder.weight", BF16, (7, 4)), Slot("model.norm.weight", F32, (4,)), Slot("s", I8, ()),
]  # fmt: skip


def test_same_slots_same_bytes(tmp_path):
    (arrays, (a,)), (_, (b,)) = (write(SMALL, tmp_path / d, stem="x") for d in "ab")
    assert a.name == "x.ckpt"
    assert a.read_bytes() == b.read_bytes()
    assert hashlib.sha256(a.read_bytes()).hexdigest() == (
        "8126f0e6c4a577f38e0801002930d972233622d74957a146f1eed3e0ee33bda4"
    ), "the layout changed: files written before are no longer reproducible"
    assert list(arrays) == [s.name for s in SMALL]


def test_payloads_are_aligned_and_records_are_torchs():
    planned = plan([Slot(f"t{k}", I8, (k,)) for k in range(1, 70)])
    assert all(c.offset % 64 == 0 for chunks in planned.chunks.values() for c in chunks)
    ends = [c.offset + c.shape[0] for (c,) in planned.chunks.values()]
    assert ends == sorted(ends)
    assert planned.files[0].size < 69 * 400


def test_plain_torch_load_and_official_layout(tmp_path):
    torch = pytest.importorskip("torch")
    arrays, (file,) = write(SMALL, tmp_path, stem="model")
    state = torch.load(file, weights_only=False)["model_state_dict"]
    assert type(state) is dict
    assert all(t.is_contiguous() and not t.requires_grad for t in state.values())
    assert torch_bytes(state["embedder.weight"]) == arrays["embedder.weight"].tobytes()
    # the option that computes offsets instead of reading headers must not be misled
    torch.utils.serialization.config.load.calculate_storage_offsets = True
    try:
        mapped = torch.load(file, mmap=True, weights_only=True)["model_state_dict"]
    finally:
        torch.utils.serialization.config.load.calculate_storage_offsets = False
    assert torch_bytes(mapped["embedder.weight"]) == arrays["embedder.weight"].tobytes()
    official = tmp_path / "official.pt"
    torch.save({"model_state_dict": state}, official)
    with zipfile.ZipFile(official) as a, zipfile.ZipFile(file) as b:
        ours = [n.split("/", 1)[1] for n in b.namelist()]
        theirs = [n.split("/", 1)[1] for n in a.namelist()]
    assert ours == [n for n in theirs if not n.startswith(".")]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["model.ckpt"]),
        ({"wrapper": None, "stem": "pytorch_model", "suffix": ".bin"}, ["pytorch_model.bin"]),
        ({"max_shard_size": 10**9}, ["model.ckpt"]),
        ({"max_shard_size": 30},
         ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]),
        ({"wrapper": None, "stem": "x", "suffix": ".pt", "max_shard_size": 30},
         ["x-00001-of-00002.pt", "x-00002-of-00002.pt", "x.pt.index.json"]),
    ],
)  # fmt: skip
def test_file_names(options, names):
    assert [f.name for f in plan(SMALL[:2], **options).files] == names


def test_index(tmp_path):
    arrays, files = write(SMALL, tmp_path, max_shard_size=57)
    index = json.loads(files[-1].read_text())
    assert index["weight_map"] == {
        "embedder.weight": "pytorch_model-00001-of-00002.bin",
        "model.norm.weight": "pytorch_model-00002-of-00002.bin",
        "s": "pytorch_model-00002-of-00002.bin",
    }
    assert index["metadata"]["total_size"] == 73
    source = torch_pickle.open_source(tmp_path)
    assert {n: t.read().tobytes() for n, t in source.tensors.items()} == {
        n: a.tobytes() for n, a in arrays.items()
    }
    source.close()


@pytest.mark.parametrize(
    ("slots", "error", "word"),
    [
        ([], MissingTensorError, "no tensors"),
        ([SMALL[0], SMALL[0]], FormatError, "given to two"),
        ([Slot("../x", F32, (1,))], FormatError, "path out of"),
        ([Slot("x", np.dtype("S4"), (1,))], DtypeError, "supported are"),
    ],
)
def test_unusable_slots(slots, error, word):
    with pytest.raises(error, match=word):
        plan(slots)
    with pytest.raises(UsageError, match="at least 1 byte"):
        plan(SMALL, max_shard_size=0)


# ---------------------------------------------------------------- 64-bit archives, without the data


class SparseFile:
    """A planned file that holds only its fixed bytes; what InputFile offers to the header reader."""

    def __init__(self, planned) -> None:
        self.path = Path(planned.name)
        self.size = planned.size
        self.fixed = planned.fixed

    def read(self, offset: int, size: int) -> bytes:
        out = bytearray(size)
        for at, data in self.fixed:
            a, b = max(at, offset), min(at + len(data), offset + size)
            if a < b:
                out[a - offset : b - offset] = data[a - at : b - at]
        return bytes(out)


G = 1 << 30
WIDE = {
    "one tensor of 5 GB": [(5 * G,), (3,)],
    "many small ones": [(G,)] * 6,
    "just below 4 GiB": [(4 * G - 2,), (1,)],
    "exactly 2^32 - 1": [(4 * G - 1,), (1,)],
    "54 GB": [(256_000 * 4608 * 2,), *[(36864 * 4608 * 2,)] * 150],
}


@pytest.mark.parametrize("case", WIDE)
def test_64_bit_headers(case):
    slots = [Slot(f"t{k}", I8, shape) for k, shape in enumerate(WIDE[case])]
    planned = plan(slots)
    (file,) = planned.files
    archive = read_archive(SparseFile(file))
    for k, slot in enumerate(slots):
        record = archive.records[f"data/{k}"]
        (chunk,) = planned.chunks[slot.name]
        assert (record.size, record._offset) == (slot.nbytes, chunk.offset)
    assert sum(len(data) for _, data in file.fixed) < 100_000


@pytest.mark.parametrize("case", ["one tensor of 5 GB", "exactly 2^32 - 1"])
def test_64_bit_files_in_torch_and_zipfile(tmp_path, case):
    torch = pytest.importorskip("torch")
    slots = [Slot(f"t{k}", I8, shape) for k, shape in enumerate(WIDE[case])]
    planned = plan(slots, wrapper=None)
    (file,) = planned.files
    path = tmp_path / file.name
    with path.open("wb") as f:  # sparse: a few kB on disk
        f.truncate(file.size)
        for offset, data in file.fixed:
            f.seek(offset)
            f.write(data)
        last = planned.chunks[slots[-1].name][0]
        f.seek(last.offset)
        f.write(b"\x07" * last.shape[0])
    with zipfile.ZipFile(path) as z:
        assert [i.file_size for i in z.infolist() if "/data/" in i.filename] == [
            s.nbytes for s in slots
        ]
    state = torch.load(path, mmap=True, weights_only=True)
    assert [tuple(t.shape) for t in state.values()] == [s.shape for s in slots]
    assert state[slots[-1].name].tolist() == [7] * last.shape[0]
    assert state["t0"][-1] == 0
    source = torch_pickle.open_source(path)
    assert [t.shape for t in source.tensors.values()] == [s.shape for s in slots]
    source.close()


def test_more_records_than_16_bits_count(tmp_path):
    (file,) = plan([Slot(f"t{k}", I8, ()) for k in range(65_533)]).files
    path = tmp_path / file.name
    image = bytearray(file.size)
    for at, data in file.fixed:
        image[at : at + len(data)] = data
    path.write_bytes(image)
    with InputFile(path) as opened:
        assert len(read_archive(opened).records) == 65_536


def test_checksum_places(tmp_path):
    planned = plan(SMALL)
    arrays, (path,) = write(SMALL, tmp_path)
    image = path.read_bytes()
    assert {p.slot for p in planned.crc32} == {s.name for s in SMALL}
    for patch in planned.crc32:
        local, central = patch.offsets
        assert image[local - 14 : local - 10] == b"PK\x03\x04"
        assert image[central - 16 : central - 12] == b"PK\x01\x02"
        assert image[local : local + 4] == image[central : central + 4]
        assert struct.unpack_from("<I", image, local)[0] == zipfile.crc32(
            arrays[patch.slot].tobytes()
        )


@pytest.mark.parametrize("size", [None, 57])
def test_the_real_writer_in_any_order_gives_the_same_bytes(tmp_path, size):
    """In pieces, last rows first: the checksums are joined from them."""
    slots = [Slot("a", F32, (40, 3)), *SMALL]
    planned = plan(slots, max_shard_size=size)
    arrays, files = write(slots, tmp_path / "expected", max_shard_size=size)
    with Output(tmp_path / "out", planned, slots, {}) as out:
        for slot in reversed(slots):
            rows = slot.shape[0] if slot.shape else 1
            for at in reversed(range(rows)):
                start = (at, *(0 for _ in slot.shape[1:])) if slot.shape else ()
                part = arrays[slot.name][at : at + 1] if slot.shape else arrays[slot.name]
                out.write(slot.name, start, part)
        sealed = out.seal()
        for file in files:
            assert (sealed / file.name).read_bytes() == file.read_bytes()
