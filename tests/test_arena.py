"""Recycled memory: reused after the block, never twice at once, never outside of one."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from g2kit.formats.arena import empty, recycled

BIG = 2 << 20


def test_memory_is_reused_after_the_block_only() -> None:
    def address() -> int:
        return int(empty((BIG,), np.uint8).__array_interface__["data"][0])

    with recycled():
        first = address()
        assert address() != first, "both are in use"
    with recycled():
        assert address() == first
    kept = empty((BIG,), np.uint8)
    kept[:] = 7
    with recycled():
        empty((BIG,), np.uint8)[:] = 9
    assert (kept == 7).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1 << 20, 4 << 20), max_size=5), min_size=1, max_size=6))
def test_arrays_of_one_block_never_overlap(blocks: list[list[int]]) -> None:
    for sizes in blocks:
        with recycled():
            arrays = [empty((n,), np.uint8) for n in sizes]
            for k, a in enumerate(arrays):
                a[:: max(1, len(a) // 50)] = k
            for k, a in enumerate(arrays):
                assert (a[:: max(1, len(a) // 50)] == k).all()


def test_inner_blocks_give_back_only_their_own() -> None:
    with recycled():
        outer = empty((BIG,), np.uint8)
        outer[:] = 1
        with recycled():
            empty((BIG,), np.uint8)[:] = 2
        empty((BIG,), np.uint8)[:] = 3
        assert (outer == 1).all()


def test_threads_do_not_share() -> None:
    seen: list[int] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        with recycled():
            seen.append(int(empty((BIG,), np.uint8).__array_interface__["data"][0]))
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(seen)) == 2
