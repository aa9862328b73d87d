"""GPTQ files, versions 1 and 2 (AutoGPTQ, GPTQModel; read by vLLM, SGLang, transformers with GPTQModel).

``X.qweight`` int32 ``[in * bits / 32, out]``: a dense bit stream along in_features, one per column. ``X.qzeros``
int32 ``[groups, out * bits / 32]``, a stream along out_features; version 1 stores every zero less one. ``X.scales``
float16 ``[groups, out]``; ``X.g_idx`` int32 ``[in]``, the group of every input. Version 1 is written, without
activation order: ``g_idx`` is ``column // group_size``. A zero of 0 has no code in version 1 (it would borrow from
its neighbour), so such groups are shifted by one code where their codes allow it. Source: GPTQModel 7.3
nn_modules/qlinear.
"""

from __future__ import annotations

import numpy as np

from ..base import Array, Tensor
from ..dtypes import F16
from ..errors import FormatError, LossyError, ShapeError, printable
from .bits import pack, unpack
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
    stored_zeros,
)
from .views import Columns, RowView, copied

WEIGHT, ZEROS, SCALES, GROUPS = ".qweight", ".qzeros", ".scales", ".g_idx"
BITS = (2, 3, 4, 8)
_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what stored zeros lack


def _fault(grid: Grid) -> str | None:
    for name, size in (("in_features", grid.in_features), ("out_features", grid.out_features)):
        if size * grid.bits % 32:
            return f"{name} {size} times {grid.bits} bits are no whole number of 32-bit words"
    return None if grid.bits in BITS else f"it stores {BITS} bits only"


def _layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n, k, bits = grid.out_features, grid.in_features, grid.bits
    return {
        WEIGHT: (I32, (k * bits // 32, n)),
        ZEROS: (I32, (grid.groups, n * bits // 32)),
        SCALES: (F16, (grid.groups, n)),
        GROUPS: (I32, (k,)),
    }


def _pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    codes, zeros = _without_zero(grid, codes, stored_zeros(grid, zeros))
    return {
        WEIGHT: np.ascontiguousarray(pack(codes, grid.bits).T).view(np.int32),
        ZEROS: pack(np.ascontiguousarray(zeros.T) - np.uint8(1), grid.bits).view(np.int32),
        SCALES: np.ascontiguousarray(narrowed(scales, F16, "scales").T),
        GROUPS: (np.arange(grid.in_features) // grid.group_size).astype(np.int32),
    }


def _without_zero(grid: Grid, codes: Array, zeros: Array) -> tuple[Array, Array]:
    """The same weights with every zero at least 1."""
    at = zeros == 0
    if not at.any():
        return codes, zeros
    grouped = codes.reshape(grid.out_features, grid.groups, -1)
    full = at & (grouped.max(-1) == 2**grid.bits - 1)
    if full.any():
        row, group = np.argwhere(full)[0]
        raise LossyError(
            f"{int(full.sum())} groups have zero 0 and use every code, the first is row {row}, group {group}; GPTQ "
            "version 1 stores zeros less one and cannot hold them.",
            fix="export to compressed-tensors, awq or mlx, or quantize with --sym.",
        )
    return (grouped + at[..., None].astype(np.uint8)).reshape(codes.shape), zeros + at.astype(U8)


def _open(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    weight, zeros, scales = parts[WEIGHT], parts[ZEROS], parts[SCALES]
    version = str(options.get("checkpoint_format", options.get("format", "gptq")))
    if version not in _VERSIONS:
        raise FormatError(
            f"GPTQ files of checkpoint_format {printable(version, 60)}; known are {', '.join(_VERSIONS)}.",
            where=weight.where,
            fix="convert them with GPTQModel, or open the unquantized checkpoint.",
        )
    n, groups, bits = _sizes(weight, zeros, scales)
    k, lack = weight.shape[0] * 32 // bits, np.uint8(_VERSIONS[version])
    mask = np.uint8(2**bits - 1)
    columns, along_groups = Columns(weight), Columns(scales)

    def zero_rows(start: int, stop: int) -> Array:
        lanes = (
            unpack(zeros.read(), bits, n) + lack & mask
        )  # a lane below 0 wraps, as it was written
        return np.ascontiguousarray(lanes.T[start:stop])

    return UniformWeight(
        "gptq",
        bits,
        RowView(
            weight.name, U8, (n, k), weight.where, weight.stored,
            lambda a, b: unpack(columns.read(a, b), bits, k),
        ),
        RowView(scales.name, scales.dtype, (n, groups), scales.where, scales.stored, copied(along_groups)),
        RowView(zeros.name, U8, (n, groups), zeros.where, zeros.stored, zero_rows),
        group_of=_order(parts.get(GROUPS), k, groups),
    )  # fmt: skip


def _sizes(weight: Tensor, zeros: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """out_features, groups and bits, from the shapes: a module may differ from the configuration's default."""
    for tensor, dtype in ((weight, I32), (zeros, I32), (scales, None)):
        require_dtype(tensor, dtype)
        if len(tensor.shape) != 2 or not all(tensor.shape):
            raise ShapeError(
                f"it is {list(tensor.shape)}; expected a matrix.",
                where=tensor.where,
                tensor=tensor.name,
            )
    groups, n = scales.shape
    bits = zeros.shape[1] * 32 // n
    if bits not in BITS or zeros.shape != (groups, n * bits // 32) or weight.shape[1] != n:
        raise ShapeError(
            f"qweight {list(weight.shape)}, qzeros {list(zeros.shape)} and scales {list(scales.shape)} do not fit "
            f"each other for any of {BITS} bits.",
            where=weight.where,
            tensor=weight.name,
        )
    if weight.shape[0] * 32 % bits:
        raise ShapeError(
            f"{weight.shape[0]} words are no whole number of {bits}-bit codes.",
            where=weight.where,
            tensor=weight.name,
        )
    return n, groups, bits


def _order(g_idx: Tensor | None, k: int, groups: int) -> Tensor | None:
    """The group of every input, where it is not the plain run of columns."""
    if g_idx is None:
        return None
    if g_idx.dtype != I32 or g_idx.shape != (k,):
        raise ShapeError(
            f"it is {g_idx.stored} {list(g_idx.shape)}; expected int32 [{k}].",
            where=g_idx.where,
            tensor=g_idx.name,
        )
    plain = k % groups == 0 and np.array_equal(g_idx.read(), np.arange(k) // (k // groups))
    return None if plain else g_idx


FORMAT = PackedFormat(
    "gptq", (WEIGHT, ZEROS, SCALES, GROUPS), (GROUPS,), _fault, _layout, _pack, _open
)
