"""Hashing canonical tensors: what makes two checkpoints of different formats comparable."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..formats.arena import Memory, recycled
from ..formats.dtypes import BF16, BY_SHORT, F16, F32, short
from ..formats.errors import NonFiniteError
from ..formats.fingerprint import TensorHasher, leaf
from ..formats.fingerprint import fingerprint as fingerprint_of
from ..formats.manifest import TensorEntry
from ..model import canonical
from .open import Checkpoint, LazyTensor
from .progress import SILENT, Tick

Array = npt.NDArray[Any]
T = TypeVar("T")
WORKERS = 2


def run_all(
    jobs: Mapping[str, Callable[[], T]], workers: int = WORKERS, stop: threading.Event | None = None
) -> dict[str, T]:
    """Run named jobs in order on a few threads; the first error stops the rest and is raised."""
    stop = stop or threading.Event()

    def guarded(job: Callable[[], T]) -> T | None:
        return None if stop.is_set() else job()

    with ThreadPoolExecutor(workers) as pool:
        futures: dict[str, Future[T | None]] = {n: pool.submit(guarded, j) for n, j in jobs.items()}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            # also on KeyboardInterrupt: what has not started must not start
            if any(f.done() and f.exception() for f in futures.values()) or not all(
                f.done() for f in futures.values()
            ):
                stop.set()
        return {name: f.result() for name, f in futures.items()}  # type: ignore[misc]


class _Lane(threading.local):
    """What overlaps within one worker: while it writes a block, the next is read and this one hashed."""

    def __init__(self) -> None:
        self.reader = ThreadPoolExecutor(1, "g2kit-read")
        self.hasher = ThreadPoolExecutor(1, "g2kit-digest")
        self.memories = (Memory(), Memory())


_lane = _Lane()
_END: Any = object()


def read_ahead(blocks: Iterable[T]) -> Iterator[T]:
    """The blocks, the next one being read meanwhile; each in memory that the next but one reuses: do not keep them."""
    parts, memories, reader = iter(blocks), cycle(_lane.memories), _lane.reader

    def step() -> T:
        with recycled(next(memories)):
            return next(parts, _END)

    coming = reader.submit(step)
    try:
        while (part := coming.result()) is not _END:
            coming = reader.submit(step)
            yield part
    finally:
        wait([coming])  # it uses this worker's memory


def meanwhile(work: Callable[[], None]) -> Future[None]:
    """Run something beside this worker; its result must be waited for."""
    return _lane.hasher.submit(work)


def digest(tensor: LazyTensor, progress: Tick = SILENT, *, finite: bool = False) -> TensorEntry:
    """Hash one tensor's canonical bytes.

    Args:
        tensor: what to hash.
        progress: told of bytes read.
        finite: refuse NaN and infinity.

    Raises:
        NonFiniteError: there are some.
    """
    hasher = TensorHasher(tensor.name, tensor.dtype, tensor.shape)
    bad = 0
    for _, _, rows in read_ahead(tensor.blocks()):
        hasher.update(rows)
        bad += count_nonfinite(rows) if finite else 0
        progress(rows.nbytes, tensor.name)
    if bad:
        raise NonFiniteError(
            f"{bad} of {math.prod(tensor.shape)} weights are NaN or infinite.",
            where=tensor.source.where,
            tensor=tensor.name,
            fix="get the checkpoint again; nothing was written.",
        )
    return entry(hasher)


def entry(hasher: TensorHasher) -> TensorEntry:
    """What a manifest says of a tensor, once all of it was hashed."""
    return TensorEntry(short(hasher.dtype), hasher.shape, hasher.hexdigest())


def is_zero(record: TensorEntry) -> bool:
    """Whether these are zero bits, told by their hash."""
    nbytes = math.prod(record.shape) * BY_SHORT[record.dtype].itemsize
    return record.sha256 == hashlib.sha256(bytes(nbytes)).hexdigest()


def digests(
    checkpoint: Checkpoint,
    progress: Tick = SILENT,
    workers: int = WORKERS,
    *,
    finite: bool = False,
) -> dict[str, TensorEntry]:
    """Hash every tensor of a checkpoint, padding rows included when there are any; ``finite`` as in :func:`digest`."""

    def job(tensor: LazyTensor) -> Callable[[], TensorEntry]:
        return lambda: digest(tensor, progress, finite=finite)

    return run_all({n: job(t) for n, t in checkpoint.tensors.items()}, workers)


def counting(records: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The records that make the fingerprint: all-zero padding rows carry nothing and do not count."""
    return {n: r for n, r in records.items() if n != canonical.EMBED_PADDING or not is_zero(r)}


def root(records: Mapping[str, TensorEntry]) -> str:
    """The fingerprint over every tensor's record."""
    return fingerprint_of(
        {n: leaf(n, r.dtype, r.shape, r.sha256) for n, r in counting(records).items()}
    )


# exponent bits all ones: NaN or infinity; compared as integers, several times faster than isfinite
_EXPONENT: dict[Any, tuple[Any, int]] = {
    BF16: (np.uint16, 0x7F80),
    F16: (np.uint16, 0x7C00),
    F32: (np.uint32, 0x7F800000),
}
_PIECE = 1 << 19


def count_nonfinite(x: Array) -> int:
    """How many elements are NaN or infinite."""
    if x.dtype not in _EXPONENT:
        return int(np.count_nonzero(~np.isfinite(x)))
    kind, mask = _EXPONENT[x.dtype]
    flat = x.reshape(-1).view(kind)
    limit = kind(mask)
    bad = 0
    for start in range(0, flat.size, _PIECE):  # pieces stay in cache
        bits = flat[start : start + _PIECE] & limit
        if bits.max() == limit:
            bad += int(np.count_nonzero(bits == limit))
    return bad


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits (NaN equals NaN, 0 differs from -0)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def iter_pairs(a: LazyTensor, b: Any) -> Iterator[tuple[Array, Array]]:
    """Rows of a canonical tensor beside the same rows of a foreign one of the same orientation."""
    for start, stop, rows in a.blocks():
        yield rows, b.read((slice(start, stop),))


def names_of(records: Iterable[str], limit: int = 5) -> str:
    """A short list for a message."""
    listed = list(records)
    shown = ", ".join(listed[:limit])
    return shown if len(listed) <= limit else f"{shown} and {len(listed) - limit} more"
