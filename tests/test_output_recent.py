"""What was written a moment ago is hashed from memory, and only what it was."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.convert.digest import read_ahead
from g2kit.formats.arena import empty
from g2kit.formats.output_recent import Recent

PIECE = 4 << 20


def test_a_piece_is_given_once_and_only_whole():
    recent = Recent()
    data = np.arange(100_000, dtype=np.uint8)
    recent.put("f", data.data, 500)
    assert recent.take("f", 499, 1 << 30) is None
    assert recent.take("f", 500, 100_499) is None  # its last byte is not final yet
    assert recent.take("g", 500, 1 << 30) is None
    start, piece = recent.take("f", 600, 100_500)
    assert start == 500
    assert np.array_equal(piece, data)
    assert recent.take("f", 600, 100_500) is None
    recent.back(piece)


def test_the_oldest_go_first_and_memory_is_bounded():
    recent = Recent(2 * PIECE)
    block = np.zeros(PIECE, np.uint8)
    for k in range(5):
        assert recent.full == (k >= 2)
        recent.put("f", block.data, k * PIECE)
    assert recent.take("f", 0, 1 << 30) is None
    assert recent.next_start("f", 0) == 3 * PIECE
    assert recent.take("f", 4 * PIECE, 1 << 30) is not None


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 400_000), min_size=1, max_size=12), st.randoms(use_true_random=False)
)
def test_any_order_gives_the_files_bytes(sizes, random):
    recent = Recent(1 << 40)
    data = np.random.default_rng(len(sizes)).integers(0, 256, sum(sizes), np.uint8)
    starts = np.cumsum([0, *sizes])
    order = list(range(len(sizes)))
    random.shuffle(order)
    for k in order:
        recent.put("f", data[starts[k] : starts[k + 1]].data, int(starts[k]))
    at, h = 0, hashlib.sha256()
    while at < len(data):
        found = recent.take("f", at, len(data))
        if found is None:  # small writes are not kept
            stop = recent.next_start("f", at) or len(data)
            h.update(data[at:stop].data)
            at = stop
            continue
        start, piece = found
        h.update(piece[at - start :].data)
        at = start + len(piece)
        recent.back(piece)
    assert h.digest() == hashlib.sha256(data).digest()


def test_reading_ahead_gives_every_block_and_raises_where_reading_does():
    def blocks():
        for k in range(7):
            x = empty((1 << 20,), np.uint8)  # recycled: must survive until the next but one
            x[:] = k
            yield x
        raise ValueError("damaged")

    seen = []

    def read():
        for x in read_ahead(blocks()):
            assert (x == len(seen)).all()
            seen.append(int(x[0]))

    with pytest.raises(ValueError, match="damaged"):
        read()
    assert seen == list(range(7))
