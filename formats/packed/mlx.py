"""MLX's affine quantization (mlx-lm): ``weight = scale * code + bias`` in groups of 32, 64 or 128 columns.

``X.weight`` uint32 ``[out, in * bits / 32]``, a dense bit stream along in_features; ``X.scales`` and ``X.biases``
``[out, groups]`` of one float type. The bias is ``-zero * scale``: exact in bfloat16 for symmetric codes, whose zero
is a power of two; for others both are written as float32, for a zero of four bits times a bfloat16 scale needs more
than bfloat16 or float16 have. Source: mlx/backend/cpu/quantized.cpp, mlx_lm/utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base import Array, Tensor
from ..dtypes import BF16, F32
from ..errors import FormatError, ShapeError, printable
from .bits import pack, unpack, words_for
from .uniform import (
    U8,
    Grid,
    Options,
    PackedFormat,
    Parts,
    UniformWeight,
    integer,
    narrowed,
    require_dtype,
    stored_zeros,
)
from .views import RowView

WEIGHT, SCALES, BIASES = ".weight", ".scales", ".biases"
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4, 5, 6, 8)
_U32 = np.dtype(np.uint32)


def _fault(grid: Grid) -> str | None:
    if grid.group_size not in GROUP_SIZES:
        return f"its groups are {', '.join(map(str, GROUP_SIZES))} wide"
    return None if grid.bits in BITS else f"it stores {BITS} bits only"


def _dtype(grid: Grid) -> np.dtype:
    return BF16 if grid.symmetric else F32


def _layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n, per_group = grid.out_features, (_dtype(grid), (grid.out_features, grid.groups))
    return {
        WEIGHT: (_U32, (n, words_for(grid.in_features, grid.bits))),
        SCALES: per_group,
        BIASES: per_group,
    }


def _pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    biases = -stored_zeros(grid, zeros).astype(np.float32) * scales
    return {
        WEIGHT: pack(codes, grid.bits),
        SCALES: narrowed(scales, _dtype(grid), "scales"),
        BIASES: narrowed(biases, _dtype(grid), "biases"),
    }


def _open(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    weight, scales, biases = parts[WEIGHT], parts[SCALES], parts[BIASES]
    own = options.get(prefix, {})
    settings: dict[str, Any] = {**options, **(own if isinstance(own, Mapping) else {})}
    if settings.get("mode", "affine") != "affine":
        raise FormatError(
            f"MLX mode {printable(str(settings['mode']), 40)}; known is affine.",
            where=weight.where,
            tensor=weight.name,
        )
    bits = integer(settings, "bits", BITS, weight.where)
    group = integer(settings, "group_size", GROUP_SIZES, weight.where)
    for tensor, dtype in ((weight, _U32), (scales, None), (biases, None)):
        require_dtype(tensor, dtype)
    shapes = [t.shape for t in (weight, scales, biases)]
    n, groups = scales.shape if len(scales.shape) == 2 else (0, 0)
    k = groups * group
    if not k or shapes != [(n, words_for(k, bits)), (n, groups), (n, groups)]:
        raise ShapeError(
            f"weight {list(shapes[0])}, scales {list(shapes[1])} and biases {list(shapes[2])} are not of {bits} bits in "
            f"groups of {group}, as the configuration says.",
            where=weight.where,
            tensor=weight.name,
        )
    codes = RowView(
        weight.name, U8, (n, k), weight.where, weight.stored,
        lambda a, b: unpack(weight.read((slice(a, b),)), bits, k),
    )  # fmt: skip
    return UniformWeight(
        "mlx", bits, codes, scales, _zeros(scales, biases, bits), biases=biases
    )  # fmt: skip


def _zeros(scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """The nearest zeros there are to ``-bias / scale``."""

    def rows(start: int, stop: int) -> Array:
        s, b = (t.read((slice(start, stop),)).astype(np.float32) for t in (scales, biases))
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.nan_to_num(np.rint(-b / s), nan=0.0)
        return np.asarray(np.clip(zeros, 0, 2**bits - 1), np.uint8)

    return RowView(biases.name, U8, biases.shape, biases.where, biases.stored, rows)


FORMAT = PackedFormat("mlx", (WEIGHT, SCALES, BIASES), (), _fault, _layout, _pack, _open)
