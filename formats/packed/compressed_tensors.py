"""compressed-tensors, what llm-compressor writes and vLLM and transformers read: ``pack-quantized`` and ``int-quantized``.

``pack-quantized``: ``X.weight_packed`` int32 ``[out, ceil(in * bits / 32)]``, a dense bit stream along in_features;
``X.weight_scale`` ``[out, groups]``; ``X.weight_shape`` int64 ``[2]``; where asymmetric ``X.weight_zero_point`` int32
``[ceil(out * bits / 32), groups]``, a stream along out_features. Codes and zeros are stored plus ``2**(bits - 1)``,
which makes them unsigned. ``int-quantized``: ``X.weight`` int8 ``[out, in]`` and ``X.weight_scale`` ``[out, 1]``.
Source: compressed_tensors 0.20, compressors/pack_quantized/helpers.py. Releases before 2026 left bits over in every
word of 3, 5, 6 and 7-bit codes; 2, 4 and 8 bits are the same in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..base import Array, Tensor
from ..dtypes import BF16, I8
from ..errors import ShapeError
from .bits import pack, unpack, words_for
from .uniform import (
    I32,
    U8,
    Grid,
    Options,
    PackedFormat,
    Parts,
    UniformWeight,
    narrowed,
    require_dtype,
)
from .views import Columns, RowView

PACKED, SCALE, SHAPE, ZERO = (
    ".weight_packed",
    ".weight_scale",
    ".weight_shape",
    ".weight_zero_point",
)
_WEIGHT = ".weight"
_I64 = np.dtype(np.int64)
_FIX = "only integer pack-quantized and int-quantized weights are read."


def _declared_bits(options: Options) -> set[int]:
    """Integer widths the configuration's groups name."""
    groups = options.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("type", "int") == "int":
            bits = weights.get("num_bits")
            if isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8:
                found.add(bits)
    return found


# ---------------------------------------------------------------- pack-quantized


def _layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n, k, bits = grid.out_features, grid.in_features, grid.bits
    out = {
        PACKED: (I32, (n, words_for(k, bits))),
        SCALE: (BF16, (n, grid.groups)),
        SHAPE: (_I64, (2,)),
    }
    return out if grid.symmetric else out | {ZERO: (I32, (words_for(n, bits), grid.groups))}


def _pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    out = {
        PACKED: pack(codes, grid.bits).view(np.int32),
        SCALE: narrowed(scales, BF16, "scales"),
        SHAPE: np.array([grid.out_features, grid.in_features], np.int64),
    }
    if zeros is None:
        return out
    along_out = pack(np.ascontiguousarray(zeros.T), grid.bits)
    return out | {ZERO: np.ascontiguousarray(along_out.T).view(np.int32)}


def _open(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    packed, scales, zeros = parts[PACKED], parts[SCALE], parts.get(ZERO)
    require_dtype(packed, I32, _FIX)
    require_dtype(scales, None, _FIX)
    n, k = _shape(parts[SHAPE])
    declared = _declared_bits(options)
    fits = [b for b in sorted(declared) if packed.shape == (n, words_for(k, b))]
    if len(fits) != 1:
        raise ShapeError(
            f"it is {list(packed.shape)}; a weight [{n}, {k}] of {' or '.join(map(str, sorted(declared))) or 'no'} "
            f"bits, which the configuration names, {'takes no such shape' if not fits else 'may be any of these'}.",
            where=packed.where,
            tensor=packed.name,
            fix="check that config.json is this checkpoint's; 3-bit files of old compressed-tensors releases must be "
            "saved again with a new one.",
        )
    bits = fits[0]
    codes = RowView(
        packed.name, U8, (n, k), packed.where, packed.stored,
        lambda a, b: unpack(packed.read((slice(a, b),)), bits, k),
    )  # fmt: skip
    return UniformWeight(
        "compressed-tensors", bits, codes, scales, None if zeros is None else _zeros(zeros, n, bits)
    )


def _shape(tensor: Tensor) -> tuple[int, int]:
    if tensor.shape != (2,) or tensor.dtype not in (_I64, I32):
        raise ShapeError(
            f"it is {tensor.stored} {list(tensor.shape)}; expected two integers.",
            where=tensor.where,
            tensor=tensor.name,
        )
    n, k = (int(x) for x in tensor.read())
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
        raise ShapeError(
            f"it says [{n}, {k}], no weight's shape.", where=tensor.where, tensor=tensor.name
        )
    return n, k


def _zeros(zeros: Tensor, n: int, bits: int) -> Tensor:
    """Zeros packed along out_features; older files store them plain as int8."""
    if zeros.dtype == I8:
        middle = 1 << (bits - 1)
        return RowView(
            zeros.name, U8, zeros.shape, zeros.where, zeros.stored,
            lambda a, b: (zeros.read((slice(a, b),)).astype(np.int16) + middle).astype(np.uint8),
        )  # fmt: skip
    require_dtype(zeros, I32, _FIX)
    if len(zeros.shape) != 2 or zeros.shape[0] != words_for(n, bits):
        raise ShapeError(
            f"it is {list(zeros.shape)}; expected [{words_for(n, bits)}, groups].",
            where=zeros.where,
            tensor=zeros.name,
        )
    columns = Columns(zeros)

    def rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(unpack(columns.read(0, zeros.shape[1]), bits, n).T[start:stop])

    return RowView(zeros.name, U8, (n, zeros.shape[1]), zeros.where, zeros.stored, rows)


PACK_QUANTIZED = PackedFormat(
    "compressed-tensors",
    (PACKED, SCALE, SHAPE, ZERO),
    (ZERO,),
    lambda grid: None,
    _layout,
    _pack,
    _open,
)

# ---------------------------------------------------------------- int-quantized


def row_fault(grid: Grid) -> str | None:
    """Why a layout of int8 codes with one scale per row cannot hold this."""
    if grid.bits != 8:
        return "it stores 8 bits only"
    if grid.groups != 1:
        return "it has one scale per row (group size -1)"
    return None if grid.symmetric else "it has no zeros"


def _int_layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n = grid.out_features
    return {_WEIGHT: (I8, (n, grid.in_features)), SCALE: (BF16, (n, 1))}


def _int_pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    return {_WEIGHT: signed(codes), SCALE: narrowed(scales, BF16, "scales")}


def signed(codes: Array) -> Array:
    """Unsigned 8-bit codes as int8, less 128."""
    return np.asarray((codes ^ np.uint8(0x80)).view(np.int8))


def unsigned(tensor: Tensor) -> RowView:
    """int8 codes as unsigned ones, plus 128."""
    return RowView(
        tensor.name, U8, tensor.shape, tensor.where, tensor.stored,
        lambda a, b: tensor.read((slice(a, b),)).view(np.uint8) ^ np.uint8(0x80),
    )  # fmt: skip


def _int_open(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    codes, scales, zeros = parts[_WEIGHT], parts[SCALE], parts.get(ZERO)
    require_dtype(codes, I8, _FIX)
    require_dtype(scales, None, _FIX)
    if zeros is not None:
        require_dtype(zeros, I8, _FIX)
    return UniformWeight(
        "int-quantized", 8, unsigned(codes), scales, None if zeros is None else unsigned(zeros)
    )


INT_QUANTIZED = PackedFormat(
    "int-quantized", (_WEIGHT, SCALE, ZERO), (ZERO,), row_fault, _int_layout, _int_pack, _int_open
)
