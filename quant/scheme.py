"""What a linear weight becomes: bits, groups, symmetry, and the codes themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.errors import UsageError

BITS = (8, 4, 3, 2)
GROUP_SIZES = (32, 64, 128, -1)
# scales are rounded to bfloat16 before codes are chosen; inside this range bfloat16 is exact in float16 too, so one set
# of codes serves every format (GGUF, AWQ and GPTQ store float16)
SCALE_MIN, SCALE_MAX = 6.2e-5, 65280.0


@dataclass(frozen=True)
class Scheme:
    """Uniform quantization in groups along in_features: ``weight = scale * (code - zero)``, codes in ``[0, 2**bits)``.

    Attributes:
        bits: per code.
        group_size: columns that share a scale; -1 for a whole row.
        symmetric: ``zero`` is ``2**(bits - 1)`` everywhere, and scales may be negative (the full range of codes is used,
            whichever sign the largest weight has); else a zero per group, from 1 on, and positive scales.

    Raises:
        UsageError: not a scheme there is.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(f"{self.bits} bits are not supported.", fix=f"use one of {BITS}.")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"group size {self.group_size} is not supported.",
                fix=f"use one of {GROUP_SIZES}; -1 is a whole row.",
            )

    @property
    def levels(self) -> int:
        """Codes there are."""
        return int(2**self.bits)

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return self.levels // 2

    def width(self, in_features: int) -> int:
        """Columns per group.

        Raises:
            UsageError: the group size does not divide in_features.
        """
        if self.group_size == -1:
            return in_features
        if in_features % self.group_size:
            fits = [g for g in GROUP_SIZES if g == -1 or in_features % g == 0]
            raise UsageError(
                f"group size {self.group_size} does not divide in_features {in_features}.",
                fix=f"use a group size of {' or '.join(map(str, fits))}.",
            )
        return self.group_size

    def bits_per_weight(self, in_features: int) -> float:
        """Codes, 16-bit scales and zeros, per weight."""
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.width(in_features)

    def __str__(self) -> str:
        groups = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"int{self.bits} {groups} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight in memory.

    Attributes:
        scheme: how to read it.
        codes: uint8 ``[out_features, in_features]``, below ``2**bits``.
        scales: float32 ``[out_features, groups]``, every value exact in bfloat16 and float16.
        zeros: uint8 ``[out_features, groups]``, or None when symmetric.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 ``[out_features, in_features]``; every product is exact but for one rounding of float32."""
        out, groups = self.scales.shape
        grouped = self.codes.view(out, groups, -1).float()
        zeros = self.scheme.middle if self.zeros is None else self.zeros.float()[..., None]
        return ((grouped - zeros) * self.scales[..., None]).view(out, -1)

    def with_scales(self, scales: Tensor) -> Codes:
        """The same codes with other scales, which are brought onto the grid."""
        return replace(self, scales=on_grid(scales))


def on_grid(scales: Tensor) -> Tensor:
    """Scales rounded to bfloat16 and kept where float16 is exact too; the sign stays, zero becomes the smallest."""
    sign = torch.where(scales < 0, -1.0, 1.0)
    size = scales.abs().clamp(SCALE_MIN, SCALE_MAX).to(torch.bfloat16).float()
    # 6.2e-5 rounds to the next bfloat16, which is below the smallest normal float16 only if it were smaller than this
    return sign * size.clamp_min(2.0**-14)
