"""ggml's block types as tables: sizes, scales, code values; and a weight taken apart into their fields.

Every type here stores ``value = step * level(code) - offset`` with ``step = d * sc`` and ``offset = dmin * m``: d and dmin
float16 per block, sc and m small integers per sub-block (absent in the simple types). Source: ggml-common.h and
ggml-quants.c of llama.cpp, gguf/quants.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...formats.errors import UsageError

HALF_MAX = 65504.0
TINY = 1e-30
# IQ4's levels: finer near zero
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockFormat:
    """One quantized ggml type.

    Attributes:
        name: as llama.cpp spells it.
        code: ggml's number of it.
        weights: per block.
        nbytes: per block.
        sub: weights that share a scale.
        low, high: smallest and largest level that is written.
        first: level of code 0 in uniform types.
        scale_range: of the sub-blocks' integer scales, or None where ``d`` is the scale.
        offset: ``None``, ``"free"`` (one float16 of either sign per block) or ``"integer"`` (6 bits per sub-block, not negative).
        table: the levels where they are not uniform.
    """

    name: str
    code: int
    weights: int
    nbytes: int
    sub: int
    low: int
    high: int
    first: int
    scale_range: tuple[int, int] | None = None
    offset: str | None = None
    table: tuple[int, ...] | None = None

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights

    @property
    def subs(self) -> int:
        """Sub-blocks of a block."""
        return self.weights // self.sub

    @cached_property
    def levels(self) -> Tensor:
        """Level of every code, float32."""
        if self.table is not None:
            return torch.tensor(self.table, dtype=torch.float32, device="cpu")
        return torch.arange(self.first, self.high + 1, dtype=torch.float32, device="cpu")

    @property
    def limit(self) -> float:
        """Weights up to this size can be stored."""
        most = self.scale_range[1] if self.scale_range else 1
        reach = {None: self.high * most, "free": 1, "integer": most}[self.offset]
        return HALF_MAX * reach

    @cached_property
    def nearest_code(self) -> Tensor:
        """Code nearest to every half unit from -128 to 127.5, uint8 ``[512]``, for types with a table.

        Halfway points between levels are multiples of one half, so the floor of ``2 u`` decides.
        """
        halves = torch.arange(-256, 256, dtype=torch.float32, device="cpu") / 2
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(halves, middles, right=True).to(torch.uint8)

    @cached_property
    def nearest_level(self) -> Tensor:
        """Level of :attr:`nearest_code`, float32 ``[512]``."""
        return self.levels[self.nearest_code.long()]

    def row_bytes(self, in_features: int) -> int:
        """Stored bytes of a row.

        Raises:
            UsageError: rows do not divide into blocks.
        """
        if in_features % self.weights or in_features <= 0:
            fits = [
                f.name for f in FORMATS.values() if in_features > 0 and in_features % f.weights == 0
            ]
            raise UsageError(
                f"{self.name} has blocks of {self.weights} weights, which do not divide in_features {in_features}.",
                fix=f"use {', '.join(fits)}." if fits else "keep this tensor in f16, bf16 or f32.",
            )
        return in_features // self.weights * self.nbytes

    def code_of(self, u: Tensor) -> Tensor:
        """Code whose level is nearest to ``u``, weights in units of the step; uint8."""
        if self.table is not None:
            return self.nearest_code.to(u.device).index_select(0, _half_units(u)).view(u.shape)
        return (torch.round(u).clamp_(self.low, self.high) - self.first).to(torch.uint8)

    def level_of(self, u: Tensor) -> Tensor:
        """The level nearest to ``u``."""
        if self.table is not None:
            return self.nearest_level.to(u).index_select(0, _half_units(u)).view(u.shape)
        return torch.round(u).clamp_(self.low, self.high)


def _half_units(u: Tensor) -> Tensor:
    return (u * 2).floor_().clamp_(-256, 255).add_(256).int().view(-1)


FORMATS: dict[str, BlockFormat] = {
    f.name: f
    for f in (
        BlockFormat("Q4_0", 2, 32, 18, 32, -8, 7, -8),
        BlockFormat("Q4_1", 3, 32, 20, 32, 0, 15, 0, offset="free"),
        BlockFormat("Q8_0", 8, 32, 34, 32, -127, 127, -128),
        BlockFormat("Q3_K", 11, 256, 110, 16, -4, 3, -4, (-32, 31)),
        BlockFormat("Q4_K", 12, 256, 144, 32, 0, 15, 0, (0, 63), "integer"),
        BlockFormat("Q5_K", 13, 256, 176, 32, 0, 31, 0, (0, 63), "integer"),
        BlockFormat("Q6_K", 14, 256, 210, 16, -32, 31, -32, (-128, 127)),
        BlockFormat("IQ4_XS", 23, 256, 136, 32, -127, 113, 0, (-32, 31), table=IQ4_LEVELS),
    )
}


def block_format(name: str) -> BlockFormat:
    """The type of that name, in either case.

    Raises:
        UsageError: it is not one that can be written.
    """
    found = FORMATS.get(name.upper())
    if found is None:
        raise UsageError(
            f"{name!r} is no block type that can be written.",
            fix=f"use one of {', '.join(FORMATS)}.",
        )
    return found


@dataclass(frozen=True, eq=False)
class Fields:
    """A weight in one block type, taken apart.

    Attributes:
        format: the type.
        codes: uint8 ``[out_features, in_features]``, counted from the first level.
        d: float32 ``[out_features, blocks]``, exact in float16.
        sc: int16 ``[out_features, sub-blocks]``, or None where d is the scale.
        dmin: as d, or None.
        m: as sc, 0 to 63, or None.
    """

    format: BlockFormat
    codes: Tensor
    d: Tensor
    sc: Tensor | None = None
    dmin: Tensor | None = None
    m: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """float32 ``[out_features, sub-blocks]``; exact."""
        return _times(self.d, self.sc)

    @property
    def offset(self) -> Tensor | None:
        """float32 ``[out_features, sub-blocks]``, or None; exact."""
        return None if self.dmin is None else _times(self.dmin, self.m)

    def level(self) -> Tensor:
        """Levels of the codes, float32 ``[out_features, sub-blocks, weights of each]``."""
        out, width = len(self.codes), self.format.sub
        if self.format.table is None:
            grouped = self.codes.view(out, -1, width).float()
            return grouped + self.format.first if self.format.first else grouped
        levels = self.format.levels.to(self.codes.device)
        return levels[self.codes.long()].view(out, -1, width)

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``, the bits that gguf's and llama.cpp's decoders give."""
        values = self.level() * self.step[..., None]
        if self.offset is not None:
            values = values - self.offset[..., None]
        return values.view(self.codes.shape)


def _times(half: Tensor, integers: Tensor | None) -> Tensor:
    if integers is None:
        return half
    grouped = integers.view(*half.shape, -1).float() * half[..., None]
    return grouped.view(integers.shape)


def to_half(x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """``x`` rounded to what float16 holds of ``x * unit``, the largest finite value at most; still in units of ``unit``."""
    return (x * unit).clamp(-HALF_MAX, HALF_MAX).half().float() / unit


def inverse(step: Tensor) -> Tensor:
    """``1 / step``, and 0 where the step is 0 or too small to divide by."""
    return torch.where(step.abs() < TINY, torch.zeros_like(step), 1 / step)
