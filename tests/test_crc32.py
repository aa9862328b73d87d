"""Checksums joined from pieces equal zlib's over the whole."""

import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats.crc32 import PiecewiseCrc32, combine


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_the_crc_of_the_concatenation(a: bytes, b: bytes) -> None:
    assert combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_combine_of_long_runs() -> None:
    zeros = bytes(1 << 20)
    crc = zlib.crc32(b"head")
    for _ in range(8):
        crc = zlib.crc32(zeros, crc)
    tail = 0
    for _ in range(8):
        tail = zlib.crc32(zeros, tail)
    assert combine(zlib.crc32(b"head"), tail, 8 << 20) == crc


@settings(deadline=None)
@given(st.data(), st.binary(min_size=0, max_size=200))
def test_any_order_with_repeats_gives_the_whole(data: st.DataObject, content: bytes) -> None:
    crc = PiecewiseCrc32(len(content))
    cut = st.integers(0, len(content))
    for _ in range(data.draw(st.integers(0, 8))):
        a, b = sorted((data.draw(cut), data.draw(cut)))
        crc.update(a, content[a:b])
    for a, b in crc.gaps():
        assert crc.value is None
        crc.update(a, content[a:b])
    assert crc.gaps() == []
    assert crc.value == zlib.crc32(content)


def test_overlap_is_ignored_and_left_as_a_gap() -> None:
    crc = PiecewiseCrc32(10)
    crc.update(0, b"01234")
    crc.update(3, b"XXXX")
    assert crc.gaps() == [(5, 10)]


@pytest.mark.parametrize("step", [1, 7, 64])
def test_threads(step: int) -> None:
    content = bytes(range(256)) * 8
    crc = PiecewiseCrc32(len(content))

    def work(first: int) -> None:
        for a in range(first * step, len(content), 4 * step):
            crc.update(a, content[a : a + step])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert crc.value == zlib.crc32(content)
