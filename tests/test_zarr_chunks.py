"""Chunks of every kind against tensorstore, and the pool's promises: decode once, bounded memory, any thread."""

import itertools
import os
import threading
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings

from g2kit.formats import boxes, orbax, scratch, zarr_decode
from g2kit.formats.base import Source
from g2kit.formats.boxes import copy_box, one_run
from g2kit.formats.chunk_pool import ChunkPool, PoolLimits
from g2kit.formats.crc32c import crc32c
from g2kit.formats.errors import (
    ChecksumError,
    FormatError,
    G2Error,
    LayoutError,
    LimitError,
    SpaceError,
    TruncatedError,
)
from g2kit.formats.zarr_chunks import ZarrTensor, normalise
from g2kit.formats.zarr_decode import Place
from g2kit.formats.zarr_store import Value

from .orbax_files import BF16, same, write_metadata, write_zarr
from .plan_writer import random_array

ZSTD = {"compressor": {"id": "zstd", "level": 1}}
RAW = {"compressor": None}
SMALL = PoolLimits(memory=1 << 20, chunk=1 << 19, gap=1 << 18, cursors=2)


def sharded(outer: list[int], inner: list[int], *codecs: dict, **index: object) -> dict:
    """zarr 3 metadata of shards."""
    return {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {"chunk_shape": inner, "codecs": list(codecs), **index},
            }
        ],
    }


def chunked(shape: list[int], *codecs: dict, **more: object) -> dict:
    """zarr 3 metadata without shards."""
    return {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": list(codecs),
        **more,
    }


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}
Z3 = {"name": "zstd", "configuration": {"level": 3}}
CRC = {"name": "crc32c"}
# kind -> (zarr version, metadata, read by g2kit itself)
KINDS = {
    "zstd": (2, ZSTD | {"chunks": [4, 10, 6]}, True),
    "zstd, several chunks": (2, ZSTD | {"chunks": [2, 3, 4]}, True),
    "raw": (2, RAW | {"chunks": [4, 10, 6]}, True),
    "raw, several chunks": (2, RAW | {"chunks": [1, 4, 6]}, True),
    "gzip": (2, {"compressor": {"id": "gzip", "level": 1}, "chunks": [3, 10, 6]}, True),
    "zlib": (2, {"compressor": {"id": "zlib", "level": 1}, "chunks": [4, 3, 6]}, True),
    "slash": (2, ZSTD | {"chunks": [2, 3, 4], "dimension_separator": "/"}, True),
    "fill value": (2, ZSTD | {"chunks": [2, 3, 4], "fill_value": 0}, True),
    "larger than the array": (2, ZSTD | {"chunks": [9, 16, 7]}, True),
    "blosc": (
        2,
        {"chunks": [2, 10, 6], "compressor": {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}},
        False,
    ),
    "bz2": (2, {"compressor": {"id": "bz2", "level": 1}, "chunks": [4, 3, 6]}, False),
    "Fortran": (2, ZSTD | {"chunks": [2, 10, 3], "order": "F"}, False),
    "zarr 3": (3, chunked([2, 4, 6], BYTES, Z3), True),
    "zarr 3 raw": (3, chunked([2, 4, 6], BYTES), True),
    "zarr 3 gzip": (3, chunked([2, 4, 6], BYTES, {"name": "gzip"}), True),
    "zarr 3 v2 keys": (
        3,
        chunked([2, 4, 6], BYTES, Z3, chunk_key_encoding={"name": "v2"}),
        True,
    ),
    "shards": (3, sharded([2, 10, 6], [1, 5, 3], BYTES, Z3), True),
    "raw shards": (3, sharded([4, 4, 6], [2, 2, 6], BYTES), True),
    "one chunk per shard": (3, sharded([4, 10, 6], [4, 10, 6], BYTES, Z3), True),
    "index at the start": (
        3,
        sharded([2, 10, 6], [1, 5, 3], BYTES, Z3, index_location="start"),
        True,
    ),
    "index without checksum": (3, sharded([2, 10, 6], [1, 5, 3], BYTES, Z3, index_codecs=[BYTES]), True),
    "big-endian shards": (3, sharded([2, 10, 6], [1, 5, 3], BIG, Z3), False),
    "checksummed chunks": (3, chunked([2, 4, 6], BYTES, Z3, CRC), False),
    "transposed": (
        3,
        chunked([2, 4, 6], {"name": "transpose", "configuration": {"order": [2, 0, 1]}}, BYTES, Z3),
        False,
    ),
}  # fmt: skip
SHAPE = (4, 10, 6)


def open_one(
    directory: Path, array: np.ndarray, *, limits: PoolLimits = SMALL, **spec: object
) -> tuple[Source, ZarrTensor]:
    """An item with one array ``x.w``, opened."""
    write_zarr(directory, "x.w", array, **spec)
    write_metadata(directory, {("x", "w"): "np.ndarray"}, store_array_data_equal_to_fill_value=True)
    source = orbax.open_source(directory, limits=limits)
    tensor = source.tensors["x/w"]
    assert isinstance(tensor, ZarrTensor)
    return source, tensor


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_equal(kind: str, ocdbt: bool, tmp_path: Path) -> None:
    version, metadata, own = KINDS[kind]
    dtype = np.dtype("<f4") if kind == "big-endian shards" else BF16
    array = random_array(3, dtype, SHAPE)
    if dtype == np.dtype("<f4"):
        array = np.arange(240, dtype="<f4").reshape(SHAPE)  # no signalling NaN to be quieted
    source, tensor = open_one(tmp_path, array, zarr=version, ocdbt=ocdbt, **metadata)
    assert (tensor.array.foreign is None) == own
    assert any("through tensorstore" in note for note in source.notes) == (not own)
    assert same(tensor.read(), array)
    for index in [(1,), (slice(1, 3),), (slice(0, 4), 7), (slice(1, 4), slice(2, 9), 5), (3, 9, 5)]:
        assert same(tensor.read(index), array[index]), index
    assert tensor.read((slice(2, 2),)).shape == (0, 10, 6)


@pytest.mark.parametrize(
    "name", ["float32", "float16", "float64", "int8", "uint8", "int32", "bool"]
)
@pytest.mark.parametrize("zarr", [2, 3])
def test_dtypes(name: str, zarr: int, tmp_path: Path) -> None:
    array = np.arange(24).reshape(4, 6).astype(name)
    _, tensor = open_one(tmp_path, array, zarr=zarr)
    assert same(tensor.read((slice(1, 3),)), array[1:3])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_extension_dtypes(name: str, tmp_path: Path) -> None:
    array = random_array(0, np.dtype(getattr(ml_dtypes, name)), (4, 6))
    _, tensor = open_one(tmp_path, array)
    assert same(tensor.read(), array)


def test_big_endian_elements(tmp_path: Path) -> None:
    array = np.arange(24, dtype="<f4").reshape(4, 6)
    write_zarr(tmp_path, "x.w", array, dtype=">f4")
    tensor = orbax.open_source(tmp_path).tensors["x/w"]
    assert same(tensor.read((1,)), array[1])


def test_zero_size_and_scalar(tmp_path: Path) -> None:
    write_zarr(tmp_path, "a.w", np.zeros((0, 3), "f4"), chunks=[1, 3])
    write_zarr(tmp_path, "step", np.asarray(7, "i8"))
    write_zarr(tmp_path, "count", np.asarray(9, "i4"), zarr=3, ocdbt=True)
    write_zarr(tmp_path, "b.w", np.ones(3, "f4"))
    source = orbax.open_source(tmp_path)
    assert source.tensors["a/w"].read().shape == (0, 3)
    assert source.metadata["scalars"] == {"step": 7, "count": 9}
    assert same(source.tensors["b/w"].read(), np.ones(3, "f4"))


any_box = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in SHAPE))


@settings(max_examples=60)
@given(any_box, st.sampled_from([2, 4]), st.integers(1, 200))
def test_boxes(box: tuple, itemsize: int, block: int) -> None:
    array = random_array(1, np.dtype(f"u{itemsize}"), SHAPE)
    flat = array.reshape(-1).view(np.uint8)
    index = tuple(slice(a, b) for a, b in box)
    want = np.ascontiguousarray(array[index]).reshape(-1).view(np.uint8)
    run = one_run(SHAPE, itemsize, box)
    if len(want):
        if run is not None:
            assert (flat[run[0] : run[0] + run[1]] == want).all()
        out = np.empty(len(want), np.uint8)

        def read(offset: int, part: np.ndarray) -> None:
            assert offset + len(part) <= len(flat)
            part[:] = flat[offset : offset + len(part)]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(boxes, "_COPY_BLOCK", block)
            patch.setattr(boxes, "_NEAR", block // 2)
            copy_box(read, SHAPE, itemsize, box, out)
        assert (out == want).all()


def test_indices_are_checked() -> None:
    assert normalise((1, slice(0, 2)), (3, 4, 5)) == ([(1, 2), (0, 2), (0, 5)], (2, 5))
    with pytest.raises(IndexError, match="axis 1 of size 4"):
        normalise((0, 4), (3, 4))
    with pytest.raises(IndexError, match="2 indices for 1 axes"):
        normalise((0, 0), (3,))
    with pytest.raises(ValueError, match="step"):
        normalise((slice(0, 3, 2),), (3,))


class Counted:
    """Counts decoded bytes and decoders, wherever they are made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened = self.decoded = 0
        made = zarr_decode.DECODERS["zstd"]
        fill = made._fill

        def make(place: Place) -> zarr_decode.Decoder:
            self.opened += 1
            return made(place)

        def counted(decoder: zarr_decode.Decoder, out: np.ndarray) -> int:
            self.decoded += len(out)
            return fill(decoder, out)

        patch.setitem(zarr_decode.DECODERS, "zstd", make)
        patch.setattr(made, "_fill", counted)


def held(tensor: ZarrTensor) -> int:
    return tensor.pool._used


def test_parts_in_order_decode_once_and_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random_array(5, BF16, (8, 64, 100))
    _, tensor = open_one(tmp_path, array, **ZSTD)
    count = Counted(monkeypatch)
    for i in range(8):
        assert same(tensor.read((i,)), array[i])
        assert held(tensor) == 0
    assert count.opened == 1
    assert count.decoded == array.nbytes + 1  # one byte to see that nothing follows
    assert not tensor.pool._entries  # every byte was handed out
    for a in range(0, 8, 3):  # a second pass starts again
        assert same(tensor.read((slice(a, a + 3),)), array[a : a + 3])
    assert count.opened == 2


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_out_of_order_decode_once(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random_array(5, BF16, (3, 64, 100))
    _, tensor = open_one(tmp_path, array, **ZSTD)
    count = Counted(monkeypatch)
    for i in order:
        assert same(tensor.read((i,)), array[i])
    assert count.decoded <= array.nbytes + 1
    assert held(tensor) == 0
    assert not tensor.pool._entries


@pytest.mark.parametrize("limits", [SMALL, PoolLimits(1 << 20, 1, 0, 2)], ids=["memory", "scratch"])
def test_stacked_along_axis_1(
    limits: PoolLimits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random_array(6, BF16, (64, 6, 7, 4))
    _, tensor = open_one(tmp_path, array, limits=limits, **ZSTD)
    count = Counted(monkeypatch)
    for n in range(6):
        assert same(tensor.read((slice(None), n)), array[:, n])
    assert count.opened == 1
    assert not tensor.pool._entries


def test_last_rows_first_need_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion looks at the embedding's padding rows before it reads the embedding."""
    array = random_array(7, BF16, (100, 64))
    limits = PoolLimits(memory=4096, chunk=4096, gap=1024, cursors=4)
    _, tensor = open_one(tmp_path, array, limits=limits, **ZSTD)
    count = Counted(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(scratch.Scratch, "__init__", None)
        for _ in range(3):
            assert same(tensor.read((slice(96, 100),)), array[96:])
        for a in range(0, 96, 8):
            assert same(tensor.read((slice(a, a + 8),)), array[a : a + 8])
    assert count.opened == 2
    assert count.decoded <= 2 * array.nbytes + 2
    assert held(tensor) <= 4 * 128
    for a in (40, 20, 60, 10):  # more far reads than are worth it: one temporary file
        assert same(tensor.read((slice(a, a + 8),)), array[a : a + 8])
    assert count.opened <= 5


def test_backward_and_overlapping_reads(tmp_path: Path) -> None:
    array = random_array(6, BF16, (40, 50, 8))
    for limits in (SMALL, PoolLimits(4096, 4096, 4096, 1), PoolLimits(0, 0, 0, 1)):
        directory = tmp_path / str(limits.memory)
        _, tensor = open_one(directory, array, limits=limits, **ZSTD)
        for a, b in [(3, 5), (4, 9), (2, 3), (30, 40), (0, 1), (1, 2), (39, 40), (0, 40), (10, 12)]:
            assert same(tensor.read((slice(a, b),)), array[a:b]), (limits, a, b)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 11), st.integers(1, 12), st.booleans()),
        max_size=25,
    ),
    st.integers(0, 9000),
    st.integers(0, 6000),
    st.integers(0, 3000),
    st.integers(1, 3),
)
def test_any_reads_under_any_limits(
    tmp_path_factory: pytest.TempPathFactory,
    reads: list[tuple[int, int, int, bool]],
    memory: int,
    chunk: int,
    gap: int,
    cursors: int,
) -> None:
    arrays, source = three_arrays(tmp_path_factory)
    pool = ChunkPool(PoolLimits(memory, chunk, gap, cursors), lambda: None)
    names = list(arrays)
    for which, a, n, strided in reads:
        name = names[which]
        tensor = source.tensors[name]
        assert isinstance(tensor, ZarrTensor)
        tensor.pool = pool
        index = (slice(None), a % 5) if strided else (slice(a, a + n),)
        assert same(tensor.read(index), arrays[name][index])
        assert 0 <= pool._used <= memory
        assert sum(e.held for e in pool._entries.values()) == pool._used
        assert sum(e.decoder is not None for e in pool._entries.values()) <= cursors
    pool.close()
    assert pool._used == 0
    assert not pool._entries


_THREE: list[tuple[dict[str, np.ndarray], Source]] = []


def three_arrays(factory: pytest.TempPathFactory) -> tuple[dict[str, np.ndarray], Source]:
    if not _THREE:
        directory = factory.mktemp("three")
        arrays = {f"{c}/w": random_array(i, BF16, (12, 5, 40)) for i, c in enumerate("abc")}
        for name, array in arrays.items():
            write_zarr(directory, name.replace("/", "."), array, ocdbt=True, **ZSTD)
        _THREE.append((arrays, orbax.open_source(directory)))
    return _THREE[0]


def test_threads_share_chunks(tmp_path: Path) -> None:
    arrays = {f"{c}/w": random_array(i, BF16, (16, 64, 64)) for i, c in enumerate("abcd")}
    for name, array in arrays.items():
        write_zarr(tmp_path, name.replace("/", "."), array, **ZSTD)
    limits = PoolLimits(memory=200_000, chunk=150_000, gap=40_000, cursors=2)
    source = orbax.open_source(tmp_path, limits=limits)
    work = [(name, i) for i in range(16) for name in arrays] * 2
    np.random.default_rng(0).shuffle(work)
    bad: list[object] = []

    def run(part: list[tuple[str, str]]) -> None:
        for name, i in part:
            try:
                if not same(source.tensors[name].read((int(i),)), arrays[name][int(i)]):
                    bad.append((name, i))
            except Exception as e:
                bad.append(e)

    threads = [threading.Thread(target=run, args=(work[k::4],)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not bad
    pool = source.tensors["a/w"].pool  # type: ignore[attr-defined]
    assert pool._used <= limits.memory
    source.close()
    assert pool._used == 0


@pytest.mark.parametrize("ocdbt", [False, True])
def test_memory_does_not_grow_with_the_chunk(tmp_path: Path, ocdbt: bool) -> None:
    array = random_array(2, BF16, (64, 256, 1024))  # 32 MiB in one chunk
    limits = PoolLimits(memory=4 << 20, chunk=2 << 20, gap=1 << 20)
    source, tensor = open_one(tmp_path, array, limits=limits, ocdbt=ocdbt, **ZSTD)
    source.scratch = tmp_path
    tracemalloc.start()
    for i in range(64):  # in order
        assert tensor.read((i,)).nbytes == 1 << 19
    in_order = tracemalloc.get_traced_memory()[1]
    assert not source.tensors["x/w"].pool._entries  # type: ignore[attr-defined]
    tracemalloc.reset_peak()
    for i in range(0, 256, 64):  # strided: through a temporary file
        assert same(tensor.read((slice(None), i)), array[:, i])
    strided = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert in_order < 6 << 20
    assert strided < 7 << 20
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("tmp")) == []


def test_raw_chunks_need_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = random_array(2, BF16, (64, 16, 1024))
    for ocdbt in (False, True):
        limits = PoolLimits(0, 0, 0, 1)
        _, tensor = open_one(tmp_path / str(ocdbt), array, limits=limits, ocdbt=ocdbt, **RAW)
        monkeypatch.setattr(scratch.Scratch, "__init__", None)
        assert same(tensor.read((slice(None), 3, slice(5, 9))), array[:, 3, 5:9])
        assert same(tensor.read((slice(60, 64),)), array[60:])


def test_no_room_for_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = random_array(2, BF16, (64, 8, 64))
    source, tensor = open_one(tmp_path, array, limits=PoolLimits(0, 0, 0, 1), **ZSTD)
    real = os.statvfs(tmp_path)
    fake = os.statvfs_result((real.f_bsize, 1, 1, 1, 1, *real[5:]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: fake)
        with pytest.raises(SpaceError, match=r"65536 bytes are needed .* 1 are free.*TMPDIR") as e:
            tensor.read((slice(None), 3))
        assert e.value.exit_code == 4
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "pwrite", full)
        with pytest.raises(SpaceError, match="No space left"):
            tensor.read((slice(None), 3))
    source.scratch = tmp_path / "absent"
    with pytest.raises(G2Error, match="absent"):
        tensor.read((slice(None), 3))
    source.scratch = None
    assert same(tensor.read((slice(None), 3)), array[:, 3])  # nothing was left broken


def test_absent_chunks(tmp_path: Path) -> None:
    array = np.zeros((4, 6), "f4")
    array[2:] = 5
    spec = {"chunks": [2, 6], "fill_value": 1.5, "store_fill": False}
    array[:2] = 1.5
    write_zarr(tmp_path, "x.w", array, **spec, **ZSTD)
    assert not (tmp_path / "x.w/0.0").exists()
    write_metadata(tmp_path, {("x", "w"): "jax.Array"}, store_array_data_equal_to_fill_value=False)
    source = orbax.open_source(tmp_path)
    assert same(source.tensors["x/w"].read(), array)
    assert any("left out by the writer" in n for n in source.notes)
    write_metadata(tmp_path, {("x", "w"): "jax.Array"}, store_array_data_equal_to_fill_value=True)
    with pytest.raises(TruncatedError, match=r"x/w: 1 of 2 chunks are missing: x.w/0.0; .*zeros"):
        orbax.open_source(tmp_path)
    write_metadata(tmp_path, {("x", "w"): "jax.Array"}, store_array_data_equal_to_fill_value=False)
    meta = tmp_path / "x.w/.zarray"
    meta.write_text(meta.read_text().replace("1.5", "null"))
    with pytest.raises(TruncatedError, match="1 of 2 chunks are missing"):
        orbax.open_source(tmp_path)


def test_absent_chunk_of_a_shard(tmp_path: Path) -> None:
    array = np.zeros((4, 6), "f4")
    array[2:] = 5
    metadata = sharded([4, 6], [2, 6], BYTES, Z3)
    write_zarr(tmp_path, "x.w", array, zarr=3, store_fill=False, **metadata)
    write_metadata(tmp_path, {("x", "w"): "jax.Array"}, store_array_data_equal_to_fill_value=False)
    assert same(orbax.open_source(tmp_path).tensors["x/w"].read(), array)
    write_metadata(tmp_path, {("x", "w"): "jax.Array"}, store_array_data_equal_to_fill_value=True)
    tensor = orbax.open_source(tmp_path).tensors["x/w"]
    assert same(tensor.read((slice(2, 4),)), array[2:])
    with pytest.raises(TruncatedError, match="does not hold chunk"):
        tensor.read()


def test_damaged_shard_index(tmp_path: Path) -> None:
    array = random_array(1, BF16, (4, 6))
    open_one(tmp_path, array, zarr=3, **sharded([4, 6], [2, 6], BYTES, Z3))
    shard = tmp_path / "x.w/c/0/0"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"x/w: x.w/c/0/0: .*CRC-32C"):
        orbax.open_source(tmp_path).tensors["x/w"].read()
    index = np.frombuffer(bytes(data[-36:-4]), "<u8").copy()
    index[0] = 2**61
    body = index.tobytes()
    shard.write_bytes(bytes(data[:-36]) + body + crc32c(body).to_bytes(4, "little"))
    with pytest.raises(
        G2Error, match=r"x/w: x\.w/c/0/0: bytes 2305843009213693952 to \d+ are needed"
    ):
        orbax.open_source(tmp_path).tensors["x/w"].read()


def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720
    assert crc32c(bytes(32)) == 0x8A9136AA


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "zlib"])
def test_damaged_chunks(codec: str, ocdbt: bool, tmp_path: Path) -> None:
    array = random_array(1, BF16, (64, 64))
    compressor = {"compressor": {"id": codec, "level": 1}}
    open_one(tmp_path, array, ocdbt=ocdbt, **compressor)
    data = stored(tmp_path, ocdbt)
    for changed, kind, text in (
        (data[:-200], TruncatedError, r"ends after \d+ of 8192 bytes"),
        (data[:3], TruncatedError, "ends after 0 of 8192"),
        (b"not compressed at all", FormatError, "decoding fails after 0 bytes"),
        (data + b"more", FormatError, "more than its 8192 bytes"),
        (b"", TruncatedError, "has 0 bytes|ends early"),
    ):
        store(tmp_path, ocdbt, changed)
        with pytest.raises(kind, match=text) as e:
            orbax.open_source(tmp_path).tensors["x/w"].read()
        assert "x/w" in str(e.value)
        assert "x.w/0.0" in str(e.value)
    store(tmp_path, ocdbt, data)
    assert same(orbax.open_source(tmp_path).tensors["x/w"].read(), array)


@pytest.mark.parametrize("ocdbt", [False, True])
def test_raw_chunk_of_another_size(ocdbt: bool, tmp_path: Path) -> None:
    array = random_array(1, BF16, (8, 8))
    open_one(tmp_path, array, ocdbt=ocdbt, **RAW)
    data = stored(tmp_path, ocdbt)
    store(tmp_path, ocdbt, data[:-1])
    with pytest.raises(TruncatedError, match=r"x/w: x.w/0.0"):
        orbax.open_source(tmp_path)
    store(tmp_path, ocdbt, data + b"x")
    with pytest.raises(FormatError, match=r"129 bytes, expected 128|1 bytes more than expected"):
        orbax.open_source(tmp_path)


def stored(directory: Path, ocdbt: bool, key: str = "x.w/0.0") -> bytes:
    import tensorstore as ts

    base = {"driver": "file", "path": f"{directory}/"}
    spec = {"driver": "ocdbt", "base": base} if ocdbt else base
    return bytes(ts.KvStore.open(spec).result().read(key.encode()).result().value)


def store(directory: Path, ocdbt: bool, data: bytes, key: str = "x.w/0.0") -> None:
    import tensorstore as ts

    base = {"driver": "file", "path": f"{directory}/"}
    spec = {"driver": "ocdbt", "base": base} if ocdbt else base
    ts.KvStore.open(spec).result().write(key.encode(), data).result()


def test_two_frames_and_decompression_bombs(tmp_path: Path) -> None:
    array = np.zeros((64, 64), "u1")
    open_one(tmp_path, array, **ZSTD)
    half = zstandard.ZstdCompressor().compress(bytes(2048))
    store(tmp_path, False, half + half)
    assert same(orbax.open_source(tmp_path).tensors["x/w"].read(), array)
    # a header that asks for 2^39 bytes beside a chunk of 40 bytes
    meta = tmp_path / "x.w/.zarray"
    text = meta.read_text()
    meta.write_text(text.replace("[64,64]", f"[{1 << 19},{1 << 20}]"))
    with pytest.raises(LayoutError, match="549755813888 bytes cannot come out of"):
        orbax.open_source(tmp_path)
    meta.write_text(text.replace("[64,64]", f"[{1 << 40},{1 << 40}]"))
    with pytest.raises(LimitError, match="at most"):
        orbax.open_source(tmp_path)
    meta.write_text(text.replace('"shape":[64,64]', f'"shape":[{1 << 38},64]'))
    with pytest.raises(LimitError, match=r"chunks, at most|bytes, at most"):
        orbax.open_source(tmp_path)


BROKEN_META = {
    '"chunks":[64,64]': ('"chunks":[64]', FormatError, "differ in the number of axes"),
    '"shape":[64,64]': ('"shape":[64,-1]', FormatError, "shape holds -1"),
    '"chunks":[64,64],': ("", FormatError, "chunks must be a list"),
    '"dtype":"bfloat16"': ('"dtype":"int4"', G2Error, "element type 'int4' is not supported"),
    '"id":"zstd"': ('"id":[1]', FormatError, "compressor has no id"),
    '"dimension_separator":"."': ('"dimension_separator":"x"', FormatError, "dimension_separator"),
    "{": ("[", FormatError, "not JSON"),
    '"order":"C"': ('"order":"C","order":"F"', FormatError, "appears twice"),
    '"id":"zstd",': ('"id":"zap",', FormatError, "tensorstore cannot open it"),
}


@pytest.mark.parametrize("found", BROKEN_META)
def test_broken_array_metadata(found: str, tmp_path: Path) -> None:
    new, kind, message = BROKEN_META[found]
    open_one(tmp_path, random_array(1, BF16, (64, 64)), **ZSTD)
    meta = tmp_path / "x.w/.zarray"
    assert found in meta.read_text()
    meta.write_text(meta.read_text().replace(found, new, 1))
    with pytest.raises(kind, match=message) as e:
        orbax.open_source(tmp_path).tensors["x/w"].read()
    assert str(tmp_path) in str(e.value)


def test_values_end_where_asked(tmp_path: Path) -> None:
    """Ranges of stored values, in files and in OCDBT, around piece boundaries."""
    size = (512 << 10) + 7
    data = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    for ocdbt in (False, True):
        directory = tmp_path / str(ocdbt)
        open_one(directory, random_array(1, BF16, (8, 8)), ocdbt=ocdbt, **RAW)
        tensor = orbax.open_source(directory).tensors["x/w"]
        assert isinstance(tensor, ZarrTensor)
        for n in (1, 512 << 10, size):
            store(directory, ocdbt, data[:n], "y/0")
            files = orbax.walk(directory)
            fresh = (
                orbax.OcdbtStore(directory, 10**9) if ocdbt else orbax.FileStore(directory, files)
            )
            value: Value = fresh.open("y/0", "y")
            assert b"".join(map(bytes, value.pieces(0, None))) == data[:n]
            assert b"".join(map(bytes, value.pieces(n // 2, n))) == data[n // 2 : n]
            assert value.tail(1) == data[n - 1 : n]
            with pytest.raises(TruncatedError):
                list(value.pieces(0, n + 1))
            with pytest.raises(TruncatedError):
                value.tail(n + 1)
            value.close()
