"""Writes a ContainerPlan the plainest way: the oracle for what output.py must produce."""

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from g2kit.formats.base import Chunk, ContainerPlan


def materialise(plan: ContainerPlan, arrays: Mapping[str, np.ndarray], directory: Path) -> None:
    """Create every file of the plan below ``directory``, filled from ``arrays`` (by slot).

    Shares no code with formats/output.py; overlapping or out-of-bounds byte ranges are errors.
    """
    assert set(arrays) == set(plan.chunks), set(arrays) ^ set(plan.chunks)
    assert len({f.name for f in plan.files}) == len(plan.files), "a file is planned twice"
    images = {f.name: np.zeros(f.size, np.uint8) for f in plan.files}
    written = {f.name: np.zeros(f.size, bool) for f in plan.files}

    def put(file: str, offset: int, data: bytes | np.ndarray) -> None:
        new = np.frombuffer(data, np.uint8)
        assert 0 <= offset <= offset + len(new) <= len(images[file]), (file, offset, len(new))
        span = slice(offset, offset + len(new))
        assert not written[file][span].any(), f"{file}: bytes {span} are written twice"
        images[file][span], written[file][span] = new, True

    for f in plan.files:
        for offset, data in f.fixed:
            put(f.name, offset, data)
    for slot, chunks in plan.chunks.items():
        seen = np.zeros(arrays[slot].shape, bool)
        for chunk in chunks:
            box = tuple(slice(a, a + n) for a, n in zip(chunk.start, chunk.shape, strict=True))
            assert not seen[box].any(), f"{slot}: chunks overlap"
            seen[box] = True
            put(chunk.file, chunk.offset, padded(arrays[slot], chunk).tobytes())
        assert seen.all(), f"{slot}: the chunks do not cover it"
    for patch in plan.crc32:
        crc = zlib.crc32(payload(arrays[patch.slot]))
        for offset in patch.offsets:  # over a place that fixed bytes may hold, as zeros
            place = images[patch.file][offset : offset + 4]
            assert len(place) == 4, f"{patch}: outside of the file"
            assert not place.any(), f"{patch}: the place is not empty"
            place[:] = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)
    for name, image in images.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.tobytes())


def padded(array: np.ndarray, chunk: Chunk) -> np.ndarray:
    """The chunk's box of the array, zero past its edge."""
    out = np.zeros(chunk.shape, array.dtype)
    box = tuple(slice(a, a + n) for a, n in zip(chunk.start, chunk.shape, strict=True))
    part = array[box]
    out[tuple(slice(0, n) for n in part.shape)] = part
    return out


def payload(array: np.ndarray) -> bytes:
    """Row-major bytes of the array."""
    return np.ascontiguousarray(array).tobytes()


def random_array(seed: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Random bytes viewed as ``dtype``: every bit pattern may occur."""
    raw = np.random.default_rng(seed).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)
