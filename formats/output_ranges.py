"""Which bytes of the planned files are whose: checks a plan before writing, and knows what is written.

A hole that silently stays zero is the worst failure a converter can have; so every payload byte is accounted for,
across interruptions too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from .base import Chunk, ContainerPlan, FilePlan, Slot
from .errors import LayoutError

Span = tuple[int, int]


class Ranges:
    """A set of integers kept as sorted, disjoint, non-adjacent ``[start, stop)`` spans."""

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in spans:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Add a span."""
        if start >= stop:
            return
        lo = bisect_left(self._stops, start)  # first span that touches from the left …
        hi = bisect_right(self._starts, stop)  # … and one past the last
        if lo < hi:
            start, stop = min(start, self._starts[lo]), max(stop, self._stops[hi - 1])
        self._starts[lo:hi], self._stops[lo:hi] = [start], [stop]

    def end(self, at: int) -> int:
        """Where the span holding ``at`` stops; ``at`` itself if none holds it."""
        k = bisect_right(self._starts, at) - 1
        return max(at, self._stops[k]) if k >= 0 else at

    def spans(self) -> list[Span]:
        """The spans in order."""
        return list(zip(self._starts, self._stops, strict=True))


def split_runs(
    chunk: Chunk, itemsize: int, start: Sequence[int], stop: Sequence[int]
) -> Iterator[tuple[int, int, tuple[int | slice, ...]]]:
    """The runs of a chunk's bytes that box ``[start, stop)`` of the slot's array covers.

    :func:`.base.runs` for any box: one that is not a single run gives several.

    Yields:
        ``(file offset, bytes, index into the caller's box)``.
    """
    lo = [max(a, c) for a, c in zip(start, chunk.start, strict=True)]
    hi = [min(b, c + n) for b, c, n in zip(stop, chunk.start, chunk.shape, strict=True)]
    if any(a >= b for a, b in zip(lo, hi, strict=True)):
        return
    t = len(lo) - 1  # the axis behind which everything is whole
    while t > 0 and hi[t] - lo[t] == chunk.shape[t]:
        t -= 1
    tail = tuple(slice(a - s, b - s) for a, b, s in zip(lo[t:], hi[t:], start[t:], strict=True))
    size = itemsize * math.prod(b - a for a, b in zip(lo[t:], hi[t:], strict=True))
    outer = [range(a, b) for a, b in zip(lo[:t], hi[:t], strict=True)] if lo else []
    for place in itertools.product(*outer):
        flat = 0
        for i, c, n in zip((*place, *lo[t:]), chunk.start, chunk.shape, strict=True):
            flat = flat * n + (i - c)
        head = tuple(i - s for i, s in zip(place, start, strict=False))
        yield chunk.offset + flat * itemsize, size, (*head, *tail)


def needed(chunk: Chunk, slot: Slot) -> list[Span]:
    """File spans of the part of a chunk that lies inside the slot's array."""
    size = np.dtype(slot.dtype).itemsize
    return [(o, o + n) for o, n, _ in split_runs(chunk, size, (0,) * len(slot.shape), slot.shape)]


def check_plan(plan: ContainerPlan, slots: Sequence[Slot]) -> dict[str, list[Span]]:
    """Prove that a plan gives every slot byte one place of its own.

    Returns:
        File name -> the spans nobody but the writer of slots and checksums fills, in order.

    Raises:
        LayoutError: a slot without chunks, chunks that overlap, miss a part or leave their file.
    """
    files = {f.name: f for f in plan.files}
    if len(files) != len(plan.files):
        raise LayoutError("the plan names a file twice.")
    by_name = {s.name: s for s in slots}
    if odd := sorted(by_name.keys() ^ plan.chunks.keys()):
        raise LayoutError(f"slots and plan differ in {len(odd)} names: {', '.join(odd[:5])}.")
    spans: dict[str, list[Span]] = {name: [] for name in files}
    for slot in slots:
        total = 0
        for chunk in plan.chunks[slot.name]:
            _require_file(files, chunk.file, slot.name)
            runs = needed(chunk, slot)
            total += sum(b - a for a, b in runs)
            spans[chunk.file] += runs
            if chunk.offset < 0 or chunk_stop(chunk, slot) > files[chunk.file].size:
                raise LayoutError(f"{chunk} does not fit into the file.", tensor=slot.name)
        if total != slot.nbytes:
            raise LayoutError(f"the chunks hold {total} bytes of {slot.nbytes}.", tensor=slot.name)
    _check_fixed(plan, spans)
    for patch in plan.crc32:
        _require_file(files, patch.file, patch.slot)
        if len(plan.chunks.get(patch.slot, ())) != 1:
            raise LayoutError("a checksum needs a slot in one chunk.", tensor=patch.slot)
        spans[patch.file] += [(o, o + 4) for o in patch.offsets]
    for name, places in spans.items():
        places.sort()
        _require_disjoint(name, files[name].size, places)
    return spans


def chunk_stop(chunk: Chunk, slot: Slot) -> int:
    """One past the last byte of the whole chunk, the part beyond the array's edge included."""
    return chunk.offset + math.prod(chunk.shape) * np.dtype(slot.dtype).itemsize


def _check_fixed(plan: ContainerPlan, payload: Mapping[str, list[Span]]) -> None:
    for f in plan.files:
        fixed = [(offset, offset + len(data)) for offset, data in f.fixed if data]
        _require_disjoint(f.name, f.size, sorted([*payload[f.name], *fixed]))


def _require_file(files: Mapping[str, FilePlan], name: str, slot: str) -> None:
    if name not in files:
        raise LayoutError(f"the plan has no file {name!r}.", tensor=slot)


def _require_disjoint(name: str, size: int, spans: list[Span]) -> None:
    for (_, stop), (start, _) in itertools.pairwise(spans):
        if start < stop:
            raise LayoutError(f"two things are planned at byte {start}.", where=name)
    if spans and (spans[0][0] < 0 or spans[-1][1] > size):
        raise LayoutError(f"bytes {spans[0][0]} to {spans[-1][1]} of {size} planned.", where=name)


def layout_digest(plan: ContainerPlan, slots: Sequence[Slot]) -> str:
    """sha256 of everything a plan says, so that a resumed run proves it writes the same bytes."""
    h = hashlib.sha256()
    for f in plan.files:
        fixed = [(offset, hashlib.sha256(data).hexdigest()) for offset, data in f.fixed]
        h.update(json.dumps(["file", f.name, f.size, fixed]).encode() + b"\n")
    for s in sorted(slots, key=lambda s: s.name):
        chunks = [(c.start, c.shape, c.file, c.offset) for c in plan.chunks[s.name]]
        row = ["slot", s.name, np.dtype(s.dtype).name, s.shape, chunks]
        h.update(json.dumps(row).encode() + b"\n")
    for p in plan.crc32:
        h.update(json.dumps(["crc32", p.slot, p.file, p.offsets]).encode() + b"\n")
    return h.hexdigest()
