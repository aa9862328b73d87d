"""What GPTQ, AWQ, MLX, compressed-tensors and int8 files have in common: ``weight = scale * (code - zero)`` in groups of columns.

They differ in how codes, scales and zeros are laid out. Every layout is one :class:`PackedFormat`: what it can hold, which
arrays it stores, how they are made and how they are opened. Codes are unsigned here, whatever the file stores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..base import Array, Index, QuantizedWeight, Tensor, iter_row_blocks, leading_rows
from ..dtypes import F32, FLOATS, short
from ..errors import DtypeError, FormatError, LossyError, NonFiniteError, ShapeError

U8 = np.dtype(np.uint8)
I32 = np.dtype(np.int32)
_BLOCK = 4 << 20  # codes at a time: their float32 values stay in cache


@dataclass(frozen=True)
class Grid:
    """Size and scheme of one uniform weight.

    Attributes:
        out_features: rows.
        in_features: columns.
        bits: per code.
        group_size: columns that share a scale; never -1: a whole row is ``in_features``.
        symmetric: the zero is ``2**(bits - 1)`` everywhere and not stored.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    symmetric: bool

    @property
    def groups(self) -> int:
        """Scales per row."""
        return self.in_features // self.group_size

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return int(2 ** (self.bits - 1))

    @property
    def label(self) -> str:
        """Bits and groups in short, such as ``int4 g128``."""
        groups = "row" if self.groups == 1 else f"g{self.group_size}"
        return f"int{self.bits} {groups}"

    def __str__(self) -> str:
        return f"{self.label} {'sym' if self.symmetric else 'asym'}"


class UniformWeight(QuantizedWeight):
    """Codes in groups that share a scale and a zero. Thread-safe; nothing is read until rows are.

    Args:
        kind: bit layout.
        bits: per code.
        codes: uint8 ``[out, in]``.
        scales: float ``[out, groups]``.
        zeros: uint8 ``[out, groups]``, or None where it is ``2**(bits - 1)`` everywhere.
        biases: float ``[out, groups]``: the weight is ``scale * code + bias`` and ``zeros`` are derived from it.
        group_of: int32 ``[in]``, the group of each column, where groups are not runs of columns.

    Attributes:
        code_bits: per code; ``bits`` counts scales and zeros too.
        group_size: columns that share a scale.
        codes, scales, zeros, biases, group_of: see above.

    Raises:
        ShapeError: the arrays do not fit each other.
    """

    def __init__(
        self,
        kind: str,
        bits: int,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        biases: Tensor | None = None,
        group_of: Tensor | None = None,
    ) -> None:
        self.kind = kind
        self.code_bits = bits
        self.codes, self.scales, self.zeros = codes, scales, zeros
        self.biases, self.group_of = biases, group_of
        self.shape = codes.shape
        groups = _checked(self)
        self.group_size = self.shape[1] // groups
        per_group = 8 * scales.dtype.itemsize
        if biases is not None:
            per_group += 8 * biases.dtype.itemsize
        elif zeros is not None:
            per_group += bits
        self.bits = bits + per_group * groups / max(self.shape[1], 1)

    @property
    def grid(self) -> Grid:
        """Size and scheme."""
        out, columns = self.shape
        return Grid(out, columns, self.code_bits, self.group_size, self.zeros is None)

    def dequantize(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start:stop`` as float32, shape ``(stop - start, in_features)``.

        Raises:
            NonFiniteError: a scale of these rows is NaN or infinite.
            FormatError: a column belongs to a group that is not there.
        """
        out = np.empty((stop - start, self.shape[1]), np.float32)
        if not out.size:
            return out
        order = None if self.group_of is None else self._groups()
        for a, b in iter_row_blocks(out.shape, 1, _BLOCK):
            rows = slice(start + a, start + b)
            scales = self._finite(self.scales, rows)
            self._rows(out[a:b], rows, scales, order)
        return out

    def _rows(
        self, out: Array, rows: slice, scales: Array, order: npt.NDArray[np.int32] | None
    ) -> None:
        def spread(x: Array) -> Array:
            return x[..., None] if order is None else x[:, order]

        shape = (*scales.shape, -1) if order is None else out.shape
        target = out.reshape(shape)  # a view: rows are contiguous
        codes = self.codes.read((rows,)).reshape(shape)
        if self.biases is not None:
            biases = self._finite(self.biases, rows)
            np.multiply(codes, spread(scales), out=target, dtype=np.float32)
            target += spread(biases)
            return
        zeros: Any = np.float32(2 ** (self.code_bits - 1))
        if self.zeros is not None:
            zeros = spread(self.zeros.read((rows,)).astype(np.float32))
        np.subtract(codes, zeros, out=target, dtype=np.float32)
        target *= spread(scales)
        target += np.float32(
            0
        )  # -0 is 0: a format that adds a bias has no -0, and all shall be equal

    def _finite(self, tensor: Tensor, rows: slice) -> npt.NDArray[np.float32]:
        values = tensor.read((rows,)).astype(np.float32)
        finite = np.isfinite(values)
        if finite.all():
            return values
        row, group = np.argwhere(~finite)[0]
        raise NonFiniteError(
            f"{int((~finite).sum())} of {finite.size} scales are not finite, the first is {values[row, group]} "
            f"in row {rows.start + row}, group {group}.",
            where=tensor.where,
            tensor=tensor.name,
            fix="quantize the model again; these rows would be NaN.",
        )

    def _groups(self) -> npt.NDArray[np.int32]:
        assert self.group_of is not None
        order = self.group_of.read()
        if order.size and not 0 <= int(order.min()) <= int(order.max()) < self.scales.shape[1]:
            raise FormatError(
                f"a column belongs to group {int(order.max())}, there are {self.scales.shape[1]}.",
                where=self.group_of.where,
                tensor=self.group_of.name,
            )
        return np.asarray(order, np.int32)


def _checked(w: UniformWeight) -> int:
    """Number of groups; ShapeError where arrays contradict each other."""
    if len(w.shape) != 2 or not all(w.shape):
        raise ShapeError(
            f"a quantized weight must be a matrix, found {list(w.shape)}.",
            where=w.codes.where,
            tensor=w.codes.name,
        )
    out, columns = w.shape
    groups = w.scales.shape[-1] if w.scales.shape else 0
    for part in (w.scales, w.zeros, w.biases):
        if part is not None and (part.shape != (out, groups) or not groups):
            raise ShapeError(
                f"it is {list(part.shape)} as [out, groups], for codes [{out}, {columns}].",
                where=part.where,
                tensor=part.name,
            )
    if w.group_of is not None and w.group_of.shape != (columns,):
        raise ShapeError(
            f"it is {list(w.group_of.shape)}, for codes [{out}, {columns}].",
            where=w.group_of.where,
            tensor=w.group_of.name,
        )
    if columns % groups and w.group_of is None:
        raise ShapeError(
            f"{groups} groups do not divide {columns} columns.",
            where=w.scales.where,
            tensor=w.scales.name,
        )
    return groups


class UniformTensor(Tensor):
    """A uniform weight under its plain name, as float32."""

    def __init__(self, name: str, weight: UniformWeight) -> None:
        # without symmetry: some layouts store zeros though all are the middle
        stored = f"{weight.kind} {weight.grid.label}"
        super().__init__(name, F32, weight.shape, weight.codes.where, stored, weight)
        self._weight = weight

    def read(self, index: Index = ()) -> Array:
        """See :meth:`Tensor.read`; only the rows the index touches are decoded."""
        start, stop, rest = leading_rows(self.shape, index)
        out = self._weight.dequantize(start, stop)
        return np.asarray(out[rest], order="C") if rest else out


Options = Mapping[str, Any]  # the configuration's say about quantization
Parts = Mapping[str, Tensor]  # suffix -> stored tensor


@dataclass(frozen=True)
class PackedFormat:
    """One on-disk layout of uniform weights.

    Attributes:
        name: as users call it.
        suffixes: what a weight called ``X.weight`` is stored as: ``X`` + each, the codes first.
        optional: suffixes that may be absent.
        fault: grid -> why the layout cannot hold it, or None.
        layout: grid -> suffix -> dtype and shape, before there are any values.
        pack: grid, codes uint8 ``[out, in]``, scales float32 ``[out, groups]``, zeros uint8 or None -> suffix -> array.
        open: prefix ``X``, stored parts by suffix, options -> the weight.
    """

    name: str
    suffixes: tuple[str, ...]
    optional: tuple[str, ...]
    fault: Callable[[Grid], str | None]
    layout: Callable[[Grid], dict[str, tuple[np.dtype, tuple[int, ...]]]]
    pack: Callable[[Grid, Array, Array, Array | None], dict[str, Array]]
    open: Callable[[str, Parts, Options], UniformWeight]


def narrowed(values: Array, dtype: np.dtype, what: str) -> Array:
    """The same values in a narrower type.

    Raises:
        LossyError: some are not exact in it.
    """
    with np.errstate(over="ignore"):
        out = values.astype(dtype)
    if not np.array_equal(out.astype(values.dtype), values):
        count = int((out.astype(values.dtype) != values).sum())
        raise LossyError(
            f"{count} of {values.size} {what} are not exact in {short(dtype)}, in which this format stores them.",
            fix="quantize again: g2quant chooses scales that are exact in bf16 and f16.",
        )
    return out


def stored_zeros(grid: Grid, zeros: Array | None) -> Array:
    """Zeros for layouts that store them always."""
    if zeros is not None:
        return zeros
    return np.full((grid.out_features, grid.groups), grid.middle, np.uint8)


def require_dtype(tensor: Tensor, dtype: np.dtype | None, fix: str | None = None) -> None:
    """Raise DtypeError unless a stored tensor has this dtype; None stands for any float type."""
    if tensor.dtype not in (FLOATS if dtype is None else (dtype,)):
        wanted = "a float type" if dtype is None else dtype.name
        raise DtypeError(
            f"stored as {tensor.stored}; expected {wanted}.",
            where=tensor.where,
            tensor=tensor.name,
            fix=fix,
        )


def integer(options: Options, key: str, allowed: tuple[int, ...], where: Any) -> int:
    """A whole number of the quantization's configuration.

    Raises:
        FormatError: absent or not among the allowed ones.
    """
    value = options.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise FormatError(
            f"the quantization's {key} is {str(value)[:60]!r}; supported are {', '.join(map(str, allowed))}.",
            where=where,
        )
    return value
