"""Uniform codes as ggml blocks, where both hold the same values: groups of 32 are Q4_0, Q4_1 and Q8_0 blocks."""

from __future__ import annotations

import torch

from ...formats.errors import LossyError, UsageError
from ..scheme import Codes, Scheme
from . import layout
from .encode import Blocks
from .types import FORMATS, Fields, to_half

_TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
FITTING = ", ".join(f"{Scheme(b, 32, s)} ({t})" for (b, s), t in _TYPES.items())


def blocks_of(codes: Codes, *, allow_rounding: bool = False) -> Blocks:
    """The same weight in blocks.

    Args:
        codes: 4 bits, or symmetric 8 bits, in groups of 32.
        allow_rounding: accept offsets (zero times scale) that float16 rounds, by 2**-12 of their size at most.

    Raises:
        UsageError: no block type holds the scheme.
        LossyError: an offset is not exact in float16.
    """
    s = codes.scheme
    name = _TYPES.get((s.bits, s.symmetric)) if s.group_size == 32 else None
    if name is None:
        raise UsageError(
            f"no GGUF block type holds {s}.", fix=f"use {FITTING}, or quantize into a k-quant."
        )
    fields = Fields(FORMATS[name], codes.codes, codes.scales)
    if codes.zeros is not None:
        wanted = codes.zeros.float() * codes.scales
        stored = to_half(wanted)
        if (rounded := int(torch.count_nonzero(stored != wanted))) and not allow_rounding:
            raise LossyError(
                f"{rounded} of {stored.numel()} offsets (zero times scale) are not exact in Q4_1's float16.",
                fix="use symmetric codes (Q4_0), or quantize into a GGUF type.",
            )
        fields = Fields(FORMATS[name], codes.codes, codes.scales, dmin=stored)
    return Blocks(FORMATS[name], layout.pack(fields))
