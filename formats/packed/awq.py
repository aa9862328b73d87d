"""AWQ files in the ``gemm`` order, 4 bits (AutoAWQ; read by vLLM, SGLang, CTranslate2, TensorRT-LLM).

``X.qweight`` int32 ``[in, out / 8]``: nibble ``i`` of word ``c`` is output ``8 c + ORDER[i]``. ``X.qzeros`` int32
``[groups, out / 8]`` in the same order, zeros as they are; ``X.scales`` float16 ``[groups, out]``. Source: AutoAWQ
awq/modules/linear/gemm.py. It is the widely served layout of asymmetric 4-bit weights; whichever algorithm chose the
codes does not matter.
"""

from __future__ import annotations

import numpy as np

from ..base import Array
from ..dtypes import F16
from ..errors import FormatError, ShapeError, printable
from .bits import pack
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

WEIGHT, ZEROS, SCALES = ".qweight", ".qzeros", ".scales"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _fault(grid: Grid) -> str | None:
    if grid.bits != 4:
        return "it stores 4 bits only"
    return (
        f"out_features {grid.out_features} are no multiple of 8" if grid.out_features % 8 else None
    )


def _layout(grid: Grid) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    n, k = grid.out_features, grid.in_features
    return {
        WEIGHT: (I32, (k, n // 8)),
        ZEROS: (I32, (grid.groups, n // 8)),
        SCALES: (F16, (grid.groups, n)),
    }


def _packed(values: Array) -> Array:
    """``[out, m]`` -> int32 ``[m, out / 8]``."""
    n, m = values.shape
    ordered = values.reshape(n // 8, 8, m)[:, ORDER, :].reshape(n, m)
    return pack(np.ascontiguousarray(ordered.T), 4).view(np.int32)


def _unpacked(words: Array) -> Array:
    """Transposed words ``[out / 8, m]`` -> uint8 ``[out, m]``."""
    out = np.empty((words.shape[0], 8, words.shape[1]), np.uint8)
    bits = words.view(np.uint32)
    for i, column in enumerate(ORDER):
        out[:, column] = (bits >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(-1, words.shape[1])


def _pack(grid: Grid, codes: Array, scales: Array, zeros: Array | None) -> dict[str, Array]:
    return {
        WEIGHT: _packed(codes),
        ZEROS: _packed(stored_zeros(grid, zeros)),
        SCALES: np.ascontiguousarray(narrowed(scales, F16, "scales").T),
    }


def _open(prefix: str, parts: Parts, options: Options) -> UniformWeight:
    weight, zeros, scales = parts[WEIGHT], parts[ZEROS], parts[SCALES]
    version = options.get("version", options.get("format", "gemm"))
    if str(version).lower() != "gemm" or options.get("bits", 4) != 4:
        raise FormatError(
            f"AWQ version {printable(str(version), 40)} of {printable(str(options.get('bits')), 40)} bits; known is gemm of "
            "4 bits.",
            where=weight.where,
            fix="save it again in the gemm version, or open the unquantized checkpoint.",
        )
    for tensor, dtype in ((weight, I32), (zeros, I32), (scales, None)):
        require_dtype(tensor, dtype)
    shapes = [t.shape for t in (weight, zeros, scales)]
    n = 8 * weight.shape[-1] if weight.shape else 0
    groups = scales.shape[0] if scales.shape else 0
    if not n or not groups or shapes != [(weight.shape[0], n // 8), (groups, n // 8), (groups, n)]:
        raise ShapeError(
            f"qweight {list(shapes[0])}, qzeros {list(shapes[1])} and scales {list(shapes[2])} do not fit each other.",
            where=weight.where,
            tensor=weight.name,
        )
    codes, lanes, along_groups = Columns(weight), Columns(zeros), Columns(scales)

    def rows(columns: Columns, start: int, stop: int) -> Array:
        first = start // 8
        return _unpacked(columns.read(first, -(-stop // 8)))[start - 8 * first : stop - 8 * first]

    return UniformWeight(
        "awq",
        4,
        RowView(
            weight.name, U8, (n, weight.shape[0]), weight.where, weight.stored,
            lambda a, b: rows(codes, a, b),
        ),
        RowView(scales.name, scales.dtype, (n, groups), scales.where, scales.stored, copied(along_groups)),
        RowView(
            zeros.name, U8, (n, groups), zeros.where, zeros.stored, lambda a, b: rows(lanes, a, b)
        ),
    )  # fmt: skip


FORMAT = PackedFormat("awq", (WEIGHT, ZEROS, SCALES), (), _fault, _layout, _pack, _open)
