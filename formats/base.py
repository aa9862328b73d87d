"""The two interfaces every container implements: lazy named tensors to read, a file plan to write.

Reading: ``open_source(path) -> Source`` gives named :class:`Tensor` objects; nothing but headers is read until
:meth:`Tensor.read`. Writing: ``plan(slots, …) -> ContainerPlan`` lays out every file to the byte before any data
exists; :mod:`.output` then fills the slots in any order, from any thread, and resumes after a kill.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arena import empty
from .errors import LayoutError
from .files import InputFile

Array = npt.NDArray[Any]
Index = tuple[int | slice, ...]


class QuantizedWeight(ABC):
    """A linear weight stored in fewer bits; what every quantized tensor opens as.

    Attributes:
        kind: bit layout, such as ``torch_int8`` or ``ggml.Q4_K``.
        shape: ``(out_features, in_features)``.
        bits: stored bits per weight, scales included.
        code_bits: bits of a weight's code.
        group_size: weights along a row that share a scale, or a block of such groups.
    """

    kind: str
    shape: tuple[int, ...]
    bits: float
    code_bits: int
    group_size: int

    @abstractmethod
    def dequantize(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start:stop`` as float32, shape ``(stop - start, in_features)``."""


class Tensor(ABC):
    """One named array on disk, read on demand. Thread-safe.

    Attributes:
        name: the container's own name for it.
        dtype: element type that :meth:`read` returns (float32 when ``quantized`` is set).
        shape: row-major, slowest axis first.
        where: file or directory holding the bytes, for messages.
        stored: dtype as the container calls it, for tables (``BF16``, ``Q4_K``).
        quantized: the packed weight behind it, or None for plain arrays.
    """

    def __init__(
        self,
        name: str,
        dtype: np.dtype,
        shape: Sequence[int],
        where: Path,
        stored: str,
        quantized: QuantizedWeight | None = None,
    ) -> None:
        self.name = name
        self.dtype = np.dtype(dtype)
        self.shape = tuple(int(n) for n in shape)
        self.where = where
        self.stored = stored
        self.quantized = quantized

    @property
    def nbytes(self) -> int:
        """Bytes of the array :meth:`read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def read(self, index: Index = ()) -> Array:
        """``array[index]`` as a C-contiguous array; ints and step-1 slices on leading axes.

        Memory is that of the result where the container allows it; a container that must decode a whole chunk
        says so in its module's docstring and bounds what it keeps.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.stored}, {self.shape})"


class RowTensor(Tensor):
    """A plain row-major array in one piece of one file."""

    def __init__(
        self,
        name: str,
        dtype: np.dtype,
        shape: Sequence[int],
        file: InputFile,
        offset: int,
        stored: str,
    ) -> None:
        super().__init__(name, dtype, shape, file.path, stored)
        self.file = file
        self.offset = offset

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`; only the rows the index touches are read."""
        start, stop, rest = leading_rows(self.shape, index)
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        out = empty((stop - start, *self.shape[1:]) if self.shape else (), self.dtype)
        if out.nbytes:
            # reshape before view: a 0-d array has no axis to reinterpret as bytes
            self.file.read_into(self.offset + start * row, out.reshape(-1).view(np.uint8))
        return np.asarray(out[rest], order="C") if rest else out


def leading_rows(shape: tuple[int, ...], index: Index) -> tuple[int, int, Index]:
    """Rows of axis 0 that ``index`` needs, and the index left to apply to those rows.

    Returns:
        ``(start, stop, rest)``; ``array[start:stop][rest]`` equals ``array[index]``; ``rest`` is empty when the rows
        are already the answer.
    """
    if not shape or not index:
        return 0, shape[0] if shape else 0, ()
    first, tail = index[0], index[1:]
    if isinstance(first, slice):
        start, stop, step = first.indices(shape[0])
        if step != 1:
            raise ValueError(f"step must be 1, got {first}")
        return start, max(stop, start), (slice(None), *tail) if tail else ()
    if not 0 <= first < shape[0]:
        raise IndexError(f"index {first} out of range for axis 0 of size {shape[0]}")
    return first, first + 1, (0, *tail)


@dataclass
class Source:
    """An opened container: named tensors and whatever else the files say.

    Attributes:
        format: container module's name, such as ``safetensors``.
        path: what the user named.
        tensors: name -> lazy tensor, in the container's order.
        metadata: the container's own key-values (safetensors ``__metadata__``, GGUF KV, Keras/Orbax JSON).
        files: the weight files, for inventories and change checks.
        notes: odd but harmless findings, one sentence each.
        scratch: directory for temporary spills; None means the system's.
    """

    format: str
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    notes: list[str] = field(default_factory=list)
    scratch: Path | None = None
    check_unchanged: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Slot:
    """One tensor to be written: name, element type and shape in the target's own terms."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class FilePlan:
    """One output file, complete but for the slots' payload.

    Attributes:
        name: path relative to the output directory, ``/``-separated.
        size: final size in bytes.
        fixed: ``(offset, bytes)`` written as they are: headers, indices, padding that is not zero.
    """

    name: str
    size: int
    fixed: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A box of a slot's array stored row-major in one run of a file.

    Attributes:
        start: the box's first index on every axis.
        shape: the box's size on every axis as stored; may reach past the array's edge (the rest stays zero).
        file: the :class:`FilePlan` name.
        offset: where the run begins.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class Crc32Patch:
    """A CRC-32 of one slot's payload that the file stores, little-endian, at ``offsets`` (torch's zip archives)."""

    slot: str
    file: str
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class ContainerPlan:
    """Everything a container writes, before any payload exists. Same slots and options: same bytes.

    Attributes:
        files: every file, in the order they should be written.
        chunks: slot name -> the boxes that make up its array; most containers use one box for all of it.
        crc32: checksums to fill in when their slot is complete.
    """

    files: tuple[FilePlan, ...]
    chunks: Mapping[str, tuple[Chunk, ...]]
    crc32: tuple[Crc32Patch, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


def runs(
    chunk: Chunk, itemsize: int, start: tuple[int, ...], stop: tuple[int, ...]
) -> tuple[int, tuple[slice, ...]] | None:
    """Where the part of box ``[start, stop)`` that falls into ``chunk`` goes.

    Returns:
        ``(file offset, index into the caller's box)``, or None when they do not meet. The part must be one run of
        the chunk's bytes: whole in every axis behind the first one that has more than one index.

    Raises:
        LayoutError: it is not one run; the plan's chunks do not suit the writer's regions.
    """
    lo = [max(a, c) for a, c in zip(start, chunk.start, strict=True)]
    hi = [min(b, c + n) for b, c, n in zip(stop, chunk.start, chunk.shape, strict=True)]
    if any(a >= b for a, b in zip(lo, hi, strict=True)):
        return None
    axes = list(zip(lo, hi, chunk.start, chunk.shape, strict=True))
    many = [k for k, (a, b, _, _) in enumerate(axes) if b - a > 1]
    for k, (a, b, _, n) in enumerate(axes):
        if many and k > many[0] and b - a != n:
            raise LayoutError(
                f"region {start}..{stop} is not one run of chunk {chunk.start}+{chunk.shape}"
            )
    flat = 0
    for a, _, c, n in axes:
        flat = flat * n + (a - c)
    inside = tuple(slice(a - s, b - s) for a, b, s in zip(lo, hi, start, strict=True))
    return chunk.offset + flat * itemsize, inside


def iter_row_blocks(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[tuple[int, int]]:
    """Split axis 0 into blocks of at most ``limit`` bytes (at least one row each).

    Reading is fastest in blocks of 2 to 16 MB: malloc returns one of 32 MB to the kernel, which clears it anew.
    """
    rows = shape[0] if shape else 1
    row = math.prod(shape[1:]) * itemsize
    step = max(1, limit // max(row, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
