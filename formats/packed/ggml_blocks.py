"""ggml's quantized blocks (Q4_K, Q8_0, IQ4_XS, …): native bytes kept, rows dequantized when read.

A row is a run of blocks of fixed size, each with its own scales, so any run of rows decodes on its own. Block sizes and
decoding come from the ``gguf`` package, llama.cpp's own; it is imported when the first quantized tensor is met.
Its decoders allocate several times their output, so they get pieces of bounded size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import Array, Index, QuantizedWeight, Tensor, leading_rows
from ..dtypes import F32
from ..errors import DependencyError, LayoutError, NonFiniteError
from ..files import InputFile

_PIECE = 1 << 18  # weights decoded at once


@dataclass(frozen=True)
class BlockType:
    """One quantized ggml type: ``weights`` weights in ``nbytes`` bytes."""

    code: int
    name: str
    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.nbytes / self.weights

    @property
    def code_bits(self) -> int:
        """Bits of a code, the number in the name: a Q4_1 block takes 5 per weight."""
        return int(re.findall("[0-9]", self.name)[0])


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise DependencyError(
            "quantized GGUF tensors need the gguf package.", fix="pip install gguf."
        ) from e
    return gguf


@cache
def block_type(code: int) -> BlockType | None:
    """The type with that ggml code, or None when the gguf package does not know it or cannot decode it."""
    gguf = _gguf()
    try:
        kind = gguf.GGMLQuantizationType(code)
        weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)  # the only public test
    except (ValueError, KeyError, NotImplementedError):
        return None
    return BlockType(code, kind.name, weights, nbytes)


def known_types() -> list[str]:
    """Names of all types that can be decoded, for messages."""
    types = (block_type(int(kind)) for kind in _gguf().GGML_QUANT_SIZES)
    return [t.name for t in types if t is not None]


class GgmlBlocks(QuantizedWeight):
    """A quantized weight as it lies in the file. Thread-safe.

    Attributes:
        block: the ggml type.
        rows: product of all axes but the last; what :meth:`raw_rows` and :meth:`dequantize` count.
        row_bytes: stored bytes of one row.
    """

    def __init__(
        self, name: str, block: BlockType, shape: Sequence[int], file: InputFile, offset: int
    ) -> None:
        self.name = name
        self.block = block
        self.kind = f"ggml.{block.name}"
        self.bits, self.code_bits = block.bits, block.code_bits
        self.group_size = block.weights
        self.shape = tuple(shape)
        width = self.shape[-1] if self.shape else 1
        if width % block.weights:
            raise LayoutError(
                f"rows of {width} weights do not divide into {block.name} blocks of {block.weights}.",
                where=file.path,
                tensor=name,
            )
        self.rows = math.prod(self.shape[:-1])
        self.row_bytes = width // block.weights * block.nbytes
        self.file = file
        self.offset = offset

    @property
    def nbytes(self) -> int:
        """Stored bytes of the whole weight."""
        return self.rows * self.row_bytes

    def raw_rows(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """The blocks of rows ``start:stop`` as stored, shape ``(stop - start, row_bytes)``."""
        self._check(start, stop)
        out = np.empty((stop - start, self.row_bytes), np.uint8)
        self.file.read_into(self.offset + start * self.row_bytes, out.reshape(-1))
        return out

    def dequantize(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start:stop`` as float32, shape ``(stop - start, shape[-1])``.

        Raises:
            NonFiniteError: a block decodes to NaN or infinity; names tensor and block.
        """
        self._check(start, stop)
        block = self.block
        out = np.empty((stop - start, self.shape[-1]), np.float32)
        flat = out.reshape(-1)
        step = max(1, _PIECE // block.weights)
        raw = np.empty(min(step, flat.size // block.weights) * block.nbytes, np.uint8)
        first = start * (self.row_bytes // block.nbytes)
        for done in range(0, flat.size // block.weights, step):
            part = flat[done * block.weights : (done + step) * block.weights]
            piece = raw[: part.size // block.weights * block.nbytes]
            self.file.read_into(self.offset + (first + done) * block.nbytes, piece)
            part[:] = self._decode(piece)
            self._check_finite(part, first + done)
        return out

    def _decode(self, piece: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        gguf = _gguf()
        with np.errstate(all="ignore"):  # bad scales are reported below, with their place
            # one wide row: the package loops in Python over groups of rows
            values: npt.NDArray[np.float32] = gguf.quants.dequantize(
                piece.reshape(1, -1), gguf.GGMLQuantizationType(self.block.code)
            )
        return values.reshape(-1)

    def _check_finite(self, values: npt.NDArray[np.float32], first: int) -> None:
        finite = np.isfinite(values)
        if finite.all():
            return
        index = first + int(np.argmin(finite)) // self.block.weights
        per_row = self.row_bytes // self.block.nbytes
        raise NonFiniteError(
            f"block {index} (row {index // per_row}, block {index % per_row} of it) decodes to NaN or "
            "infinity; its scale is damaged.",
            where=self.file.path,
            tensor=self.name,
            fix="download the file again, or quantize the model again.",
        )

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}:{stop} of {self.rows}")


class BlockTensor(Tensor):
    """A quantized tensor that reads as float32; ``quantized`` holds the blocks."""

    def __init__(self, blocks: GgmlBlocks, where: Path) -> None:
        super().__init__(blocks.name, F32, blocks.shape, where, blocks.block.name, blocks)
        self.blocks = blocks

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`; only the rows the index touches are read and decoded."""
        if len(self.shape) < 2:  # one row: blocks are not addressed within it
            row = self.blocks.dequantize(0, 1).reshape(self.shape)
            return np.ascontiguousarray(row[index])
        start, stop, rest = leading_rows(self.shape, index)
        inner = math.prod(self.shape[1:-1])
        out = self.blocks.dequantize(start * inner, stop * inner)
        out = out.reshape(stop - start, *self.shape[1:])
        return np.ascontiguousarray(out[rest]) if rest else out
