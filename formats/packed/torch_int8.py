"""gemma_pytorch's int8 variant: ``X.weight`` int8 ``[out, in]`` with ``X.weight_scaler`` float ``[out]``.

The weight is ``code * scaler`` of its row; the embedding has one scaler per vocabulary row; norms stay float. Source:
gemma_pytorch/gemma/model.py, ``Linear`` and ``Embedding`` with ``quant=True``, which multiply in the scaler's type;
here the product is float32, exact for bfloat16 and float16 scalers (8 + 11 bits).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .. import dtypes
from ..base import Array, Index, QuantizedWeight, Source, Tensor, iter_row_blocks, leading_rows
from ..errors import (
    DtypeError,
    ExtraTensorError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
)
from ..names import listing
from .compressed_tensors import row_fault, signed
from .uniform import Grid

KIND = "torch_int8"
_WEIGHT, _SCALER = ".weight", ".weight_scaler"
_BLOCK = 4 << 20  # codes at a time: their float32 values stay in cache


class TorchInt8Weight(QuantizedWeight):
    """int8 codes with one scale per row.

    Args:
        codes: int8 ``[out, in]``.
        scales: float ``[out]``.

    Attributes:
        codes: see above.
        scales: see above.
    """

    kind = KIND
    code_bits = 8

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes = codes
        self.scales = scales
        self.shape = codes.shape
        self.group_size = self.shape[1]
        self.bits = 8 + 8 * scales.dtype.itemsize / max(codes.shape[1], 1)

    def dequantize(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows ``start:stop`` as float32, shape ``(stop - start, in_features)``.

        Raises:
            NonFiniteError: a scaler of these rows is NaN or infinite.
        """
        out = np.empty((stop - start, self.shape[1]), np.float32)
        if not out.size:
            return out
        scales = self.scales.read((slice(start, stop),)).astype(np.float32)
        if not np.isfinite(scales).all():
            bad = np.flatnonzero(~np.isfinite(scales))
            raise NonFiniteError(
                f"{len(bad)} of {len(scales)} scalers are not finite, the first is "
                f"{scales[bad[0]]} in row {start + bad[0]}.",
                where=self.scales.where,
                tensor=self.scales.name,
                fix="quantize the model again; these rows would be NaN.",
            )
        for a, b in iter_row_blocks(out.shape, 1, _BLOCK):
            codes = self.codes.read((slice(start + a, start + b),))
            np.multiply(codes, scales[a:b, None], out=out[a:b], dtype=np.float32)
            out[a:b] += np.float32(0)  # -0 is 0, as in every other layout
        return out


class _Dequantized(Tensor):
    """The pair under the weight's name, as float32."""

    def __init__(self, weight: TorchInt8Weight) -> None:
        codes = weight.codes
        super().__init__(codes.name, dtypes.F32, codes.shape, codes.where, KIND, weight)
        self._weight = weight

    def read(self, index: Index = ()) -> Array:
        start, stop, rest = leading_rows(self.shape, index)
        out = self._weight.dequantize(start, stop)
        return np.asarray(out[rest], order="C") if rest else out


def combine(source: Source) -> Source:
    """The source with every pair as one float32 tensor whose ``quantized`` is set; as it is when it has no pairs.

    Values are read, and scalers checked to be finite, only when rows are.

    Raises:
        MissingTensorError: an int8 ``X.weight`` has no scaler.
        ExtraTensorError: a scaler has no int8 weight.
        ShapeError: a weight is not a matrix, or its scaler is not one number per row.
        DtypeError: a scaler is not of a float type.
    """
    have = source.tensors
    codes = {n for n, t in have.items() if n.endswith(_WEIGHT) and t.dtype == dtypes.I8}
    scalers = {n for n in have if n.endswith(_SCALER)}
    wanted = {n.removesuffix(_WEIGHT) + _SCALER for n in codes}
    if absent := sorted(wanted - scalers):
        raise MissingTensorError(
            f"{len(absent)} int8 weights have no scaler: {listing(absent)}.",
            where=source.path,
            fix="the checkpoint is not complete; download or save it again.",
        )
    if alone := sorted(scalers - wanted):
        raise ExtraTensorError(
            f"{len(alone)} scalers have no int8 weight: {listing(alone)}.",
            where=source.path,
            fix="the checkpoint is half quantized; save it again.",
        )
    tensors = {n: _pair(have, n) if n in codes else t for n, t in have.items() if n not in scalers}
    return dataclasses.replace(source, tensors=tensors)


def layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Suffix -> dtype and shape of what a weight is stored as."""
    n = grid.out_features
    return {_WEIGHT: (dtypes.I8, (n, grid.in_features)), _SCALER: (dtypes.F32, (n,))}


def pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    """Suffix -> array.

    Args:
        grid: 8 bits, one group per row, symmetric.
        codes: uint8 ``[out, in]``.
        scales: float32 ``[out, 1]``.
        zeros: None.
    """
    return {_WEIGHT: signed(codes), _SCALER: scales[:, 0].astype(np.float32)}


fault = row_fault


def _pair(have: Mapping[str, Tensor], name: str) -> Tensor:
    codes, scales = have[name], have[name.removesuffix(_WEIGHT) + _SCALER]
    if len(codes.shape) != 2 or scales.shape != codes.shape[:1]:
        raise ShapeError(
            f"its scaler has shape {list(scales.shape)}, the int8 weight {list(codes.shape)}; "
            f"expected [out] and [out, in].",
            where=codes.where,
            tensor=name,
        )
    if scales.dtype not in dtypes.FLOATS:
        raise DtypeError(
            f"its scaler is {scales.stored}; expected a float type.", where=codes.where, tensor=name
        )
    return _Dequantized(TorchInt8Weight(codes, scales))
