"""Transfers past the page cache give the same bytes as ordinary ones, whatever the alignment, and fall back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats import direct
from g2kit.formats.direct import SMALL, DirectFile
from g2kit.formats.files import InputFile

SIZE = 3 * SMALL + 12345


def read_all(file: DirectFile, size: int, offset: int) -> bytes:
    out = memoryview(bytearray(size))
    done = 0
    while done < size:
        n = file.read(out[done:], offset + done)
        if n == 0:
            break
        done += n
    return bytes(out[:done])


def write_all(file: DirectFile, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += file.write(memoryview(data)[done:], offset + done)


def drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, SIZE), st.integers(1, SIZE), st.booleans())
def test_reads_equal_plain_reads(
    tmp_path_factory: pytest.TempPathFactory, offset: int, size: int, cold: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "direct.bin"
    if not path.exists():
        path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    if cold:
        drop_cache(path)
    data = path.read_bytes() if not cold else None
    fd = os.open(path, os.O_RDONLY)
    file = DirectFile(fd, os.O_RDONLY)
    got = read_all(file, size, offset)
    file.close()
    os.close(fd)
    assert got == (data or path.read_bytes())[offset : offset + size]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, SIZE)), min_size=1, max_size=4))
def test_writes_equal_plain_writes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]]
) -> None:
    """Overlapping, unaligned, beyond the end: the file is what plain pwrite makes of it."""
    root = tmp_path_factory.getbasetemp()
    rng = np.random.default_rng(2)
    fds = [os.open(root / n, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for n in ("one", "two")]
    file = DirectFile(fds[0], os.O_RDWR)
    for offset, size in parts:
        data = rng.bytes(size)
        write_all(file, data, offset)
        os.pwrite(fds[1], data, offset)
    file.close()
    for fd in fds:
        os.close(fd)
    assert (root / "one").read_bytes() == (root / "two").read_bytes()


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_transfers_still_works(
    refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def no_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(refused, os.strerror(refused))
        return real(path, flags, *rest)

    monkeypatch.setattr(direct.os, "open", no_direct)
    data = np.random.default_rng(3).bytes(SIZE)
    fd = real(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    file = DirectFile(fd, os.O_RDWR)
    write_all(file, data, 5)
    drop_cache(tmp_path / "f")
    assert read_all(file, SIZE, 5) == data
    os.close(fd)


def test_real_failures_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    file = DirectFile(fd, os.O_RDWR)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(direct.os, "pwrite", full)
    with pytest.raises(OSError, match="no space"):
        file.write(memoryview(bytes(SIZE)), 0)
    os.close(fd)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(SIZE))
    with InputFile(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(Exception, match="shorter while it was read"):
            file.read_into(0, memoryview(bytearray(SIZE)))


def test_what_is_cached_is_told(tmp_path: Path) -> None:
    """Needed for the choice; a kernel that does not tell says cached, which means ordinary reads."""
    path = tmp_path / "f"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDONLY)
    assert direct.is_cached(fd, 0, SIZE)
    drop_cache(path)
    told = not direct.is_cached(fd, 0, SIZE)
    os.pread(fd, SIZE, 0)
    assert direct.is_cached(fd, 0, SIZE)
    os.close(fd)
    if not told:
        assert tuple(map(int, os.uname().release.split(".")[:2])) < (6, 5)
